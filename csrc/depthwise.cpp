// Depthwise convolution, 3x3 and 5x5. Kernels: triton_src/depthwise.py.
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

// How many blocks a variant takes. The walking ones (attribute "rows" above 1) take a strip of one image's rows and do it
// for one stride; the flat ones see nothing but pixels.
int64_t blocks(const DepthwiseProblem& p, const Tile& tile) {
  const Variant& v = *tile.variant;
  const int64_t walk = v["rows"];
  if (walk > 1) {
    if (v["stride"] != p.stride_y || v["stride"] != p.stride_x) return 0;
    return p.batch * ceil_div(p.out_height, walk) * ceil_div(p.out_width, tile.rows) * ceil_div(p.channels, tile.columns);
  }
  const int64_t plane = p.out_height * p.out_width;
  return p.channels_last ? ceil_div(p.batch * plane, tile.rows) * ceil_div(p.channels, tile.columns)
                         : ceil_div(plane, tile.rows) * ceil_div(p.batch * p.channels, tile.columns);
}

// In loads, relative to one a pixel: a flat tile reads every output's neighbours, a walking one every input row once.
int64_t work(const Tile& tile) {
  const Variant& v = *tile.variant;
  const int64_t walk = v["rows"], kernel = v["kernel"];
  const int64_t rows_read = walk > 1 ? (walk - 1) * v["stride"] + kernel : kernel;
  return rows_read * kernel * tile.rows * tile.columns / 9;
}

}  // namespace

void launch_depthwise(const DepthwiseProblem& p, Place place) {
  // No tensor cores here: TF32 and float32 are the same kernel.
  const Precision precision = p.precision == Precision::tf32 ? Precision::fp32 : p.precision;
  const bool is_aligned = p.channels_last && aligned({p.x, p.out}, {p.channels});
  const int fitting = key(precision, p.channels_last, is_aligned, p.kernel);
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting, key(precision, p.channels_last, false, p.kernel)})
                               : table().choose(fitting, place.device,
                                                {p.batch, {{"channels_last", p.channels_last}, {"channels", p.channels}, {"height", p.height}, {"width", p.width},
                                                           {"kernel", p.kernel}, {"stride_y", p.stride_y}, {"stride_x", p.stride_x}}},
                                                [&](const Tile& t) { return blocks(p, t); }, work);

  const int64_t grid = blocks(p, tile);
  if (grid == 0) throw Error(Failure::invalid_argument, std::string("effnet::") + p.op + ": variant " + tile.variant->name + " does not have stride (" + std::to_string(p.stride_y) + ", " + std::to_string(p.stride_x) + ")");
  const int64_t taps = p.kernel * p.kernel;
  const auto [weight_channel, weight_tap] = p.taps_first ? std::pair<int64_t, int64_t>{1, p.channels} : std::pair<int64_t, int64_t>{taps, 1};
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p1, p2, p3, p.out,
         int32_t(p.batch), int32_t(p.channels), int32_t(p.height), int32_t(p.width), int32_t(p.out_height), int32_t(p.out_width),
         int32_t(p.stride_y), int32_t(p.stride_x), int32_t(p.left), int32_t(p.top), int32_t(weight_channel), int32_t(weight_tap),
         p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
