// CUDA tensors without a GPU, for a torch without CUDA: host memory that torch believes to be on a device, so that the
// library's CUDA half runs against libcuda.cpp. Named libtorch_cuda.so, which is where the library looks for the stream.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

namespace {

std::mutex mutex;
std::vector<std::vector<int64_t>> allocations;  // address, bytes, device
std::map<int64_t, std::vector<void*>> freed;     // by bytes: given out again first, as by PyTorch's allocator

at::Tensor on_device(void* data, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype, at::Device device, std::function<void(void*)> free) {
  return at::for_blob(data, sizes).strides(strides).deleter(std::move(free)).target_device(device).options(at::dtype(dtype).device(device)).make_tensor();
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const auto shape = C10_AS_INTARRAYREF_SLOW(sizes), steps = C10_AS_INTARRAYREF_SLOW(strides);
  int64_t bytes = at::elementSize(*dtype);
  for (int64_t size : shape) bytes *= size;
  void* data = nullptr;
  {
    std::lock_guard lock(mutex);
    if (auto& blocks = freed[bytes]; !blocks.empty()) data = blocks.back(), blocks.pop_back();
    if (!data) data = std::aligned_alloc(512, (bytes + 512) / 512 * 512);
    if (allocations.size() < 1000) allocations.push_back({reinterpret_cast<int64_t>(data), bytes, device->index()});
  }
  return on_device(data, shape, steps, *dtype, at::Device(at::kCUDA, device->has_index() ? device->index() : 0), [bytes](void* data) {
    std::lock_guard lock(mutex);
    freed[bytes].push_back(data);
  });
}

// The same memory, on a device.
at::Tensor to_device(const at::Tensor& t, int64_t device) {
  return on_device(t.data_ptr(), t.sizes(), t.strides(), t.scalar_type(), at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)), [t](void*) {});
}

at::Tensor to_host(const at::Tensor& t) { return at::for_blob(t.data_ptr(), t.sizes()).strides(t.strides()).deleter([t](void*) {}).options(at::dtype(t.scalar_type())).make_tensor(); }

// What was allocated since the last call.
std::vector<int64_t> take_allocations() {
  std::lock_guard lock(mutex);
  std::vector<int64_t> flat;
  for (const auto& a : allocations) flat.insert(flat.end(), a.begin(), a.end());
  allocations.clear();
  return flat;
}

}  // namespace

extern "C" int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(0x5EED);
  return 0;
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) { m.impl("empty_strided", &empty_strided); }

TORCH_LIBRARY(stub_cuda, m) {
  m.def("to_device(Tensor t, int device) -> Tensor", &to_device);
  m.def("to_host(Tensor t) -> Tensor", &to_host);
  m.def("take_allocations() -> int[]", &take_allocations);
}
