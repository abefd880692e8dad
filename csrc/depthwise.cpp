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

}  // namespace

void launch_depthwise(const DepthwiseProblem& p, Place place) {
  // No tensor cores here: TF32 and float32 are the same kernel.
  const Precision precision = p.precision == Precision::tf32 ? Precision::fp32 : p.precision;
  const bool is_aligned = p.channels_last && aligned({p.x, p.out}, {p.channels});
  const int64_t plane = p.out_height * p.out_width;
  const int64_t pixels = p.channels_last ? p.batch * plane : plane, channels = p.channels_last ? p.channels : p.batch * p.channels;
  const int fitting = key(precision, p.channels_last, is_aligned, p.kernel);
  const Tile& tile = p.variant ? table().named(p.op, p.variant, fitting, key(precision, p.channels_last, false, p.kernel))
                               : table().choose(fitting, pixels, channels, 1, device_info(place.device).multiprocessors);

  const int64_t grid = ceil_div(pixels, tile.rows) * ceil_div(channels, tile.columns);
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p1, p2, p3, p.out,
         int32_t(p.batch), int32_t(p.channels), int32_t(p.height), int32_t(p.width), int32_t(p.out_height), int32_t(p.out_width),
         int32_t(p.stride_y), int32_t(p.stride_x), int32_t(p.left), int32_t(p.top), p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
