// 1x1 convolution and its siblings by batch norm, activation and residual. Kernels: triton_src/pointwise.py.
#include "choice.h"

namespace effnet {
namespace {

const TileTable& table() {
  static const TileTable t("pointwise", kLayoutKeys, [](const Variant& v) { return layout_key(Precision(v["precision"]), v["channels_last"], v["aligned"], v["folded"]); }, "block_m", "block_n");
  return t;
}

// 0 where the variant does not fit: resident weights need their whole depth in shared memory, and waste the rest of it.
int64_t blocks(const Tile& tile, int64_t images, int64_t pixels, int64_t in_channels, int64_t out_channels, int device) {
  const int64_t row_tiles = ceil_div(pixels, tile.rows), column_tiles = ceil_div(out_channels, tile.columns);
  const int64_t depth = (*tile.variant)["resident_depth"], residents = (*tile.variant)["residents"];
  if (residents < 0) return images * row_tiles * column_tiles;
  if (in_channels > depth || 2 * in_channels <= depth) return 0;
  return column_tiles * std::clamp(residents * device_info(device).multiprocessors / column_tiles, int64_t{1}, row_tiles);
}

}  // namespace

void launch_pointwise(const PointwiseProblem& p, Place place) {
  // Maps of one pixel lie the same way in both formats, and as rows they share tiles across images.
  const bool rows = p.channels_last || p.pixels == 1;
  const int64_t pixels = rows ? p.batch * p.pixels : p.pixels, images = rows ? 1 : p.batch;
  const bool is_aligned = aligned({p.x, p.weight, p.out, p.tail.residual}, {p.in_channels, rows ? p.out_channels : p.pixels});
  const int any = layout_key(p.precision, rows, is_aligned), folded = layout_key(p.precision, rows, is_aligned, true);
  const int fitting = !p.tail.batch_norm && table().has(folded) ? folded : any;
  const auto grid_of = [&](const Tile& tile) { return blocks(tile, images, pixels, p.in_channels, p.out_channels, place.device); };
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting, any, layout_key(p.precision, rows, false)})
                               : table().choose(fitting, place,
                                                {p.batch, {{"channels_last", rows}, {"pixels", p.pixels}, {"in_channels", p.in_channels}, {"out_channels", p.out_channels}, {"residual", p.tail.residual != nullptr}}},
                                                grid_of, area_of);

  const int64_t grid = grid_of(tile);
  if (grid == 0) refuse(p.op, tile, "in_channels " + std::to_string(p.in_channels));
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p.weight_scale ? p.weight_scale : p1, p2, p3, p.tail.residual, p.out,
         int32_t(pixels), int32_t(p.out_channels), int32_t(p.in_channels), p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
