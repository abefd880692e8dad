// The computations on raw device memory: what a tensor op, or a caller without torch, asks of a kernel. Each function
// chooses a variant and launches it, asynchronously, on `place`; sizes and pointers are taken as checked.
#pragma once

#include <cstdint>

#include "launcher.h"

namespace effnet {

// Storage type and arithmetic. The order is the one of PRECISION_CODES in triton_src/_variant.py. The last four are TF32 with a
// narrow map (triton_src/_narrow.py), float16 that stands for float32 in [0, kMostNarrow]: as the result, on both sides, as x, and as
// x with a weight of launch_narrow_weight(). Of kernels for a whole block `narrow` are those with narrow maps between its steps.
enum class Precision { fp16, bf16, tf32, fp32, narrowing, narrow, widening, widening16 };

constexpr float kNarrowScale = 8192, kMostNarrow = 65504 / kNarrowScale;

// Of an element of vectors that are not float32 anyway, of a residual, and of all else that is not narrow.
inline int64_t bytes_of_element(Precision precision) { return precision == Precision::fp16 || precision == Precision::bf16 ? 2 : 4; }
inline int64_t bytes_of_x(Precision precision) {
  return precision == Precision::narrow || precision == Precision::widening || precision == Precision::widening16 ? 2 : bytes_of_element(precision);
}
inline int64_t bytes_of_weight(Precision precision) { return precision == Precision::widening16 ? 2 : bytes_of_element(precision); }
inline int64_t bytes_of_out(Precision precision) { return precision == Precision::narrowing || precision == Precision::narrow ? 2 : bytes_of_element(precision); }

// y = activation((accumulator - mean) / sqrt(var + eps) * weight + bias + residual), or with a bias alone.
struct Tail {
  const void* vectors[4] = {};  // batch norm's weight, bias, mean, var; or the bias in the first; or nothing
  bool batch_norm = false;
  bool vectors_are_fp32 = false;  // else they have x's type
  float eps = 0;
  float low, high;                // the activation as a clamp
  const void* residual = nullptr;
};

struct PointwiseProblem {
  const char* op;
  Precision precision;
  bool channels_last;
  const void *x, *weight;
  void* out;
  int64_t batch, pixels, in_channels, out_channels;  // pixels of one image
  Tail tail;
  const void* weight_scale = nullptr;  // of Precision::widening16 and launch_merged_pool(): a float32 an output channel, by which sums are multiplied
  const char* variant = nullptr;  // null: the library chooses
};

// Two 1x1 convolutions with nothing between them as one: out = second * first, out_bias = second * first_bias + second_bias, of
// second (rows, depth) and first (depth, columns). Weights as the precision says, fp16 or fp32; all else float32.
struct MergeWeightsProblem {
  const char* op;
  Precision precision;
  const void *first, *first_bias, *second, *second_bias;
  void *out, *out_bias;
  int64_t rows, depth, columns;
  const char* variant = nullptr;
};

// A weight (rows, depth) of float32 as Precision::widening16 takes it, and its rows' scales, in float32; or, of a depthwise step,
// taps first, as narrow blocks take it: both lie as (depth, rows).
struct NarrowWeightProblem {
  const char* op;
  const void* weight;
  void *out, *scale;
  int64_t rows, depth;
  bool taps_first = false;
  const char* variant = nullptr;
};

struct DepthwiseProblem {
  const char* op;
  Precision precision;
  bool channels_last;
  const void *x, *weight;
  void* out;
  int64_t batch, channels, height, width, out_height, out_width, kernel;
  int64_t stride_y, stride_x, left, top;
  Tail tail;
  bool taps_first = false;  // the weight lies as (kernel * kernel, channels), else as (channels, kernel * kernel)
  const char* variant = nullptr;
};

struct ConvProblem {
  const char* op;
  Precision precision;
  bool channels_last;  // of the output; the input and the weight are read through their strides
  const void *x, *weight;
  void* out;
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width, kernel_y, kernel_x;
  int64_t stride_y, stride_x, left, top;
  const int64_t *x_strides, *weight_strides;  // four each, in elements
  Tail tail;
  const char* variant = nullptr;
};

struct LinearProblem {
  const char* op;
  Precision precision;
  const void *x, *weight;
  void* out;
  int64_t rows, in_features, out_features;
  Tail tail;
  const char* variant = nullptr;
};

// depthwise(expand(x)), biases folded in, an activation after each.
struct ExpandDepthwiseProblem {
  const char* op;
  Precision precision;
  bool channels_last;
  const void* x;
  const void *expand_weight, *expand_bias;
  const void *depthwise_weight, *depthwise_bias;
  void* out;
  int64_t batch, in_channels, hidden, height, width, out_height, out_width, kernel;
  int64_t stride_y, stride_x, left, top;
  float low, high;                // the activation as a clamp
  bool vectors_are_fp32 = false;  // else the biases have x's type
  bool depthwise_taps_first = false;
  const void* expand_scale = nullptr;  // of launch_merged_depthwise(): as PointwiseProblem::weight_scale
  const char* variant = nullptr;       // of a kernel that computes both steps
};

// What launch_narrow_weight() makes of a block's weights, where that is kept; null where it is not.
struct NarrowWeights {
  const void *depthwise = nullptr, *depthwise_scale = nullptr;  // taps first
  const void *project = nullptr, *project_scale = nullptr;
};

// project(depthwise(expand(x))) + residual, biases folded in, activations after the first two. Where the expansion is one product with
// the projection of the block before, x is that block's filtered map, and in_channels are its hidden ones; where the projection is part
// of what follows, `out` is the filtered map. Such maps have sixteen bits: in TF32 they are narrow.
struct MbconvProblem {
  const char* op;
  Precision precision;
  bool channels_last;
  const void* x;
  const void *expand_weight, *expand_bias;  // without weight there is no such step, and hidden = in_channels
  const void *depthwise_weight, *depthwise_bias;
  const void *project_weight, *project_bias;  // without weight there is no such step
  const void* residual;
  void* out;
  int64_t batch, in_channels, hidden, out_channels, height, width, out_height, out_width, kernel;
  int64_t stride_y, stride_x, left, top;
  float low, high;                // the activation as a clamp
  bool vectors_are_fp32 = false;  // else the biases have x's type
  bool depthwise_taps_first = false;
  const void* expand_scale = nullptr;  // of an expansion that is one product with a projection: the weight is launch_narrow_weight()'s
  NarrowWeights narrow;
  const char* variant = nullptr;       // of a kernel that computes the whole block
};

// A convolution's weight and batch norm as one weight and one bias. The precisions say how weight and out are stored.
struct FoldBatchNormProblem {
  const char* op;
  Precision precision, out_precision;  // never TF32, which is stored as FP32
  const void* weight;
  void* out;
  void* out_bias;  // float32
  int64_t out_channels, in_channels, kernel_y, kernel_x;
  const int64_t* weight_strides;  // four, in elements
  Tail tail;                      // its batch norm
  bool taps_first = false;        // of a single input channel: out lies as (kernel_y * kernel_x, out_channels)
  const char* variant = nullptr;
};

void launch_pointwise(const PointwiseProblem& problem, Place place);
void launch_merge_weights(const MergeWeightsProblem& problem, Place place);
void launch_narrow_weight(const NarrowWeightProblem& problem, Place place);
void launch_pointwise_pool(const PointwiseProblem& problem, Place place);
void launch_depthwise(const DepthwiseProblem& problem, Place place);
void launch_conv(const ConvProblem& problem, Place place);
void launch_linear(const LinearProblem& problem, Place place);
void launch_fold_batch_norm(const FoldBatchNormProblem& problem, Place place);

// Everything in a workspace begins at a multiple of 256 bytes.
inline int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// How many bytes launch_expand_depthwise and launch_mbconv want to use between their kernels: 0 where one kernel does it all.
// Depends on no address but on whether addresses are aligned, and of the place on all but the stream. The workspace is aligned, too.
int64_t expand_depthwise_workspace(const ExpandDepthwiseProblem& problem, Place place);
void launch_expand_depthwise(const ExpandDepthwiseProblem& problem, void* workspace, Place place);
int64_t mbconv_workspace(const MbconvProblem& problem, Place place);
void launch_mbconv(const MbconvProblem& problem, void* workspace, Place place);

// Whether the filtered map of a block may be what the kernels of merged products read and write; aligned as for mbconv_workspace().
bool has_mergeable_map(const MbconvProblem& problem);

// Whether the library holds kernels for products that were made one.
bool has_merged_kernels();

// Of products that launch_merge_weights() and launch_narrow_weight() made one: expand_depthwise() and pointwise_pool() with maps of
// sixteen bits, in TF32 narrow ones. The precision is fp16 or tf32. Whether there is a kernel that measured better than two products, or
// which the caller named; and its launch.
bool merges_depthwise(const ExpandDepthwiseProblem& problem, Place place);
void launch_merged_depthwise(const ExpandDepthwiseProblem& problem, Place place);
bool merges_pool(const PointwiseProblem& problem, Place place);
void launch_merged_pool(const PointwiseProblem& problem, Place place);

// The same of a block whose expansion is such a product.
bool merges_beginning(const MbconvProblem& problem, Place place);

// A network's first convolution, then a block without expansion on its map, which is stem.out and block.x: neither is set.
struct StemMbconvProblem {
  ConvProblem stem;
  MbconvProblem block;
  const char* variant = nullptr;  // of a kernel that computes both
};

int64_t stem_mbconv_workspace(const StemMbconvProblem& problem, Place place);
void launch_stem_mbconv(const StemMbconvProblem& problem, void* workspace, Place place);

}  // namespace effnet
