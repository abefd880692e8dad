// The first two steps of an MBConv block: in one kernel where there is one for it (triton_src/expand_depthwise.py) and the map is
// small, else the expanded map lives in a workspace.
#include <cmath>

#include "choice.h"

namespace effnet {
namespace {

int key(Precision precision, int64_t kernel, int64_t stride) { return (static_cast<int>(precision) * 2 + (kernel == 5)) * 2 + (stride == 2); }

const TileTable& table() {
  static const TileTable t("expand_depthwise", kPrecisions * 4, [](const Variant& v) { return key(Precision(v["precision"]), v["kernel"], v["stride"]); }, "pixels", "chunk");
  return t;
}

// What the kernels were promised at compile time.
bool fits_a_kernel(const ExpandDepthwiseProblem& p) {
  const bool biases = p.expand_bias && p.depthwise_bias && (p.vectors_are_fp32 || bytes_of_element(p.precision) == 4);
  return p.channels_last && biases && p.depthwise_taps_first && p.stride_y == p.stride_x &&
         aligned({p.x, p.expand_weight, p.expand_bias, p.depthwise_weight, p.depthwise_bias, p.out}, {p.in_channels, p.hidden});
}

int64_t band(const ExpandDepthwiseProblem& p, const Tile& tile) { return rows_of_band(p, tile.rows); }

int64_t blocks(const ExpandDepthwiseProblem& p, const Tile& tile) {
  const int64_t rows = band(p, tile);
  return rows == 0 ? 0 : p.batch * ceil_div(p.out_height, rows) * ceil_div(p.hidden, tile.columns);
}

// The tile of the kernel that computes both steps; null where two kernels are better, or there is none.
const Tile* fused(const ExpandDepthwiseProblem& p, Place place) {
  const int fitting = fits_a_kernel(p) ? key(p.precision, p.kernel, p.stride_y) : -1;
  if (p.variant) return &table().named(p.op, p.variant, {fitting});
  if (fitting < 0) return nullptr;
  const auto by_rule = [&]() -> const Tile* {
    // Larger maps would be cut into bands that compute their borders twice, and have pixels enough to fill the GPU in two steps.
    constexpr int64_t kSmallMap = 256;
    if (p.height * p.width > kSmallMap) return nullptr;
    return table().find(fitting, 2 * device_info(place.device).multiprocessors, [&](const Tile& tile) { return blocks(p, tile); },
                        [](const Tile& tile) { return int64_t{tile.rows} * tile.columns; });
  };
  return table().choose_or_none(fitting, place,
                                {p.batch, {{"height", p.height}, {"width", p.width}, {"in_channels", p.in_channels}, {"hidden", p.hidden}, {"kernel", p.kernel}, {"stride", p.stride_y}}},
                                [&](const Tile& tile) { return blocks(p, tile); }, by_rule);
}

void launch_fused(const ExpandDepthwiseProblem& p, const Tile& tile, Place place) {
  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(p.op, tile, "rows of " + std::to_string(p.width) + " pixels");
  launch(p.op, *tile.variant, place, grid, p.x, p.expand_weight, p.expand_bias, p.depthwise_weight, p.depthwise_bias, p.out,
         int32_t(p.in_channels), int32_t(p.hidden), int32_t(p.height), int32_t(p.width), int32_t(p.out_height), int32_t(p.out_width), int32_t(band(p, tile)),
         int32_t(p.left), int32_t(p.top), p.low, p.high);
}

Tail tail_of(const ExpandDepthwiseProblem& p, const void* bias) {
  Tail tail{.vectors_are_fp32 = p.vectors_are_fp32, .low = p.low, .high = p.high};
  tail.vectors[0] = bias;
  return tail;
}

void launch_unfused(const ExpandDepthwiseProblem& p, void* expanded, Place place) {
  const Precision filter = p.precision == Precision::narrowing ? Precision::narrow : p.precision;
  launch_pointwise({.op = p.op, .precision = p.precision, .channels_last = p.channels_last, .x = p.x, .weight = p.expand_weight, .out = expanded,
                    .batch = p.batch, .pixels = p.height * p.width, .in_channels = p.in_channels, .out_channels = p.hidden, .tail = tail_of(p, p.expand_bias)}, place);
  launch_depthwise({.op = p.op, .precision = filter, .channels_last = p.channels_last, .x = expanded, .weight = p.depthwise_weight, .out = p.out,
                    .batch = p.batch, .channels = p.hidden, .height = p.height, .width = p.width, .out_height = p.out_height, .out_width = p.out_width,
                    .kernel = p.kernel, .stride_y = p.stride_y, .stride_x = p.stride_x, .left = p.left, .top = p.top, .tail = tail_of(p, p.depthwise_bias),
                    .taps_first = p.depthwise_taps_first}, place);
}

}  // namespace

int64_t expand_depthwise_workspace(const ExpandDepthwiseProblem& p, Place place) {
  return fused(p, place) ? 0 : p.batch * p.hidden * p.height * p.width * bytes_of_out(p.precision);
}

void launch_expand_depthwise(const ExpandDepthwiseProblem& p, void* workspace, Place place) {
  if (const Tile* tile = fused(p, place)) return launch_fused(p, *tile, place);
  launch_unfused(p, workspace, place);
}

}  // namespace effnet
