// Batch norm folded into a convolution. Kernels: triton_src/fold_batch_norm.py.
#include "choice.h"

namespace effnet {
namespace {

int key(Precision weight, Precision out) { return static_cast<int>(weight) * kPrecisions + static_cast<int>(out); }

const TileTable& table() {
  static const TileTable t("fold_batch_norm", kPrecisions * kPrecisions, [](const Variant& v) { return key(Precision(v["precision"]), Precision(v["out_precision"])); },
                           "block_m", "block_n");
  return t;
}

}  // namespace

void launch_fold_batch_norm(const FoldBatchNormProblem& p, Place place) {
  const int64_t taps = p.kernel_y * p.kernel_x, elements = p.in_channels * taps;
  const int fitting = key(p.precision, p.out_precision);
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting})
                               : table().choose(fitting, place, {1, {{"out_channels", p.out_channels}, {"elements", elements}}}, p.out_channels, elements, 1);

  const int64_t grid = ceil_div(p.out_channels, tile.rows) * ceil_div(elements, tile.columns);
  const int64_t out_channel = p.taps_first ? 1 : elements, out_element = p.taps_first ? p.out_channels : 1;
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  const int64_t* w = p.weight_strides;
  launch(p.op, *tile.variant, place, grid, p.weight, p0, p1, p2, p3, p.out, p.out_bias,
         int32_t(p.out_channels), int32_t(p.in_channels), int32_t(p.kernel_y), int32_t(p.kernel_x),
         int32_t(w[0]), int32_t(w[1]), int32_t(w[2]), int32_t(w[3]), int32_t(out_channel), int32_t(out_element), p.tail.eps, flags(p.tail));
}

}  // namespace effnet
