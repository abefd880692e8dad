// From checked sizes and addresses to what a kernel is asked: the same for a single op and for a step of a network.
#pragma once

#include <cmath>
#include <utility>

#include "arguments.h"
#include "kernels.h"

namespace effnet {

// The activation as a clamp.
inline std::pair<float, float> bounds(Activation activation) {
  constexpr float kInfinity = INFINITY;
  return {activation == Activation::none ? -kInfinity : 0.f, activation == Activation::relu6 ? 6.f : kInfinity};
}

inline Precision precision_of(ScalarType type, bool tf32) {
  switch (type) {
    case ScalarType::Half: return Precision::fp16;
    case ScalarType::BFloat16: return Precision::bf16;
    default: return tf32 ? Precision::tf32 : Precision::fp32;
  }
}

// Whether a depthwise weight (C, 1, k, k) lies tap by tap, the channels of each side by side.
inline bool is_taps_first(const Tensor& weight) {
  const auto sizes = weight.sizes(), strides = weight.strides();
  return strides[0] == 1 && strides[3] == sizes[0] && strides[2] == sizes[3] * sizes[0];
}

inline PointwiseProblem pointwise_problem(const char* op, Precision precision, const ConvShape& s, const void* x, const void* weight, void* out, const Tail& tail) {
  return {.op = op, .precision = precision, .channels_last = s.channels_last, .x = x, .weight = weight, .out = out, .batch = s.batch,
          .pixels = s.height * s.width, .in_channels = s.in_channels, .out_channels = s.out_channels, .tail = tail};
}

inline DepthwiseProblem depthwise_problem(const char* op, Precision precision, const ConvShape& s, const void* x, const void* weight, bool taps_first, void* out,
                                          const Tail& tail) {
  const auto& [stride, padding] = s.window;
  return {.op = op, .precision = precision, .channels_last = s.channels_last, .x = x, .weight = weight, .out = out, .batch = s.batch,
          .channels = s.in_channels, .height = s.height, .width = s.width, .out_height = s.out_height, .out_width = s.out_width, .kernel = s.kernel_height,
          .stride_y = stride[0], .stride_x = stride[1], .left = padding[0], .top = padding[2], .tail = tail, .taps_first = taps_first};
}

// channels_last is the output's; the strides are borrowed until the launch.
inline ConvProblem conv_problem(const char* op, Precision precision, const ConvShape& s, bool channels_last, const void* x, const int64_t* x_strides,
                                const void* weight, const int64_t* weight_strides, void* out, const Tail& tail) {
  const auto& [stride, padding] = s.window;
  return {.op = op, .precision = precision, .channels_last = channels_last, .x = x, .weight = weight, .out = out, .batch = s.batch,
          .in_channels = s.in_channels, .height = s.height, .width = s.width, .out_channels = s.out_channels, .out_height = s.out_height,
          .out_width = s.out_width, .kernel_y = s.kernel_height, .kernel_x = s.kernel_width, .stride_y = stride[0], .stride_x = stride[1],
          .left = padding[0], .top = padding[2], .x_strides = x_strides, .weight_strides = weight_strides, .tail = tail};
}

inline LinearProblem linear_problem(const char* op, Precision precision, const LinearShape& s, const void* x, const void* weight, void* out, const Tail& tail) {
  return {.op = op, .precision = precision, .x = x, .weight = weight, .out = out, .rows = s.rows, .in_features = s.in_features,
          .out_features = s.out_features, .tail = tail};
}

// Of this and the next the sizes alone; the caller adds the addresses.
inline ExpandDepthwiseProblem expand_depthwise_problem(const char* op, Precision precision, const ExpandDepthwiseShape& s, Activation activation) {
  const ConvShape& d = s.depthwise;
  const auto& [stride, padding] = d.window;
  const auto [low, high] = bounds(activation);
  return {.op = op, .precision = precision, .channels_last = d.channels_last, .batch = d.batch, .in_channels = s.expand.in_channels, .hidden = d.in_channels,
          .height = d.height, .width = d.width, .out_height = d.out_height, .out_width = d.out_width, .kernel = d.kernel_height, .stride_y = stride[0],
          .stride_x = stride[1], .left = padding[0], .top = padding[2], .low = low, .high = high};
}

inline MbconvProblem mbconv_problem(const char* op, Precision precision, const MbconvShape& s, Activation activation) {
  const ConvShape& d = s.depthwise;
  const auto& [stride, padding] = d.window;
  const auto [low, high] = bounds(activation);
  return {.op = op, .precision = precision, .channels_last = d.channels_last, .batch = d.batch, .in_channels = s.expand ? s.expand->in_channels : d.in_channels,
          .hidden = d.in_channels, .out_channels = s.project.out_channels, .height = d.height, .width = d.width, .out_height = d.out_height,
          .out_width = d.out_width, .kernel = d.kernel_height, .stride_y = stride[0], .stride_x = stride[1], .left = padding[0], .top = padding[2],
          .low = low, .high = high};
}

}  // namespace effnet
