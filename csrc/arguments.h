// What an op hands to its implementations: the arguments, checked once, and the sizes that were read on the way.
//
// The CPU and the CUDA implementation call the same check_*(); effnet_aot/ops/rules.py says the same words for the fake
// kernels, and tests/test_errors.py holds the three against each other.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace effnet {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

enum class Activation { none, relu, relu6 };

// "none", "relu" or "relu6"; anything else is an error that names `op`. Takes the handle over: an adapter that asked for
// std::string instead would lose 32 bytes a call, which torch's conversion (2.10 to 2.13) allocates and never frees.
Activation parse_activation(const char* op, StringHandle name);

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
  // The input's format, which the output takes over: NCHW where both readings hold; what is dense in neither goes by its
  // innermost dimension.
  bool channels_last;

  int64_t out_numel() const { return batch * out_channels * out_height * out_width; }
};

struct LinearShape {
  int64_t rows, in_features, out_features;
};

// Every check throws std::runtime_error "effnet::<op>: <what was expected>, got <what came>" and launches nothing.
// weight of a pointwise convolution is (C_out, C_in, 1, 1) or (C_out, C_in).
ConvShape check_pointwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue);
// The same for a result (batch, out_channels): no residual, and the convolution's output may be of any size.
ConvShape check_pointwise_pool(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue);
// weight (C, 1, k, k), k = 3 or 5; stride 1 or 2.
ConvShape check_depthwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const Window& window);
// weight (C_out, C_in, kernel_height, kernel_width), any kernel and stride.
ConvShape check_conv(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const Window& window);
// x (rows, in_features), weight (out_features, in_features), bias (out_features) or null.
LinearShape check_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor* bias);

// Whether t is dense in NCHW or in NHWC order as PyTorch defines it (sizes of 1 and empty tensors match both).
bool is_contiguous(const Tensor& t);
bool is_channels_last(const Tensor& t);

}  // namespace effnet
