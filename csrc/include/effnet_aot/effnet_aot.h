// The ops as functions on at::Tensor. Header-only: every call goes through torch's dispatcher, as torch.ops.effnet.* does,
// so the tensors' device chooses the implementation and a program's torch may be any from 2.10 on.
//
//   at::Tensor y = effnet::pointwise(x, weight, bias, /*residual=*/std::nullopt, "relu6");
//
// What an op computes, and the defaults, are those of csrc/ops.cpp; padding is {left, right, top, bottom}. A bad argument
// throws, with the text that Python shows. Gradients and autocast live in the Python package: call inside
// c10::InferenceMode, or with tensors that need no gradient.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "introspection.h"  // kernels(), build_info(), device_image(device), preload(device)

namespace effnet {

using OptionalTensor = std::optional<at::Tensor>;
using Stride = std::array<int64_t, 2>;   // rows, columns
using Padding = std::array<int64_t, 4>;  // left, right, top, bottom

namespace detail {

using T = const at::Tensor&;
using O = const OptionalTensor&;
using BatchNorm = at::Tensor(T, T, T, T, T, T, double);
using BatchNormResidual = at::Tensor(T, T, T, T, T, T, double, O);
using BatchNormWindow = at::Tensor(T, T, T, T, T, T, double, at::IntArrayRef, at::IntArrayRef);
using Linear = at::Tensor(T, T, T);
using Pointwise = at::Tensor(T, T, O, O, std::string_view);
using Depthwise = at::Tensor(T, T, O, at::IntArrayRef, at::IntArrayRef, std::string_view);
using Conv = at::Tensor(T, T, O, at::IntArrayRef, at::IntArrayRef, std::string_view, std::optional<at::MemoryFormat>);
using PointwisePool = at::Tensor(T, T, O, std::string_view);
using FoldedLinear = at::Tensor(T, T, O);
using ExpandDepthwise = at::Tensor(T, T, O, T, O, at::IntArrayRef, at::IntArrayRef, std::string_view);
using Mbconv = at::Tensor(T, O, O, T, O, T, O, O, at::IntArrayRef, at::IntArrayRef, std::string_view);
using FoldBatchNorm = std::tuple<at::Tensor, at::Tensor>(T, T, T, T, T, double, std::optional<at::ScalarType>, bool);
using StemMbconv = at::Tensor(T, T, O, T, O, T, O, at::IntArrayRef, at::IntArrayRef, std::string_view, at::IntArrayRef, at::IntArrayRef, std::string_view,
                              std::optional<at::MemoryFormat>);
using Network = at::Tensor(T, at::TensorList, at::IntArrayRef);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

}  // namespace detail

// Convolution and batch norm with running statistics.

inline at::Tensor pointwise_bn(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
                               const at::Tensor& bn_mean, const at::Tensor& bn_var, double eps = 1e-5, const OptionalTensor& residual = std::nullopt) {
  static const auto op = detail::find<detail::BatchNormResidual>("effnet::pointwise_bn");
  return op.call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, residual);
}

inline at::Tensor pointwise_bn_relu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
                                    const at::Tensor& bn_mean, const at::Tensor& bn_var, double eps = 1e-5) {
  static const auto op = detail::find<detail::BatchNorm>("effnet::pointwise_bn_relu");
  return op.call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps);
}

inline at::Tensor pointwise_bn_relu6(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
                                     const at::Tensor& bn_mean, const at::Tensor& bn_var, double eps = 1e-5) {
  static const auto op = detail::find<detail::BatchNorm>("effnet::pointwise_bn_relu6");
  return op.call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps);
}

// ... and the mean over each image: (batch, out_channels).
inline at::Tensor pointwise_bn_relu_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
                                         const at::Tensor& bn_mean, const at::Tensor& bn_var, double eps = 1e-5) {
  static const auto op = detail::find<detail::BatchNorm>("effnet::pointwise_bn_relu_pool");
  return op.call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps);
}

inline at::Tensor depthwise_bn_relu6(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
                                     const at::Tensor& bn_mean, const at::Tensor& bn_var, double eps = 1e-5, const Stride& stride = {1, 1},
                                     const Padding& padding = {1, 1, 1, 1}) {
  static const auto op = detail::find<detail::BatchNormWindow>("effnet::depthwise_bn_relu6");
  return op.call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding);
}

inline at::Tensor conv_bn_relu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias,
                               const at::Tensor& bn_mean, const at::Tensor& bn_var, double eps = 1e-5, const Stride& stride = {2, 2},
                               const Padding& padding = {1, 1, 1, 1}) {
  static const auto op = detail::find<detail::BatchNormWindow>("effnet::conv_bn_relu");
  return op.call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding);
}

inline at::Tensor linear_bias(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  static const auto op = detail::find<detail::Linear>("effnet::linear_bias");
  return op.call(x, weight, bias);
}

// The same with batch norm already folded into weight and bias. activation is "none", "relu" or "relu6".

inline at::Tensor pointwise(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = std::nullopt,
                            const OptionalTensor& residual = std::nullopt, std::string_view activation = "none") {
  static const auto op = detail::find<detail::Pointwise>("effnet::pointwise");
  return op.call(x, weight, bias, residual, activation);
}

inline at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = std::nullopt, const Stride& stride = {1, 1},
                            const Padding& padding = {1, 1, 1, 1}, std::string_view activation = "none") {
  static const auto op = detail::find<detail::Depthwise>("effnet::depthwise");
  return op.call(x, weight, bias, stride, padding, activation);
}

// memory_format is the output's; std::nullopt: the input's.
inline at::Tensor conv(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = std::nullopt, const Stride& stride = {2, 2},
                       const Padding& padding = {1, 1, 1, 1}, std::string_view activation = "none",
                       std::optional<at::MemoryFormat> memory_format = std::nullopt) {
  static const auto op = detail::find<detail::Conv>("effnet::conv");
  return op.call(x, weight, bias, stride, padding, activation, memory_format);
}

inline at::Tensor pointwise_pool(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = std::nullopt, std::string_view activation = "none") {
  static const auto op = detail::find<detail::PointwisePool>("effnet::pointwise_pool");
  return op.call(x, weight, bias, activation);
}

inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  static const auto op = detail::find<detail::FoldedLinear>("effnet::linear");
  return op.call(x, weight, bias);
}

// A block's first two steps: depthwise(expand(x)), activation after each.
inline at::Tensor expand_depthwise(const at::Tensor& x, const at::Tensor& expand_weight, const OptionalTensor& expand_bias, const at::Tensor& depthwise_weight,
                                   const OptionalTensor& depthwise_bias, const Stride& stride = {1, 1}, const Padding& padding = {1, 1, 1, 1},
                                   std::string_view activation = "relu6") {
  static const auto op = detail::find<detail::ExpandDepthwise>("effnet::expand_depthwise");
  return op.call(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, padding, activation);
}

// A whole block: project(depthwise(expand(x))) + residual, activation after the first two; std::nullopt: no expand.
inline at::Tensor mbconv(const at::Tensor& x, const OptionalTensor& expand_weight, const OptionalTensor& expand_bias, const at::Tensor& depthwise_weight,
                         const OptionalTensor& depthwise_bias, const at::Tensor& project_weight, const OptionalTensor& project_bias,
                         const OptionalTensor& residual = std::nullopt, const Stride& stride = {1, 1}, const Padding& padding = {1, 1, 1, 1},
                         std::string_view activation = "relu6") {
  static const auto op = detail::find<detail::Mbconv>("effnet::mbconv");
  return op.call(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, stride, padding, activation);
}

// The weight and the bias that these take; dtype std::nullopt: the weight's. taps_first: see Python's ops.taps_first().
inline std::tuple<at::Tensor, at::Tensor> fold_batch_norm(const at::Tensor& weight, const at::Tensor& bn_weight, const at::Tensor& bn_bias, const at::Tensor& bn_mean,
                                                          const at::Tensor& bn_var, double eps = 1e-5, std::optional<at::ScalarType> dtype = std::nullopt,
                                                          bool taps_first = false) {
  static const auto op = detail::find<detail::FoldBatchNorm>("effnet::fold_batch_norm");
  return op.call(weight, bn_weight, bn_bias, bn_mean, bn_var, eps, dtype, taps_first);
}

// mbconv(conv(x, stem), no expand) without residual: how these networks begin.
inline at::Tensor stem_mbconv(const at::Tensor& x, const at::Tensor& stem_weight, const OptionalTensor& stem_bias, const at::Tensor& depthwise_weight,
                              const OptionalTensor& depthwise_bias, const at::Tensor& project_weight, const OptionalTensor& project_bias,
                              const Stride& stem_stride = {2, 2}, const Padding& stem_padding = {1, 1, 1, 1}, std::string_view stem_activation = "relu",
                              const Stride& stride = {1, 1}, const Padding& padding = {1, 1, 1, 1}, std::string_view activation = "relu6",
                              std::optional<at::MemoryFormat> memory_format = std::nullopt) {
  static const auto op = detail::find<detail::StemMbconv>("effnet::stem_mbconv");
  return op.call(x, stem_weight, stem_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, stem_stride, stem_padding, stem_activation, stride,
                 padding, activation, memory_format);
}

// A network in one call: `program` are the numbers of a Program of the Python package, over indices of `weights`.
inline at::Tensor network(const at::Tensor& x, at::TensorList weights, at::IntArrayRef program) {
  static const auto op = detail::find<detail::Network>("effnet::network");
  return op.call(x, weights, program);
}

}  // namespace effnet
