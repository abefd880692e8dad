// A projection's weight in sixteen bits. Kernels: triton_src/narrow_weight.py.
#include "choice.h"

namespace effnet {
namespace {

const TileTable& table() {
  static const TileTable t("narrow_weight", 1, [](const Variant&) { return 0; }, "block_m", "block_n");
  return t;
}

}  // namespace

void launch_narrow_weight(const NarrowWeightProblem& p, Place place) {
  const bool is_aligned = aligned({p.weight, p.out}, {p.depth});
  if (!is_aligned) throw Error(Failure::invalid_argument, std::string("effnet::") + p.op + ": weight and out must lie on 16-byte boundaries and depth be a multiple of 8, got others");
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {0}) : table().choose(0, place, {1, {{"rows", p.rows}, {"depth", p.depth}}}, p.rows, 1, 1);
  launch(p.op, *tile.variant, place, ceil_div(p.rows, tile.rows), p.weight, p.out, p.scale, int32_t(p.rows), int32_t(p.depth));
}

}  // namespace effnet
