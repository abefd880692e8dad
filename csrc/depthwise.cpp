// Depthwise convolution, 3x3 and 5x5. Kernels: triton_src/depthwise.py.
#include <algorithm>

#include "choice.h"

namespace effnet {
namespace {

int key(Precision precision, bool channels_last, bool is_aligned, int64_t kernel) {
  return ((static_cast<int>(precision) * 2 + channels_last) * 2 + is_aligned) * 2 + (kernel == 5);
}

const TileTable& table() {
  static const TileTable t("depthwise", kPrecisions * 8, [](const Variant& v) { return key(Precision(v["precision"]), v["channels_last"], v["aligned"], v["kernel"]); }, "block_p", "block_c");
  return t;
}

// What the variants of attribute "folded" were promised: a float32 bias alone, or none, and a weight that is read in words.
bool is_folded(const DepthwiseProblem& p) {
  const bool float32 = p.tail.vectors_are_fp32 || bytes_of_element(p.precision) == 4;
  return !p.tail.batch_norm && (float32 || !p.tail.vectors[0]) && aligned({p.weight}, {});
}

// How many blocks a variant takes, 0 where it does not fit. The walking ones (attribute "rows" above 1) take a strip of one
// image's rows, the folded ones of all images' columns by channels, and do it for one stride; the flat ones see nothing but pixels.
int64_t blocks(const DepthwiseProblem& p, const Tile& tile) {
  const Variant& v = *tile.variant;
  const int64_t walk = v["rows"];
  if (walk > 1) {
    if (v["stride"] != p.stride_y || v["stride"] != p.stride_x) return 0;
    if (v["folded"] == 1) return is_folded(p) ? ceil_div(p.out_height, walk) * ceil_div(p.batch * ceil_div(p.out_width, tile.rows) * p.channels, tile.columns) : 0;
    return p.batch * ceil_div(p.out_height, walk) * ceil_div(p.out_width, tile.rows) * ceil_div(p.channels, tile.columns);
  }
  const int64_t plane = p.out_height * p.out_width;
  return p.channels_last ? ceil_div(p.batch * plane, tile.rows) * ceil_div(p.channels, tile.columns)
                         : ceil_div(plane, tile.rows) * ceil_div(p.batch * p.channels, tile.columns);
}

// In loads, relative to one a pixel: a flat tile reads every output's neighbours, a walking one every input row once. A folded
// one adds a row as it loads it.
int64_t work(const DepthwiseProblem& p, const Tile& tile) {
  const Variant& v = *tile.variant;
  const int64_t walk = v["rows"], kernel = v["kernel"];
  if (v["folded"] == 1) return (std::min(walk, p.out_height) + kernel - 1) * tile.rows * tile.columns;
  const int64_t rows_read = walk > 1 ? (walk - 1) * v["stride"] + kernel : kernel;
  return rows_read * kernel * tile.rows * tile.columns / 9;
}

// A folded variant where one fits: with more blocks at once on a multiprocessor, as a few large ones leave most warps' places empty.
const Tile* by_rule(const DepthwiseProblem& p, int key, int device) {
  constexpr int kAtOnce = 4;
  const int multiprocessors = device_info(device).multiprocessors;
  const auto cost = [&](const Tile& tile) { return work(p, tile); };
  const Tile* folded = table().find(key, kAtOnce * multiprocessors, [&](const Tile& tile) { return (*tile.variant)["folded"] == 1 ? blocks(p, tile) : 0; }, cost);
  return folded ? folded : table().find(key, multiprocessors, [&](const Tile& tile) { return blocks(p, tile); }, cost);
}

}  // namespace

void launch_depthwise(const DepthwiseProblem& p, Place place) {
  // No tensor cores here: TF32 and float32 are the same kernel.
  const Precision precision = p.precision == Precision::tf32 ? Precision::fp32 : p.precision;
  const bool is_aligned = p.channels_last && aligned({p.x, p.out}, {p.channels});
  const int fitting = key(precision, p.channels_last, is_aligned, p.kernel);
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting, key(precision, p.channels_last, false, p.kernel)})
                               : table().choose_by_rule(fitting, place,
                                                        {p.batch, {{"channels_last", p.channels_last}, {"channels", p.channels}, {"height", p.height}, {"width", p.width},
                                                                   {"kernel", p.kernel}, {"stride_y", p.stride_y}, {"stride_x", p.stride_x}}},
                                                        [&](const Tile& t) { return blocks(p, t); }, [&] { return by_rule(p, fitting, place.device); });

  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(p.op, tile, "stride (" + std::to_string(p.stride_y) + ", " + std::to_string(p.stride_x) + "), or its epilogue is not a float32 bias, or its weight is not aligned");
  const int64_t taps = p.kernel * p.kernel;
  const auto [weight_channel, weight_tap] = p.taps_first ? std::pair<int64_t, int64_t>{1, p.channels} : std::pair<int64_t, int64_t>{taps, 1};
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p1, p2, p3, p.out,
         int32_t(p.batch), int32_t(p.channels), int32_t(p.height), int32_t(p.width), int32_t(p.out_height), int32_t(p.out_width),
         int32_t(p.stride_y), int32_t(p.stride_x), int32_t(p.left), int32_t(p.top), int32_t(weight_channel), int32_t(weight_tap),
         p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
