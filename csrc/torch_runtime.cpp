#include "torch_runtime.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace effnet {
namespace {

// at::Context's getter, the same in every torch from 2.10 on. It is reached by its mangled name because the stable ABI
// has no call for it; a torch without it costs the switches, nothing else.
enum Float32Backend { kCuda = 1 };
enum Float32Op { kConv = 1, kMatmul = 3 };
enum Float32Precision { kTf32 = 2, kDefault = 4 };

int float32_precision(Float32Op op, int fallback) {
  using Context = void* (*)();
  using Getter = int (*)(void*, int, int);
  static const auto context = reinterpret_cast<Context>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto getter = reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE"));
  return context && getter ? getter(context(), kCuda, op) : fallback;
}

}  // namespace

bool tf32_for_convolutions() {
  const int precision = float32_precision(kConv, kDefault);
  return precision == kTf32 || precision == kDefault;
}

bool tf32_for_matmul() { return float32_precision(kMatmul, kDefault) == kTf32; }

void* current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static std::atomic<Getter> cached{nullptr};
  Getter getter = cached.load(std::memory_order_relaxed);
  if (!getter) {
    // libtorch_cuda is there already, or there would be no CUDA tensor; only its name is needed.
    void* handle = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    getter = handle ? reinterpret_cast<Getter>(dlsym(handle, "aoti_torch_get_current_cuda_stream")) : nullptr;
    if (!getter) throw std::runtime_error("effnet_aot: this torch has no CUDA (libtorch_cuda.so is not loaded)");
    cached.store(getter, std::memory_order_relaxed);
  }
  void* stream = nullptr;
  if (getter(device, &stream) != AOTI_TORCH_SUCCESS) throw std::runtime_error("effnet_aot: torch did not give the current stream of device " + std::to_string(device));
  return stream;
}

}  // namespace effnet
