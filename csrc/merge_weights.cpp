// Two weights as one. Kernels: triton_src/merge_weights.py.
#include "choice.h"

namespace effnet {
namespace {

const TileTable& table() {
  static const TileTable t("merge_weights", kPrecisions, [](const Variant& v) { return v["precision"]; }, "block_m", "block_n");
  return t;
}

}  // namespace

bool has_merged_kernels() {
  static const bool has = std::ranges::any_of(variants(), [](const Variant& v) { return std::string_view(v.op).starts_with("merged_"); });
  return has;
}

void launch_merge_weights(const MergeWeightsProblem& p, Place place) {
  const int key = static_cast<int>(p.precision);
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {key})
                               : table().choose(key, place, {1, {{"rows", p.rows}, {"depth", p.depth}, {"columns", p.columns}}}, p.rows, p.columns, 1);
  launch(p.op, *tile.variant, place, ceil_div(p.rows, tile.rows) * ceil_div(p.columns, tile.columns), p.first, p.first_bias, p.second, p.second_bias, p.out, p.out_bias,
         int32_t(p.rows), int32_t(p.depth), int32_t(p.columns));
}

}  // namespace effnet
