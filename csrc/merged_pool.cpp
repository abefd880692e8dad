// A projection and the head behind it in one kernel. Kernels: triton_src/merged_pool.py.
#include "choice.h"

namespace effnet {
namespace {

const TileTable& table() {
  static const TileTable t("merged_pool", kPrecisions, [](const Variant& v) { return v["precision"]; }, "pixels", "chunk");
  return t;
}

// 0 where the variant does not fit.
int64_t blocks(const PointwiseProblem& p, const Tile& tile) {
  if (p.pixels > tile.rows || !fits_depth(tile, p.in_channels)) return 0;
  return ceil_div(p.batch, (*tile.variant)["images"]) * ceil_div(p.out_channels, tile.columns);
}

const Tile* chosen(const PointwiseProblem& p, Place place) {
  const bool rows = p.channels_last || p.pixels == 1;
  const bool fits = rows && p.tail.vectors[0] && !p.tail.batch_norm && (p.tail.vectors_are_fp32 || bytes_of_element(p.precision) == 4) &&
                    aligned({p.x, p.weight}, {p.in_channels});
  const int fitting = fits ? static_cast<int>(p.precision) : -1;
  if (p.variant) return &table().named(p.op, p.variant, {fitting});
  if (fitting < 0) return nullptr;
  return table().choose_measured(fitting, place, {p.batch, {{"pixels", p.pixels}, {"in_channels", p.in_channels}, {"out_channels", p.out_channels}}},
                                [&](const Tile& tile) { return blocks(p, tile); });
}

}  // namespace

bool merges_pool(const PointwiseProblem& p, Place place) { return chosen(p, place) != nullptr; }

void launch_merged_pool(const PointwiseProblem& p, Place place) {
  const Tile& tile = measured(p.op, chosen(p, place));
  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(p.op, tile, p.pixels > tile.rows ? std::to_string(p.pixels) + " pixels" : "in_channels " + std::to_string(p.in_channels));
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p.weight_scale, p.tail.vectors[0], p.out,
         int32_t(p.batch), int32_t(p.pixels), int32_t(p.out_channels), int32_t(p.in_channels), p.tail.low, p.tail.high);
}

}  // namespace effnet
