// Time of one MBConv block (1x1 expand, 3x3 depthwise, 1x1 project; batch norm folded), against ATen's:  benchmark [cpu|cuda]
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <effnet_aot/effnet_aot.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "device.h"

using at::Tensor;

namespace {

// Median over rounds of the mean time of a call, in microseconds.
template <class Call>
double microseconds(Call call, bool cuda) {
  const int rounds = 11, calls = cuda ? 100 : 3;
  std::vector<double> times;
  for (int round = -1; round < rounds; ++round) {  // the first warms up
    if (cuda) torch::cuda::synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) call();
    if (cuda) torch::cuda::synchronize();
    const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
    if (round >= 0) times.push_back(elapsed.count() / calls);
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[rounds / 2];
}

int main_on(at::Device device) {
  c10::InferenceMode guard;
  at::manual_seed(0);
  const auto options = at::TensorOptions(device).dtype(device.is_cuda() ? at::kHalf : at::kFloat);
  const Tensor x = at::randn({10, 24, 60, 60}, options).contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor expand = at::randn({144, 24, 1, 1}, options) / 5, expand_bias = at::randn({144}, options);
  const Tensor depth = at::randn({144, 1, 3, 3}, options) / 3, depth_bias = at::randn({144}, options);
  const Tensor project = at::randn({40, 144, 1, 1}, options) / 12, project_bias = at::randn({40}, options);

  const auto ours = [&] {
    Tensor hidden = effnet::pointwise(x, expand, expand_bias, std::nullopt, "relu6");
    hidden = effnet::depthwise(hidden, depth, depth_bias, {2, 2}, {1, 1, 1, 1}, "relu6");
    return effnet::pointwise(hidden, project, project_bias);
  };
  const auto aten = [&] {
    Tensor hidden = at::conv2d(x, expand, expand_bias).clamp_(0, 6);
    hidden = at::conv2d(hidden, depth, depth_bias, 2, 1, 1, 144).clamp_(0, 6);
    return at::conv2d(hidden, project, project_bias);
  };
  if (const double error = relative_error(ours(), aten()); !(error < 1e-2)) throw std::runtime_error("the two disagree: error " + std::to_string(error));
  std::printf("24 -> 144 -> 40 channels, 10 x 60 x 60 pixels, stride 2, %s on %s\n", c10::toString(x.scalar_type()), device.str().c_str());
  std::printf("effnet %8.1f us\n", microseconds(ours, device.is_cuda()));
  std::printf("aten   %8.1f us\n", microseconds(aten, device.is_cuda()));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program([&] { return main_on(choose_device(argc > 1 ? argv[1] : "")); });
}
