#include "effnet_aot/introspection.h"

#include "launcher.h"

#ifndef EFFNET_AOT_TORCH_VERSION  // this file also serves builds without torch
#define EFFNET_AOT_TORCH_VERSION "none"
#endif

namespace effnet {
namespace {

std::string capability_name(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

}  // namespace

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> all;
  for (const Variant& v : variants())
    for (const Image& i : v.images)
      all.push_back({v.op, v.name, v.kernel, capability_name(i.capability), i.kind == ImageKind::cubin ? "cubin" : "ptx", i.registers, i.spills, i.shared, i.threads, i.size, i.sha256, i.data});
  return all;
}

BuildInfo build_info() { return {kTritonVersion, kPtxasVersion, __VERSION__, EFFNET_AOT_TORCH_VERSION, "2.10"}; }

DeviceInfo device_image(int device) {
  const Device& info = device_info(device);
  const Image* image = select_image(variants().front(), info.capability);
  const std::string name = !image ? "none" : (image->kind == ImageKind::cubin ? "cubin sm_" : "ptx compute_") + std::to_string(image->capability);
  return {info.name, capability_name(info.capability), name};
}

}  // namespace effnet
