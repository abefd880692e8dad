// What the library holds and what would run where. No torch, no Python.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace effnet {

// One embedded image of one kernel.
struct KernelInfo {
  std::string op, variant, kernel;
  std::string arch;  // "8.9"
  std::string kind;  // "cubin" or "ptx"
  int registers, spills, shared, threads;
  size_t bytes;
  std::string sha256;       // as the build recorded it
  const void* data;         // the image itself, `bytes` long
};

struct BuildInfo {
  std::string triton, ptxas, compiler;
  std::string torch;         // whose headers it was compiled with
  std::string torch_target;  // the oldest that it runs with
};

// What serves a device: its name and capability, and "cubin sm_90", "ptx compute_89" or "none".
struct DeviceInfo {
  std::string name, capability, image;
};

__attribute__((visibility("default"))) std::vector<KernelInfo> kernels();
__attribute__((visibility("default"))) BuildInfo build_info();
__attribute__((visibility("default"))) DeviceInfo device_image(int device);

// Loads every kernel onto the device, so that the next call only launches. Throws std::runtime_error.
__attribute__((visibility("default"))) void preload(int device);

}  // namespace effnet
