// A projection and the first two steps of the block behind it in one kernel. Kernels: triton_src/merged_depthwise.py.
#include "choice.h"

namespace effnet {
namespace {

int key(Precision precision, int64_t stride) { return static_cast<int>(precision) * 2 + (stride == 2); }

const TileTable& table() {
  static const TileTable t("merged_depthwise", kPrecisions * 2, [](const Variant& v) { return key(Precision(v["precision"]), v["stride"]); }, "pixels", "chunk");
  return t;
}

// What the kernels were promised at compile time.
bool fits_a_kernel(const ExpandDepthwiseProblem& p) {
  const bool biases = p.expand_bias && p.depthwise_bias && (p.vectors_are_fp32 || bytes_of_element(p.precision) == 4);
  return p.channels_last && biases && p.depthwise_taps_first && p.kernel == 3 && p.stride_y == p.stride_x &&
         aligned({p.x, p.expand_weight, p.expand_scale, p.expand_bias, p.depthwise_weight, p.depthwise_bias, p.out}, {p.in_channels, p.hidden});
}

int64_t band(const ExpandDepthwiseProblem& p, const Tile& tile) { return rows_of_band(p, tile.rows); }

// 0 where the variant does not fit.
int64_t blocks(const ExpandDepthwiseProblem& p, const Tile& tile) {
  const int64_t rows = fits_depth(tile, p.in_channels) ? band(p, tile) : 0;
  return rows == 0 ? 0 : ceil_div(p.batch, (*tile.variant)["images"]) * ceil_div(p.out_height, rows) * ceil_div(p.hidden, tile.columns);
}

const Tile* chosen(const ExpandDepthwiseProblem& p, Place place) {
  const int fitting = fits_a_kernel(p) ? key(p.precision, p.stride_y) : -1;
  if (p.variant) return &table().named(p.op, p.variant, {fitting});
  if (fitting < 0) return nullptr;
  return table().choose_measured(fitting, place,
                                {p.batch, {{"height", p.height}, {"width", p.width}, {"in_channels", p.in_channels}, {"hidden", p.hidden}, {"kernel", p.kernel}, {"stride", p.stride_y}}},
                                [&](const Tile& tile) { return blocks(p, tile); });
}

}  // namespace

bool merges_depthwise(const ExpandDepthwiseProblem& p, Place place) { return chosen(p, place) != nullptr; }

void launch_merged_depthwise(const ExpandDepthwiseProblem& p, Place place) {
  const Tile& tile = measured(p.op, chosen(p, place));
  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(p.op, tile, fits_depth(tile, p.in_channels) ? "rows of " + std::to_string(p.width) + " pixels" : "in_channels " + std::to_string(p.in_channels));
  launch(p.op, *tile.variant, place, grid, p.x, p.expand_weight, p.expand_scale, p.expand_bias, p.depthwise_weight, p.depthwise_bias, p.out,
         int32_t(p.batch), int32_t(p.in_channels), int32_t(p.hidden), int32_t(p.height), int32_t(p.width), int32_t(p.out_height), int32_t(p.out_width), int32_t(band(p, tile)),
         int32_t(p.left), int32_t(p.top), p.low, p.high);
}

}  // namespace effnet
