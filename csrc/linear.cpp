// Linear layer. Kernels: triton_src/linear.py.
#include "choice.h"

namespace effnet {
namespace {

int key(Precision precision, bool is_aligned) { return static_cast<int>(precision) * 2 + is_aligned; }

const TileTable& table() {
  static const TileTable t("linear", kPrecisions * 2, [](const Variant& v) { return key(Precision(v["precision"]), v["aligned"]); }, "block_m", "block_n");
  return t;
}

int64_t blocks(const LinearProblem& p, const Tile& tile) {
  const int64_t depth = (*tile.variant)["depth"];  // features at most; 0: any
  return depth > 0 && p.in_features > depth ? 0 : ceil_div(p.rows, tile.rows) * ceil_div(p.out_features, tile.columns);
}

}  // namespace

void launch_linear(const LinearProblem& p, Place place) {
  const bool is_aligned = aligned({p.x, p.weight, p.out}, {p.in_features, p.out_features});
  const int fitting = key(p.precision, is_aligned);
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {fitting, key(p.precision, false)})
                               : table().choose(fitting, place, {p.rows, {{"in_features", p.in_features}, {"out_features", p.out_features}}},
                                                [&](const Tile& t) { return blocks(p, t); }, area_of);
  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(p.op, tile, std::to_string(p.in_features) + " input features");
  const auto& [p0, p1, p2, p3] = p.tail.vectors;
  launch(p.op, *tile.variant, place, grid, p.x, p.weight, p0, p1, p2, p3, p.out,
         int32_t(p.rows), int32_t(p.out_features), int32_t(p.in_features), p.tail.eps, p.tail.low, p.tail.high, flags(p.tail));
}

}  // namespace effnet
