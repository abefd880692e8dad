// From the schemas' arguments to the computations behind them. A backend (Cpu in cpu.cpp, Cuda in cuda.cpp) is a
// struct of static functions:
//
//   Tensor pointwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue&)
//   Tensor pointwise_pool(const char* op, const Tensor& x, const Tensor& weight, const Epilogue&)
//   Tensor depthwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue&, const Window&)
//   Tensor conv(const char* op, const Tensor& x, const Tensor& weight, const Epilogue&, const Window&, std::optional<bool> channels_last)
//   Tensor linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor* bias)
//   Tensor expand_depthwise(const char* op, const Tensor& x, const ExpandDepthwise&)
//   Tensor mbconv(const char* op, const Tensor& x, const Mbconv&)
//   Tensor stem_mbconv(const char* op, const Tensor& x, const StemMbconv&)
//   Folded fold_batch_norm(const char* op, const Tensor& weight, const Epilogue& batch_norm, std::optional<ScalarType> dtype, bool taps_first)
//   Tensor network(const Tensor& x, const Network& network)
//   Prepared prepare(std::vector<Tensor>& weights, std::span<const int64_t> program)   of a network that is to be held; appends to the weights
//
// `op` is the name the user called, for error messages.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "network.h"

namespace effnet {

using Folded = std::tuple<Tensor, Tensor>;  // weight and bias

inline Epilogue batch_norm(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, double eps, Activation activation) {
  return {.bn_weight = &weight, .bn_bias = &bias, .bn_mean = &mean, .bn_var = &var, .eps = eps, .activation = activation};
}

inline const Tensor* optional(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// int[2] and int[4] arguments arrive as vectors; the dispatcher has already expanded a single number.
// `prefix` is what the arguments' names begin with.
Window window(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::string& prefix = "");

// nullopt: the output takes the input's format.
std::optional<bool> channels_last(const char* op, const std::optional<torch::headeronly::MemoryFormat>& format);

template <class Backend>
struct Adapters {
  using T = const Tensor&;
  using OptionalT = const std::optional<Tensor>&;
  using Ints = const std::vector<int64_t>&;

  static Tensor pointwise_bn(T x, T w, T g, T b, T m, T v, double eps, OptionalT residual) {
    auto epilogue = batch_norm(g, b, m, v, eps, Activation::none);
    epilogue.residual = optional(residual);
    return Backend::pointwise("pointwise_bn", x, w, epilogue);
  }
  static Tensor pointwise_bn_relu(T x, T w, T g, T b, T m, T v, double eps) {
    return Backend::pointwise("pointwise_bn_relu", x, w, batch_norm(g, b, m, v, eps, Activation::relu));
  }
  static Tensor pointwise_bn_relu6(T x, T w, T g, T b, T m, T v, double eps) {
    return Backend::pointwise("pointwise_bn_relu6", x, w, batch_norm(g, b, m, v, eps, Activation::relu6));
  }
  static Tensor pointwise_bn_relu_pool(T x, T w, T g, T b, T m, T v, double eps) {
    return Backend::pointwise_pool("pointwise_bn_relu_pool", x, w, batch_norm(g, b, m, v, eps, Activation::relu));
  }
  static Tensor depthwise_bn_relu6(T x, T w, T g, T b, T m, T v, double eps, Ints stride, Ints padding) {
    return Backend::depthwise("depthwise_bn_relu6", x, w, batch_norm(g, b, m, v, eps, Activation::relu6), window("depthwise_bn_relu6", stride, padding));
  }
  static Tensor conv_bn_relu(T x, T w, T g, T b, T m, T v, double eps, Ints stride, Ints padding) {
    return Backend::conv("conv_bn_relu", x, w, batch_norm(g, b, m, v, eps, Activation::relu), window("conv_bn_relu", stride, padding), std::nullopt);
  }
  static Tensor linear_bias(T x, T w, T bias) { return Backend::linear("linear_bias", x, w, &bias); }

  static Tensor pointwise(T x, T w, OptionalT bias, OptionalT residual, StringHandle activation) {
    return Backend::pointwise("pointwise", x, w, {.bias = optional(bias), .residual = optional(residual), .activation = parse_activation("pointwise", activation)});
  }
  static Tensor depthwise(T x, T w, OptionalT bias, Ints stride, Ints padding, StringHandle activation) {
    Epilogue epilogue{.bias = optional(bias), .activation = parse_activation("depthwise", activation)};
    return Backend::depthwise("depthwise", x, w, epilogue, window("depthwise", stride, padding));
  }
  static Tensor conv(T x, T w, OptionalT bias, Ints stride, Ints padding, StringHandle activation, std::optional<torch::headeronly::MemoryFormat> format) {
    Epilogue epilogue{.bias = optional(bias), .activation = parse_activation("conv", activation)};
    auto checked = window("conv", stride, padding);
    return Backend::conv("conv", x, w, epilogue, checked, channels_last("conv", format));
  }
  static Tensor pointwise_pool(T x, T w, OptionalT bias, StringHandle activation) {
    return Backend::pointwise_pool("pointwise_pool", x, w, {.bias = optional(bias), .activation = parse_activation("pointwise_pool", activation)});
  }
  static Tensor linear(T x, T w, OptionalT bias) { return Backend::linear("linear", x, w, optional(bias)); }

  static Tensor expand_depthwise(T x, T expand_weight, OptionalT expand_bias, T depthwise_weight, OptionalT depthwise_bias, Ints stride, Ints padding,
                                 StringHandle activation) {
    const Activation parsed = parse_activation("expand_depthwise", activation);
    return Backend::expand_depthwise("expand_depthwise", x, {.expand_weight = &expand_weight, .expand_bias = optional(expand_bias), .depthwise_weight = &depthwise_weight,
                                                             .depthwise_bias = optional(depthwise_bias), .activation = parsed, .window = window("expand_depthwise", stride, padding)});
  }

  static Tensor mbconv(T x, OptionalT expand_weight, OptionalT expand_bias, T depthwise_weight, OptionalT depthwise_bias, T project_weight, OptionalT project_bias,
                       OptionalT residual, Ints stride, Ints padding, StringHandle activation) {
    const Activation parsed = parse_activation("mbconv", activation);
    return Backend::mbconv("mbconv", x, {.expand_weight = optional(expand_weight), .expand_bias = optional(expand_bias), .depthwise_weight = &depthwise_weight,
                                         .depthwise_bias = optional(depthwise_bias), .project_weight = &project_weight, .project_bias = optional(project_bias),
                                         .residual = optional(residual), .activation = parsed, .window = window("mbconv", stride, padding)});
  }

  static Tensor stem_mbconv(T x, T stem_weight, OptionalT stem_bias, T depthwise_weight, OptionalT depthwise_bias, T project_weight, OptionalT project_bias, Ints stem_stride,
                            Ints stem_padding, StringHandle stem_activation, Ints stride, Ints padding, StringHandle activation,
                            std::optional<torch::headeronly::MemoryFormat> format) {
    const char* op = "stem_mbconv";
    StemMbconv both{.stem_weight = &stem_weight, .stem_bias = optional(stem_bias), .stem_activation = parse_activation(op, stem_activation, "stem_activation"),
                    .block = {.depthwise_weight = &depthwise_weight, .depthwise_bias = optional(depthwise_bias), .project_weight = &project_weight,
                              .project_bias = optional(project_bias), .activation = parse_activation(op, activation)}};
    both.stem_window = window(op, stem_stride, stem_padding, "stem_");
    both.block.window = window(op, stride, padding);
    both.channels_last = channels_last(op, format);
    return Backend::stem_mbconv(op, x, both);
  }

  static Folded fold_batch_norm(T w, T g, T b, T m, T v, double eps, std::optional<ScalarType> dtype, bool taps_first) {
    return Backend::fold_batch_norm("fold_batch_norm", w, batch_norm(g, b, m, v, eps, Activation::none), dtype, taps_first);
  }

  static Tensor network(T x, const std::vector<Tensor>& weights, Ints program) { return Backend::network(x, {weights, program}); }
  static int64_t hold_network(std::vector<Tensor> weights, Ints program) {
    Prepared prepared = Backend::prepare(weights, program);
    return effnet::hold_network(std::move(weights), program, std::move(prepared));
  }
  static Tensor held_network(T x, int64_t number) { return Backend::network(x, *effnet::held_network(number)); }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("pointwise_bn", TORCH_BOX(&pointwise_bn));
    m.impl("pointwise_bn_relu", TORCH_BOX(&pointwise_bn_relu));
    m.impl("pointwise_bn_relu6", TORCH_BOX(&pointwise_bn_relu6));
    m.impl("pointwise_bn_relu_pool", TORCH_BOX(&pointwise_bn_relu_pool));
    m.impl("depthwise_bn_relu6", TORCH_BOX(&depthwise_bn_relu6));
    m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu));
    m.impl("linear_bias", TORCH_BOX(&linear_bias));
    m.impl("pointwise", TORCH_BOX(&pointwise));
    m.impl("depthwise", TORCH_BOX(&depthwise));
    m.impl("conv", TORCH_BOX(&conv));
    m.impl("pointwise_pool", TORCH_BOX(&pointwise_pool));
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("expand_depthwise", TORCH_BOX(&expand_depthwise));
    m.impl("mbconv", TORCH_BOX(&mbconv));
    m.impl("stem_mbconv", TORCH_BOX(&stem_mbconv));
    m.impl("fold_batch_norm", TORCH_BOX(&fold_batch_norm));
    m.impl("network", TORCH_BOX(&network));
    m.impl("_hold_network", TORCH_BOX(&hold_network));
    m.impl("_held_network", TORCH_BOX(&held_network));
  }
};

}  // namespace effnet
