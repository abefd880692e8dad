// The CPU implementation: each op is composed of the ATen calls that eager PyTorch makes, so its numbers are eager's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "adapters.h"
#include "network.h"
#include "program.h"

namespace effnet {
namespace {

namespace stable = torch::stable;
using Ints = std::vector<int64_t>;
using torch::headeronly::MemoryFormat;

template <class... Args>
Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

// ATen has no mixed-precision form of every op; half precision with float32 vectors is the one that batch_norm has.
Tensor like(const Tensor& t, const Tensor& x) { return t.scalar_type() == x.scalar_type() ? t : stable::to(t, x.scalar_type()); }

Tensor batch_norm(const Tensor& y, const Epilogue& epilogue) {
  bool widen = y.scalar_type() == ScalarType::Double;
  auto vector = [&](const Tensor* t) { return std::make_optional(widen ? like(*t, y) : *t); };
  return aten("aten::batch_norm", "", y, vector(epilogue.bn_weight), vector(epilogue.bn_bias), vector(epilogue.bn_mean), vector(epilogue.bn_var),
              /*training=*/false, /*momentum=*/0.0, epilogue.eps, /*cudnn_enabled=*/false);
}

Tensor activate(const Tensor& y, Activation activation) {
  switch (activation) {
    case Activation::none: return y;
    case Activation::relu: return aten("aten::relu", "", y);
    case Activation::relu6: return aten("aten::relu6", "", y);
  }
  __builtin_unreachable();
}

// ATen leaves open which strides a size of 1 gets; the fake kernels promise those of a fresh tensor.
template <size_t rank>
Tensor with_strides(const Tensor& y, const std::array<int64_t, rank>& strides) {
  auto actual = y.strides();
  if (std::equal(strides.begin(), strides.end(), actual.begin())) return y;
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(y.get(), y.sizes().data(), strides.data(), &view));
  return Tensor(view);
}

Tensor with_format(const Tensor& y, bool channels_last) {
  Tensor out = stable::contiguous(y, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  int64_t channels = y.size(1), height = y.size(2), width = y.size(3);
  if (channels_last) return with_strides<4>(out, {channels * height * width, 1, width * channels, channels});
  return with_strides<4>(out, {channels * height * width, height * width, width, 1});
}

Tensor as_matrix(const Tensor& y) { return with_strides<2>(stable::contiguous(y), {y.size(1), 1}); }

Tensor convolve(const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const ConvShape& s, int64_t groups) {
  auto [left, right, top, bottom] = s.window.padding;
  bool symmetric = left == right && top == bottom;
  Tensor input = symmetric ? x : stable::pad(x, Ints{left, right, top, bottom});
  Ints padding = symmetric ? Ints{top, left} : Ints{0, 0};

  auto bias = epilogue.bias ? std::make_optional(like(*epilogue.bias, x)) : std::nullopt;
  Tensor y = aten("aten::convolution", "", input, weight, bias, Ints{s.window.stride[0], s.window.stride[1]}, padding,
                  /*dilation=*/Ints{1, 1}, /*transposed=*/false, /*output_padding=*/Ints{0, 0}, groups);
  if (epilogue.has_batch_norm()) y = batch_norm(y, epilogue);
  // aten::add takes a Scalar, which the stable ABI cannot pass; at::sub is add with the sign of alpha turned.
  if (epilogue.residual) y = stable::subtract(y, *epilogue.residual, /*alpha=*/-1.0);
  return activate(y, epilogue.activation);
}

Tensor matrix_as_kernel(const Tensor& weight) { return stable::reshape(weight, Ints{weight.size(0), weight.size(1), 1, 1}); }

struct Cpu {
  static Tensor pointwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
    ConvShape s = check_pointwise(op, operands(x, weight, epilogue));
    return with_format(convolve(x, matrix_as_kernel(weight), epilogue, s, 1), s.channels_last);
  }

  static Tensor pointwise_pool(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
    ConvShape s = check_pointwise(op, operands(x, weight, epilogue), /*pooled=*/true);
    Tensor y = convolve(x, matrix_as_kernel(weight), epilogue, s, 1);
    return as_matrix(aten("aten::mean", "dim", y, std::make_optional(Ints{2, 3}), /*keepdim=*/false, std::nullopt));
  }

  static Tensor depthwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const Window& window) {
    ConvShape s = check_depthwise(op, operands(x, weight, epilogue), window);
    return with_format(convolve(x, weight, epilogue, s, s.in_channels), s.channels_last);
  }

  static Tensor conv(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const Window& window, std::optional<bool> channels_last) {
    ConvShape s = check_conv(op, operands(x, weight, epilogue), window);
    return with_format(convolve(x, weight, epilogue, s, 1), channels_last.value_or(s.channels_last));
  }

  static Tensor linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor* bias) {
    check_linear(op, Meta("x", x), Meta("weight", weight), optional_meta("bias", bias));
    return as_matrix(aten("aten::linear", "", x, weight, bias ? std::make_optional(like(*bias, x)) : std::nullopt));
  }

  static Tensor expand_depthwise(const char* op, const Tensor& x, const ExpandDepthwise& beginning) {
    const ExpandDepthwiseShape s = check_expand_depthwise(op, operands(x, beginning), beginning.window);
    Tensor y = pointwise(op, x, *beginning.expand_weight, {.bias = beginning.expand_bias, .activation = beginning.activation});
    y = depthwise(op, y, *beginning.depthwise_weight, {.bias = beginning.depthwise_bias, .activation = beginning.activation}, beginning.window);
    return with_format(y, s.depthwise.channels_last);
  }

  static Tensor mbconv(const char* op, const Tensor& x, const Mbconv& block) {
    const MbconvShape s = check_mbconv(op, operands(x, block), block.window);
    Tensor y = block.expand_weight ? pointwise(op, x, *block.expand_weight, {.bias = block.expand_bias, .activation = block.activation}) : x;
    y = depthwise(op, y, *block.depthwise_weight, {.bias = block.depthwise_bias, .activation = block.activation}, block.window);
    y = pointwise(op, y, *block.project_weight, {.bias = block.project_bias, .residual = block.residual});
    return with_format(y, s.project.channels_last);
  }

  static Tensor stem_mbconv(const char* op, const Tensor& x, const StemMbconv& both) {
    const StemMbconvShape s = check_stem_mbconv(op, operands(x, both), both.stem_window, both.block.window);
    const Tensor map = conv(op, x, *both.stem_weight, {.bias = both.stem_bias, .activation = both.stem_activation}, both.stem_window, s.stem.channels_last);
    return with_format(mbconv(op, map, both.block), s.stem.channels_last);
  }

  // In float64, whatever comes and whatever is asked for.
  static Folded fold_batch_norm(const char* op, const Tensor& weight, const Epilogue& epilogue, std::optional<ScalarType> dtype, bool taps_first) {
    const FoldShape s = check_fold_batch_norm(op, Meta("weight", weight), epilogue, dtype, taps_first);
    const auto wide = [](const Tensor& t) { return stable::contiguous(stable::to(t, ScalarType::Double)); };
    const auto numbers = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
    const Tensor given = wide(weight), gamma = wide(*epilogue.bn_weight), beta = wide(*epilogue.bn_bias), mean = wide(*epilogue.bn_mean), var = wide(*epilogue.bn_var);
    const int64_t elements = s.elements();
    const Tensor folded = stable::empty(Ints{s.out_channels * elements}, ScalarType::Double), bias = stable::empty(Ints{s.out_channels}, ScalarType::Double);

    const double* w = numbers(given);
    double* out = static_cast<double*>(folded.mutable_data_ptr());
    for (int64_t c = 0; c < s.out_channels; ++c) {
      const double scale = numbers(gamma)[c] / std::sqrt(numbers(var)[c] + epilogue.eps);
      static_cast<double*>(bias.mutable_data_ptr())[c] = numbers(beta)[c] - numbers(mean)[c] * scale;
      for (int64_t k = 0; k < elements; ++k) out[taps_first ? k * s.out_channels + c : c * elements + k] = w[c * elements + k] * scale;
    }
    const Tensor rounded = stable::to(folded, s.dtype);
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(rounded.get(), s.rank, s.sizes().data(), s.strides().data(), /*storage_offset=*/0, &view));
    return {Tensor(view), stable::to(bias, s.bias_dtype)};
  }

  static Prepared prepare(std::vector<Tensor>&, std::span<const int64_t>) { return {}; }

  static Tensor network(const Tensor& x, const Network& network) {
    const auto steps = parse_program(network.program, network.weights.size());
    infer(steps, x, network.weights);  // so that nothing is computed of a network that has a fault
    return compose<Cpu>(steps, x, network.weights);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effnet, CPU, m) { Adapters<Cpu>::register_all(m); }

}  // namespace effnet
