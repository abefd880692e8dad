// effnet_aot._C: introspection from Python. The ops themselves are reached through torch.ops.effnet.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "effnet_aot/introspection.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the native library of effnet_aot holds, and what would run where.";
  m.def("kernels", [] {
    py::list all;
    for (const auto& k : effnet::kernels()) {
      py::dict entry;
      entry["op"] = k.op;
      entry["variant"] = k.variant;
      entry["kernel"] = k.kernel;
      entry["arch"] = k.arch;
      entry["kind"] = k.kind;
      entry["registers"] = k.registers;
      entry["spills"] = k.spills;
      entry["shared"] = k.shared;
      entry["threads"] = k.threads;
      entry["bytes"] = k.bytes;
      entry["sha256"] = k.sha256;
      all.append(entry);
    }
    return all;
  }, "Every embedded image: op, variant, kernel, arch, kind, registers and spilled bytes per thread, shared memory and threads per block, bytes, sha256.");
  m.def("image", [](size_t index) {
    const auto all = effnet::kernels();
    if (index >= all.size()) throw py::index_error("image: index must be below " + std::to_string(all.size()) + ", got " + std::to_string(index));
    return py::bytes(static_cast<const char*>(all[index].data), all[index].bytes);
  }, py::arg("index"), "The bytes of the image at this index of kernels().");
  m.def("build_info", [] {
    const auto info = effnet::build_info();
    py::dict entry;
    entry["triton"] = info.triton;
    entry["ptxas"] = info.ptxas;
    entry["compiler"] = info.compiler;
    entry["torch"] = info.torch;
    entry["torch_target"] = info.torch_target;
    return entry;
  }, "Versions of the tools that built the library, and the oldest torch that it runs with.");
  m.def("images", [](int device) {
    const auto info = effnet::device_image(device);
    py::dict entry;
    entry["name"] = info.name;
    entry["capability"] = info.capability;
    entry["image"] = info.image;
    return entry;
  }, py::arg("device") = 0, "Name and compute capability of a GPU, and which images serve it: 'cubin sm_90', 'ptx compute_89' or 'none'.");
  m.def("preload", &effnet::preload, py::arg("device") = 0, py::call_guard<py::gil_scoped_release>(),
        "Loads every kernel onto the device, so that the next call only launches.");
}
