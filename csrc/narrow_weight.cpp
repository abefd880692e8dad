// A weight in sixteen bits. Kernels: triton_src/narrow_weight.py.
#include "choice.h"

namespace effnet {
namespace {

const TileTable& table() {
  static const TileTable t("narrow_weight", 2, [](const Variant& v) { return v["taps_first"]; }, "block_m", "block_n");
  return t;
}

}  // namespace

void launch_narrow_weight(const NarrowWeightProblem& p, Place place) {
  const char* const dense = p.taps_first ? "rows" : "depth";
  if (!aligned({p.weight, p.out}, {p.taps_first ? p.rows : p.depth}))
    throw Error(Failure::invalid_argument, std::string("effnet::") + p.op + ": weight and out must lie on 16-byte boundaries and " + dense + " be a multiple of 8, got others");
  const int key = p.taps_first;
  const Tile& tile = p.variant ? table().named(p.op, p.variant, {key}) : table().choose(key, place, {1, {{"rows", p.rows}, {"depth", p.depth}}}, p.rows, 1, 1);
  launch(p.op, *tile.variant, place, ceil_div(p.rows, tile.rows), p.weight, p.out, p.scale, int32_t(p.rows), int32_t(p.depth));
}

}  // namespace effnet
