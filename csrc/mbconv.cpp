// A whole MBConv block: the maps between its three convolutions live in a workspace, where no kernel keeps them on chip.
#include <cmath>

#include "kernels.h"

namespace effnet {
namespace {

// What the workspace holds, one after the other: the expanded map, if there is one, and the filtered one.
struct Maps {
  explicit Maps(const MbconvProblem& p) {
    constexpr int64_t kAlignment = 256;
    const int64_t image = p.batch * p.hidden * bytes_of_element(p.precision);
    if (p.expand_weight) filtered = (image * p.height * p.width + kAlignment - 1) / kAlignment * kAlignment;
    bytes = filtered + image * p.out_height * p.out_width;
  }
  int64_t filtered = 0, bytes;  // where that one starts, and how much all take
};

Tail tail_of(const MbconvProblem& p, const void* bias, float low, float high) {
  Tail tail{.vectors_are_fp32 = p.vectors_are_fp32, .low = low, .high = high};
  tail.vectors[0] = bias;
  return tail;
}

void launch_unfused(const MbconvProblem& p, void* workspace, Place place) {
  char* const expanded = static_cast<char*>(workspace);
  char* const filtered = expanded + Maps(p).filtered;
  constexpr float kInfinity = INFINITY;
  if (p.expand_weight)
    launch_pointwise({.op = p.op, .precision = p.precision, .channels_last = p.channels_last, .x = p.x, .weight = p.expand_weight, .out = expanded,
                      .batch = p.batch, .pixels = p.height * p.width, .in_channels = p.in_channels, .out_channels = p.hidden,
                      .tail = tail_of(p, p.expand_bias, p.low, p.high)}, place);

  launch_depthwise({.op = p.op, .precision = p.precision, .channels_last = p.channels_last, .x = p.expand_weight ? expanded : p.x,
                    .weight = p.depthwise_weight, .out = filtered, .batch = p.batch, .channels = p.hidden, .height = p.height, .width = p.width,
                    .out_height = p.out_height, .out_width = p.out_width, .kernel = p.kernel, .stride_y = p.stride_y, .stride_x = p.stride_x,
                    .left = p.left, .top = p.top, .tail = tail_of(p, p.depthwise_bias, p.low, p.high), .taps_first = p.depthwise_taps_first}, place);

  Tail tail = tail_of(p, p.project_bias, -kInfinity, kInfinity);
  tail.residual = p.residual;
  launch_pointwise({.op = p.op, .precision = p.precision, .channels_last = p.channels_last, .x = filtered, .weight = p.project_weight, .out = p.out,
                    .batch = p.batch, .pixels = p.out_height * p.out_width, .in_channels = p.hidden, .out_channels = p.out_channels, .tail = tail}, place);
}

}  // namespace

int64_t mbconv_workspace(const MbconvProblem& p, int) { return Maps(p).bytes; }

void launch_mbconv(const MbconvProblem& p, void* workspace, Place place) { launch_unfused(p, workspace, place); }

}  // namespace effnet
