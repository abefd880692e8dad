// A network's first convolution and the block that follows it: in one kernel where there is one for them
// (triton_src/stem_mbconv.py), else one after the other with the stem's map in a workspace.
#include "choice.h"

namespace effnet {
namespace {

// ---- one after the other ----

// The stem's map begins the workspace, and the block's own follows.
int64_t map_bytes(const StemMbconvProblem& p) {
  const MbconvProblem& b = p.block;
  return padded(b.batch * b.in_channels * b.height * b.width * bytes_of_element(b.precision));
}

MbconvProblem block_of(const StemMbconvProblem& p, const void* map) {
  MbconvProblem block = p.block;
  block.x = map;
  return block;
}

void launch_unfused(const StemMbconvProblem& p, void* workspace, Place place) {
  ConvProblem stem = p.stem;
  stem.out = workspace;
  launch_conv(stem, place);
  launch_mbconv(block_of(p, workspace), static_cast<char*>(workspace) + map_bytes(p), place);
}

// ---- in one kernel ----

int key(Precision precision, bool paired) { return static_cast<int>(precision) * 2 + paired; }

const TileTable& table() {
  static const TileTable t("stem_mbconv", kPrecisions * 2, [](const Variant& v) { return key(Precision(v["precision"]), v["paired"]); }, "strips", "columns");
  return t;
}

// What the kernels were promised at compile time.
bool fits_a_kernel(const StemMbconvProblem& p) {
  const ConvProblem& s = p.stem;
  const MbconvProblem& b = p.block;
  const bool wide = bytes_of_element(s.precision) == 4;
  const bool stem = s.channels_last && s.kernel_y == 3 && s.kernel_x == 3 && s.stride_y == 2 && s.stride_x == 2 && s.in_channels <= 3 && s.out_channels == 32 &&
                    s.tail.low == 0 && !s.tail.batch_norm && !s.tail.residual && s.tail.vectors[0] && (s.tail.vectors_are_fp32 || wide);
  const bool biases = b.depthwise_bias && b.project_bias && (b.vectors_are_fp32 || wide);
  // Every window reaches into the map.
  const bool reaches = b.left <= 2 && b.top <= 2 && b.out_height - 1 - b.top < b.height && b.out_width - 1 - b.left < b.width;
  const bool block = b.channels_last && !b.expand_weight && !b.residual && biases && reaches && b.depthwise_taps_first && b.kernel == 3 && b.stride_y == 1 && b.stride_x == 1 && b.low == 0;
  return stem && block && aligned({s.tail.vectors[0], b.depthwise_weight, b.depthwise_bias, b.project_weight, b.project_bias, b.out}, {b.out_channels});
}

// Whether two neighbouring columns of the picture, the first of them an even one, are one aligned load, and in the picture
// wherever the stem has a pixel.
bool is_paired(const ConvProblem& s) {
  if (s.left > 1 || 2 * (s.out_width - 1) + 1 >= s.width) return false;
  const int64_t* strides = s.x_strides;
  const int64_t even = (s.batch > 1 ? strides[0] : 0) | (s.in_channels > 1 ? strides[1] : 0) | strides[2] | s.width;
  return strides[3] == 1 && even % 2 == 0 && reinterpret_cast<uintptr_t>(s.x) % (2 * bytes_of_element(s.precision)) == 0;
}

constexpr int64_t kStripWidth = 14;  // columns of the output that a warp computes, as in the kernel

int64_t blocks(const StemMbconvProblem& p, const Tile& tile) {
  const MbconvProblem& b = p.block;
  if (tile.columns < b.out_channels) return 0;
  return ceil_div(b.batch * ceil_div(b.out_width, kStripWidth), tile.rows) * ceil_div(b.out_height, (*tile.variant)["steps"]);
}

// The tile of the kernel that computes both; null where two are better, or there is none.
const Tile* fused(const StemMbconvProblem& p, Place place) {
  const int strided = fits_a_kernel(p) ? key(p.stem.precision, false) : -1;
  const int fitting = strided >= 0 && is_paired(p.stem) ? key(p.stem.precision, true) : strided;
  if (p.variant) return &table().named(p.block.op, p.variant, {fitting, strided});
  if (fitting < 0) return nullptr;
  const auto by_rule = [&] {
    // Rows walked, two of them before the first result, against warps that run at once, some eight a multiprocessor.
    return table().find(fitting, 8 * device_info(place.device).multiprocessors, [&](const Tile& tile) { return blocks(p, tile) * tile.rows; },
                        [&](const Tile& tile) { return int64_t{2048} * ((*tile.variant)["steps"] + 2) + tile.columns; });
  };
  const ConvProblem& s = p.stem;
  return table().choose_or_none(fitting, place,
                                {s.batch, {{"paired", is_paired(s)}, {"in_channels", s.in_channels}, {"height", s.height}, {"width", s.width}, {"out_channels", p.block.out_channels}}},
                                [&](const Tile& tile) { return blocks(p, tile); }, by_rule);
}

void launch_fused(const StemMbconvProblem& p, const Tile& tile, Place place) {
  const ConvProblem& s = p.stem;
  const MbconvProblem& b = p.block;
  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(b.op, tile, std::to_string(b.out_channels) + " output channels");
  const int64_t *xs = s.x_strides, *ws = s.weight_strides;
  // Strides that nothing is multiplied with may be anything, but the kernel was promised even ones.
  const int64_t image = s.batch > 1 ? xs[0] : 0, channel = s.in_channels > 1 ? xs[1] : 0;
  launch(b.op, *tile.variant, place, grid, s.x, s.weight, s.tail.vectors[0], b.depthwise_weight, b.depthwise_bias, b.project_weight, b.project_bias, b.out,
         int32_t(s.batch), int32_t(s.in_channels), int32_t(s.height), int32_t(s.width), int32_t(s.out_height), int32_t(s.out_width), int32_t(b.out_height), int32_t(b.out_width),
         int32_t(b.out_channels), int32_t(image), int32_t(channel), int32_t(xs[2]), int32_t(xs[3]), int32_t(ws[0]), int32_t(ws[1]), int32_t(ws[2]), int32_t(ws[3]),
         int32_t(s.left), int32_t(s.top), int32_t(b.left), int32_t(b.top), s.tail.high, b.high);
}

}  // namespace

int64_t stem_mbconv_workspace(const StemMbconvProblem& p, Place place) {
  if (fused(p, place)) return 0;
  return map_bytes(p) + mbconv_workspace(block_of(p, nullptr), place);  // null is as aligned as the map
}

void launch_stem_mbconv(const StemMbconvProblem& p, void* workspace, Place place) {
  if (const Tile* tile = fused(p, place)) return launch_fused(p, *tile, place);
  launch_unfused(p, workspace, place);
}

}  // namespace effnet
