// 1x1 convolution and global average pool in one kernel: the head. Kernels: triton_src/pointwise_pool.py.
#include "choice.h"

namespace effnet {
namespace {

const TileTable& table() {
  static const TileTable t("pointwise_pool", kLayoutKeys, [](const Variant& v) { return layout_key(Precision(v["precision"]), v["channels_last"], v["aligned"]); }, "block_m", "block_n");
  return t;
}

// 0 where the variant does not fit: one for several images gives each the same part of its rows.
int64_t blocks(const PointwiseProblem& p, const Tile& tile) {
  const int images = std::max(1, (*tile.variant)["images"]);
  if (images > 1 && p.pixels > tile.rows / images) return 0;
  return ceil_div(p.batch, images) * ceil_div(p.out_channels, tile.columns);
}

}  // namespace

void launch_pointwise_pool(const PointwiseProblem& p, Place place) {
  const bool rows = p.channels_last || p.pixels == 1;
  const bool is_aligned = rows && aligned({p.x, p.weight}, {p.in_channels});
  const int fitting = layout_key(p.precision, rows, is_aligned);
  const auto grid_of = [&](const Tile& tile) { return blocks(p, tile); };
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting, layout_key(p.precision, rows, false)})
                               : table().choose(fitting, place,
                                                {p.batch, {{"channels_last", rows}, {"pixels", p.pixels}, {"in_channels", p.in_channels}, {"out_channels", p.out_channels}}},
                                                grid_of, area_of);

  const int64_t grid = grid_of(tile);
  if (grid == 0) refuse(p.op, tile, std::to_string(p.pixels) + " pixels");
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p1, p2, p3, p.out,
         int32_t(p.batch), int32_t(p.pixels), int32_t(p.out_channels), int32_t(p.in_channels), p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
