// What an op hands to its implementations: the arguments, checked once, and the sizes that were read on the way.
//
// The CPU and the CUDA implementation call the same check_*(); effnet_aot/ops/rules.py says the same words for the fake
// kernels, and tests/test_errors.py holds the three against each other.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace effnet {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

enum class Activation { none, relu, relu6 };

// "none", "relu" or "relu6"; anything else is an error that names `op`. Takes the handle over: an adapter that asked for
// std::string instead would lose 32 bytes a call, which torch's conversion (2.10 to 2.13) allocates and never frees.
Activation parse_activation(const char* op, StringHandle name, const char* argument = "activation");

// What follows a convolution's accumulator, channel by channel: batch norm with running statistics (all four vectors)
// or a bias (or neither), then the residual, then the activation. Null where absent. Borrowed, never owned.
struct Epilogue {
  const Tensor* bn_weight = nullptr;
  const Tensor* bn_bias = nullptr;
  const Tensor* bn_mean = nullptr;
  const Tensor* bn_var = nullptr;
  double eps = 0;
  const Tensor* bias = nullptr;
  const Tensor* residual = nullptr;
  Activation activation = Activation::none;

  bool has_batch_norm() const { return bn_weight != nullptr; }
};

// Stride as (vertical, horizontal) and zero padding as (left, right, top, bottom).
struct Window {
  std::array<int64_t, 2> stride{1, 1};
  std::array<int64_t, 4> padding{0, 0, 0, 0};
};

// The sizes of a 2-D convolution, and the memory format of its output.
struct ConvShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_height, kernel_width, out_height, out_width;
  Window window;
  bool channels_last;  // the input's format, which the output takes over

  std::array<int64_t, 4> out_sizes() const { return {batch, out_channels, out_height, out_width}; }
  int64_t out_numel() const { return batch * out_channels * out_height * out_width; }
};

struct LinearShape {
  int64_t rows, in_features, out_features;
};

// A convolution's weight, of two dimensions or four, and what folding makes of it.
struct FoldShape {
  int64_t out_channels, in_channels, kernel_height, kernel_width;
  int rank;
  ScalarType dtype, bias_dtype;
  bool taps_first;

  std::array<int64_t, 4> sizes() const { return {out_channels, in_channels, kernel_height, kernel_width}; }
  int64_t elements() const { return in_channels * kernel_height * kernel_width; }  // of a channel
  // Of the folded weight; the first `rank` count.
  std::array<int64_t, 4> strides() const {
    if (taps_first) return {1, elements() * out_channels, kernel_width * out_channels, out_channels};
    return {elements(), kernel_height * kernel_width, kernel_width, 1};
  }
};

struct ExpandDepthwiseShape {
  ConvShape expand, depthwise;
};

// A block's three convolutions. Without expand step the first is not there.
struct MbconvShape {
  std::optional<ConvShape> expand;
  ConvShape depthwise, project;
};

// A network's first convolution, and a block without expansion on its map. The first's channels_last is the whole's format.
struct StemMbconvShape {
  ConvShape stem;
  MbconvShape block;
};

// What the checks need to know of a tensor, read once: of one that is there, or of one that is still to be computed, in
// x's type and on its device. `name` is the argument's name in the schema.
struct Meta {
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  Meta(const char* name, const Tensor& t);
  Meta(const char* name, Sizes sizes, const Meta& like) : name(name), sizes(sizes), dtype(like.dtype), device_type(like.device_type), device_index(like.device_index) {}

  const char* name;
  Sizes sizes;
  int32_t dtype, device_type, device_index;

  bool on_cuda() const;
  std::string dtype_text() const;
  std::string device_text() const;
};

// A convolution's tensors as the checks see them.
struct ConvOperands {
  Meta x;
  bool channels_last;  // x's format
  Meta weight;
  std::optional<Meta> bias, residual;
  const Epilogue* batch_norm = nullptr;
  const char* out_name = "the output";
};

struct ExpandDepthwiseOperands {
  Meta x;
  bool channels_last;
  Meta expand_weight;
  std::optional<Meta> expand_bias;
  Meta depthwise_weight;
  std::optional<Meta> depthwise_bias;
};

struct MbconvOperands {
  Meta x;
  bool channels_last;
  std::optional<Meta> expand_weight, expand_bias;
  Meta depthwise_weight;
  std::optional<Meta> depthwise_bias;
  Meta project_weight;
  std::optional<Meta> project_bias, residual;
};

inline constexpr const char* kStemMap = "the stem's map";  // in errors

struct StemMbconvOperands {
  ConvOperands stem;
  MbconvOperands block;  // its x is the stem's map, and still to be filled in
};

// The tensors of the first two steps of an MBConv block with biases folded in. Null where absent; borrowed.
struct ExpandDepthwise {
  const Tensor* expand_weight;
  const Tensor* expand_bias = nullptr;
  const Tensor* depthwise_weight;
  const Tensor* depthwise_bias = nullptr;
  Activation activation = Activation::none;  // after each
  Window window;
};

// The tensors of a whole MBConv block with biases folded in. Null where absent; borrowed.
struct Mbconv {
  const Tensor* expand_weight = nullptr;
  const Tensor* expand_bias = nullptr;
  const Tensor* depthwise_weight;
  const Tensor* depthwise_bias = nullptr;
  const Tensor* project_weight;
  const Tensor* project_bias = nullptr;
  const Tensor* residual = nullptr;
  Activation activation = Activation::none;  // after expand and after depthwise
  Window window;
};

// The tensors of a stem and the block on its map; the latter has no expansion and no residual.
struct StemMbconv {
  const Tensor* stem_weight;
  const Tensor* stem_bias = nullptr;
  Activation stem_activation = Activation::none;
  Window stem_window;
  Mbconv block;
  std::optional<bool> channels_last;  // the result's format; none: x's
};

// Every check throws std::runtime_error "effnet::<op>: <what was expected>, got <what came>" and launches nothing.
[[noreturn]] void fail(const char* op, const std::string& expected, const std::string& actual);

// weight of a pointwise convolution is (C_out, C_in, 1, 1) or (C_out, C_in). Pooled, the result is (batch, out_channels):
// there is no residual, and the convolution's output may be of any size.
ConvShape check_pointwise(const char* op, const ConvOperands& operands, bool pooled = false);
// weight (C, 1, k, k), k = 3 or 5; stride 1 or 2.
ConvShape check_depthwise(const char* op, const ConvOperands& operands, const Window& window);
// weight (C_out, C_in, kernel_height, kernel_width), any kernel and stride.
ConvShape check_conv(const char* op, const ConvOperands& operands, const Window& window);
// The map between the convolutions must be indexable too, whether or not a kernel stores it. Biases have one type.
ExpandDepthwiseShape check_expand_depthwise(const char* op, const ExpandDepthwiseOperands& operands, const Window& window);
// The maps between the three convolutions must be indexable too, whether or not a kernel stores them. Biases have one type.
MbconvShape check_mbconv(const char* op, const MbconvOperands& operands, const Window& window);
// The stem as a convolution, the block as a block; the map between them is held to the same limits.
StemMbconvShape check_stem_mbconv(const char* op, const StemMbconvOperands& operands, const Window& stem_window, const Window& window);
// x (rows, in_features), weight (out_features, in_features), bias (out_features).
LinearShape check_linear(const char* op, const Meta& x, const Meta& weight, const std::optional<Meta>& bias);

// weight (C_out, C_in, k_h, k_w) or (C_out, C_in); dtype null: the weight's.
FoldShape check_fold_batch_norm(const char* op, const Meta& weight, const Epilogue& batch_norm, std::optional<ScalarType> dtype, bool taps_first);

// torch's number of a dtype, which Meta has.
int32_t code_of(ScalarType dtype);

ConvOperands operands(const Tensor& x, const Tensor& weight, const Epilogue& epilogue);
ExpandDepthwiseOperands operands(const Tensor& x, const ExpandDepthwise& beginning);
MbconvOperands operands(const Tensor& x, const Mbconv& block);
StemMbconvOperands operands(const Tensor& x, const StemMbconv& both);
std::optional<Meta> optional_meta(const char* name, const Tensor* t);

// The format that a result takes over from x: NCHW where both readings hold; what is dense in neither goes by its innermost
// dimension.
bool prefers_channels_last(const Tensor& x);

// Whether t is dense in NCHW or in NHWC order as PyTorch defines it (sizes of 1 and empty tensors match both).
bool is_contiguous(const Tensor& t);
bool is_channels_last(const Tensor& t);
// The kernels count in 32 bits. Dense tensors are checked; a small view into a huge tensor may reach too far.
bool is_reachable(const Tensor& t);

}  // namespace effnet
