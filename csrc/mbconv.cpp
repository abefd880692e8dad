// A whole MBConv block: in one kernel where there is one for it (triton_src/mbconv.py), else expand_depthwise or depthwise and the
// projection, with the maps between them in a workspace.
#include <cmath>

#include "choice.h"

namespace effnet {
namespace {

// Whether the kernels that read and write hidden maps of sixteen bits serve the block.
bool is_aligned(const MbconvProblem& p) {
  return p.channels_last && p.expand_weight && p.stride_y == p.stride_x &&
         aligned({p.x, p.expand_weight, p.depthwise_weight, p.project_weight, p.residual, p.out}, {p.in_channels, p.hidden, p.out_channels});
}

// Whether nothing is lost to TF32 where hidden maps are narrow.
bool may_be_narrow(const MbconvProblem& p) { return p.precision == Precision::tf32 && p.low == 0 && p.high <= kMostNarrow; }

// Whether the hidden maps of several kernels are: where there are kernels for it, too.
bool has_narrow_maps(const MbconvProblem& p) { return may_be_narrow(p) && is_aligned(p); }

// The precision of the kernels in front of the projection, and its own.
Precision hidden_precision(const MbconvProblem& p) { return has_narrow_maps(p) ? Precision::narrowing : p.precision; }

// Making the weight narrow is a kernel more, which many pixels make up for. Where it is kept, there are no kernels for few of them either.
Precision projection_precision(const MbconvProblem& p, Place place) {
  constexpr int64_t kManyPixels = 4096;
  if (!has_narrow_maps(p)) return p.precision;
  return p.batch * place.lanes * p.out_height * p.out_width >= kManyPixels ? Precision::widening16 : Precision::widening;
}

ExpandDepthwiseProblem expand_depthwise(const MbconvProblem& p, void* filtered) {
  return {.op = p.op, .precision = p.expand_scale ? p.precision : hidden_precision(p), .channels_last = p.channels_last, .x = p.x, .expand_weight = p.expand_weight, .expand_bias = p.expand_bias,
          .depthwise_weight = p.depthwise_weight, .depthwise_bias = p.depthwise_bias, .out = filtered, .batch = p.batch, .in_channels = p.in_channels,
          .hidden = p.hidden, .height = p.height, .width = p.width, .out_height = p.out_height, .out_width = p.out_width, .kernel = p.kernel,
          .stride_y = p.stride_y, .stride_x = p.stride_x, .left = p.left, .top = p.top, .low = p.low, .high = p.high,
          .vectors_are_fp32 = p.vectors_are_fp32, .depthwise_taps_first = p.depthwise_taps_first, .expand_scale = p.expand_scale};
}

// The steps in front of the projection.
int64_t beginning_workspace(const MbconvProblem& p, Place place) { return p.expand_scale ? 0 : expand_depthwise_workspace(expand_depthwise(p, nullptr), place); }

void launch_beginning(const MbconvProblem& p, void* filtered, void* workspace, Place place) {
  const ExpandDepthwiseProblem beginning = expand_depthwise(p, filtered);
  p.expand_scale ? launch_merged_depthwise(beginning, place) : launch_expand_depthwise(beginning, workspace, place);
}

// What the workspace holds, one after the other: the expanded map, if there is one in memory, the filtered one, and a narrow weight.
struct Maps {
  Maps(const MbconvProblem& p, Place place) : projection(projection_precision(p, place)) {
    if (p.expand_weight) filtered = padded(beginning_workspace(p, place));
    bytes = filtered + p.batch * p.hidden * p.out_height * p.out_width * bytes_of_out(hidden_precision(p));
    if (projection != Precision::widening16 || p.narrow.project) return;
    weight = padded(bytes);
    scale = weight + padded(p.out_channels * p.hidden * bytes_of_weight(Precision::widening16));
    bytes = scale + p.out_channels * int64_t{sizeof(float)};
  }
  Precision projection;
  int64_t filtered = 0, weight = 0, scale = 0, bytes;  // where those start, and how much all take
};

Tail tail_of(const MbconvProblem& p, const void* bias, float low, float high) {
  Tail tail{.vectors_are_fp32 = p.vectors_are_fp32, .low = low, .high = high};
  tail.vectors[0] = bias;
  return tail;
}

void launch_unfused(const MbconvProblem& p, void* workspace, Place place) {
  const Maps maps(p, place);
  char *const base = static_cast<char*>(workspace), *const filtered = base + maps.filtered;
  constexpr float kInfinity = INFINITY;
  const void *weight = p.project_weight, *scale = nullptr;
  if (maps.projection == Precision::widening16 && p.narrow.project) {
    weight = p.narrow.project, scale = p.narrow.project_scale;
  } else if (maps.projection == Precision::widening16) {
    weight = base + maps.weight, scale = base + maps.scale;
    launch_narrow_weight({.op = p.op, .weight = p.project_weight, .out = base + maps.weight, .scale = base + maps.scale, .rows = p.out_channels, .depth = p.hidden}, place);
  }
  if (p.expand_weight)
    launch_beginning(p, filtered, workspace, place);
  else
    launch_depthwise({.op = p.op, .precision = p.precision, .channels_last = p.channels_last, .x = p.x, .weight = p.depthwise_weight, .out = filtered,
                      .batch = p.batch, .channels = p.hidden, .height = p.height, .width = p.width, .out_height = p.out_height, .out_width = p.out_width,
                      .kernel = p.kernel, .stride_y = p.stride_y, .stride_x = p.stride_x, .left = p.left, .top = p.top,
                      .tail = tail_of(p, p.depthwise_bias, p.low, p.high), .taps_first = p.depthwise_taps_first}, place);

  Tail tail = tail_of(p, p.project_bias, -kInfinity, kInfinity);
  tail.residual = p.residual;
  launch_pointwise({.op = p.op, .precision = maps.projection, .channels_last = p.channels_last, .x = filtered,
                    .weight = weight, .out = p.out, .batch = p.batch, .pixels = p.out_height * p.out_width,
                    .in_channels = p.hidden, .out_channels = p.out_channels, .tail = tail, .weight_scale = scale}, place);
}

// ---- in one kernel ----

constexpr int kMaxInChannels = 64;

int key(Precision precision, bool expand, int64_t in_channels, int64_t stride) {
  return ((static_cast<int>(precision) * 2 + expand) * 2 + (stride == 2)) * kMaxInChannels + static_cast<int>(in_channels);
}

const TileTable& table() {
  static const TileTable t("mbconv", kPrecisions * 4 * kMaxInChannels,
                           [](const Variant& v) { return key(Precision(v["precision"]), v["expand"], v["in_channels"], v["stride"]); }, "block_m", "columns");
  return t;
}

// What the kernels were promised at compile time.
bool fits_a_kernel(const MbconvProblem& p) {
  const bool biases = p.depthwise_bias && p.project_bias && (p.expand_bias || !p.expand_weight) && (p.vectors_are_fp32 || bytes_of_element(p.precision) == 4);
  // Every window reaches into the image, so that any pixel of its border may stand for those outside.
  const bool reaches = p.left <= 2 && p.top <= 2 && p.stride_y * (p.out_height - 1) - p.top < p.height && p.stride_x * (p.out_width - 1) - p.left < p.width;
  return reaches && p.channels_last && biases && p.depthwise_taps_first && p.kernel == 3 && p.stride_y == p.stride_x && p.low == 0 && std::isfinite(p.high) &&
         p.in_channels < kMaxInChannels && p.hidden == (p.expand_weight ? 6 * p.in_channels : p.in_channels) &&
         aligned({p.x, p.expand_weight, p.expand_bias, p.depthwise_weight, p.depthwise_bias, p.project_weight, p.project_bias, p.residual, p.out}, {p.out_channels});
}

int64_t blocks(const MbconvProblem& p, const Tile& tile) {
  if (tile.columns < p.out_channels) return 0;
  if (p.expand_weight) return ceil_div(p.batch * p.out_height * p.out_width, tile.rows);
  return ceil_div(p.batch * p.out_width, tile.rows) * ceil_div(p.out_height, (*tile.variant)["steps"]);
}

// Whether its maps may be narrow: the weights for that are there.
bool has_narrow_kernels(const MbconvProblem& p) {
  const NarrowWeights& n = p.narrow;
  return may_be_narrow(p) && n.depthwise && n.project && aligned({n.depthwise, n.depthwise_scale, n.project, n.project_scale}, {});
}

// The tile of the kernel that computes the block; null where several kernels are better, or there is none.
const Tile* fused(const MbconvProblem& p, Place place) {
  if (p.expand_scale || !p.project_weight) return nullptr;
  const auto key_of = [&](Precision precision) { return key(precision, p.expand_weight, p.in_channels, p.stride_y); };
  const bool fits = fits_a_kernel(p);
  const int fitting = fits ? key_of(p.precision) : -1, narrow = fits && has_narrow_kernels(p) ? key_of(Precision::narrow) : -1;
  if (p.variant) return &table().named(p.op, p.variant, {narrow, fitting});
  if (fitting < 0) return nullptr;
  const Shape shape{p.batch, {{"height", p.height}, {"width", p.width}, {"in_channels", p.in_channels}, {"hidden", p.hidden}, {"out_channels", p.out_channels},
                              {"stride", p.stride_y}, {"residual", p.residual != nullptr}}};
  const auto blocks_of = [&](const Tile& tile) { return blocks(p, tile); };
  if (const Tile* tile = narrow < 0 ? nullptr : table().choose_measured(narrow, place, shape, blocks_of)) return tile;
  const auto by_rule = [&] {
    const int multiprocessors = device_info(place.device).multiprocessors;
    // With few pixels the warps of a block share them and split the hidden channels.
    const bool few = ceil_div(p.batch * p.out_height * p.out_width, 16) < 3 * multiprocessors;
    if (p.expand_weight)  // the narrowest projection
      return table().find(fitting, 1, [&](const Tile& tile) { return int64_t{blocks(p, tile) > 0}; },
                          [&](const Tile& tile) { return int64_t{4096} * tile.columns + (few ? 1024 - (*tile.variant)["chunk"] : (*tile.variant)["chunk"]); });
    // Rows walked against blocks that run at once, some twelve a multiprocessor.
    return table().find(fitting, 12 * multiprocessors, [&](const Tile& tile) { return blocks(p, tile); },
                        [&](const Tile& tile) { return int64_t{2048} * ((*tile.variant)["steps"] + 1) + tile.columns; });
  };
  return table().choose_or_none(fitting, place, shape, blocks_of, by_rule);
}

void launch_fused(const MbconvProblem& p, const Tile& tile, Place place) {
  const int64_t grid = blocks(p, tile);
  if (grid == 0) refuse(p.op, tile, std::to_string(p.out_channels) + " output channels");
  const auto with = [&](auto... weights) {
    launch(p.op, *tile.variant, place, grid, p.x, p.expand_weight, p.expand_bias, weights..., p.project_bias, p.residual, p.out,
           int32_t(p.batch), int32_t(p.height), int32_t(p.width), int32_t(p.out_height), int32_t(p.out_width), int32_t(p.out_channels), int32_t(p.left), int32_t(p.top),
           p.high, flags({.residual = p.residual}));
  };
  if (Precision((*tile.variant)["precision"]) == Precision::narrow)
    with(p.narrow.depthwise, p.narrow.depthwise_scale, p.depthwise_bias, p.narrow.project, p.narrow.project_scale);
  else
    with(p.depthwise_weight, p.depthwise_bias, p.project_weight);
}

}  // namespace

bool has_mergeable_map(const MbconvProblem& p) { return has_narrow_maps(p) || (p.precision == Precision::fp16 && is_aligned(p)); }

bool merges_beginning(const MbconvProblem& p, Place place) { return merges_depthwise(expand_depthwise(p, nullptr), place); }

int64_t mbconv_workspace(const MbconvProblem& p, Place place) {
  if (!p.project_weight) return beginning_workspace(p, place);
  return fused(p, place) ? 0 : Maps(p, place).bytes;
}

void launch_mbconv(const MbconvProblem& p, void* workspace, Place place) {
  if (!p.project_weight) return launch_beginning(p, p.out, workspace, place);
  if (const Tile* tile = fused(p, place)) return launch_fused(p, *tile, place);
  launch_unfused(p, workspace, place);
}

}  // namespace effnet
