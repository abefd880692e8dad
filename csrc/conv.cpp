// Dense convolution with few input channels: the stem. Kernels: triton_src/conv.py.
#include "choice.h"

namespace effnet {
namespace {

int key(Precision precision, bool channels_last, bool is_aligned, bool is_3x3, bool folded = false) {
  return (((static_cast<int>(precision) * 2 + channels_last) * 2 + is_aligned) * 2 + is_3x3) * 2 + folded;
}

const TileTable& table() {
  static const TileTable t("conv", kPrecisions * 16, [](const Variant& v) { return key(Precision(v["precision"]), v["channels_last"], v["aligned"], v["kernel"] == 3, v["folded"]); }, "block_m", "block_n");
  return t;
}

}  // namespace

void launch_conv(const ConvProblem& p, Place place) {
  // Kernels that are not 3x3 take the variants for any kernel, of which there are no aligned ones.
  const bool is_3x3 = p.kernel_y == 3 && p.kernel_x == 3;
  const bool is_aligned = is_3x3 && p.channels_last && aligned({p.out}, {p.out_channels});
  const int64_t pixels = p.out_height * p.out_width;
  const bool wide = p.tail.vectors_are_fp32 || p.precision == Precision::tf32 || !p.tail.vectors[0];
  const bool is_folded = is_aligned && p.in_channels <= 3 && !p.tail.batch_norm && wide && aligned({p.tail.vectors[0]}, {});
  const int any = key(p.precision, p.channels_last, is_aligned, is_3x3), folded = key(p.precision, p.channels_last, is_aligned, is_3x3, true);
  const int fitting = is_folded && table().has(folded) ? folded : any;
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting, any, key(p.precision, p.channels_last, false, is_3x3), key(p.precision, p.channels_last, false, false)})
                               : table().choose(fitting, place,
                                                {p.batch, {{"channels_last", p.channels_last}, {"in_channels", p.in_channels}, {"height", p.height}, {"width", p.width}, {"out_channels", p.out_channels},
                                                           {"kernel_y", p.kernel_y}, {"kernel_x", p.kernel_x}, {"stride_y", p.stride_y}, {"stride_x", p.stride_x}}},
                                                pixels, p.out_channels, p.batch);

  const int64_t grid = p.batch * ceil_div(pixels, tile.rows) * ceil_div(p.out_channels, tile.columns);
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  const int64_t *xs = p.x_strides, *ws = p.weight_strides;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p1, p2, p3, p.out,
         int32_t(p.in_channels), int32_t(p.height), int32_t(p.width), int32_t(p.out_channels), int32_t(p.out_height), int32_t(p.out_width),
         int32_t(p.kernel_y), int32_t(p.kernel_x), int32_t(p.stride_y), int32_t(p.stride_x), int32_t(p.left), int32_t(p.top),
         int32_t(xs[0]), int32_t(xs[1]), int32_t(xs[2]), int32_t(xs[3]), int32_t(ws[0]), int32_t(ws[1]), int32_t(ws[2]), int32_t(ws[3]),
         p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
