// Calls every op, compares it with the same computation in ATen's float64, and provokes an error:  ops [cpu|cuda]
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <effnet_aot/effnet_aot.h>

#include <functional>

#include "device.h"

using at::Tensor;

namespace {

// y = activation(conv(pad(x)) batch-normalised + residual), in float64.
struct Reference {
  Tensor x, weight;
  int64_t groups = 1, stride = 1;
  effnet::Padding padding = {0, 0, 0, 0};
  std::array<Tensor, 4> bn;  // weight, bias, mean, var; undefined: none
  Tensor bias, residual;
  double low = -INFINITY, high = INFINITY;

  Tensor operator()() const {
    const auto f64 = [](const Tensor& t) { return t.defined() ? t.to(at::kDouble) : t; };
    Tensor y = at::convolution(at::constant_pad_nd(f64(x), padding), f64(weight), f64(bias), {stride, stride}, {0, 0}, {1, 1}, false, {0, 0}, groups);
    if (bn[0].defined()) y = at::batch_norm(y, f64(bn[0]), f64(bn[1]), f64(bn[2]), f64(bn[3]), false, 0.0, 1e-5, false);
    if (residual.defined()) y = y + f64(residual);
    return y.clamp(low, high);
  }
};

int main_on(at::Device device) {
  c10::InferenceMode guard;
  at::manual_seed(0);
  // Exact enough for one tolerance; a network would leave TF32 on.
  at::globalContext().setAllowTF32CuDNN(false);
  at::globalContext().setAllowTF32CuBLAS(false);
  const auto normal = [&](at::IntArrayRef shape) { return at::randn(shape, at::TensorOptions(device)); };
  const auto positive = [&](int64_t n) { return normal({n}).abs() + 0.5; };

  const Tensor x = normal({2, 24, 15, 14}).contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor expand = normal({96, 24, 1, 1}) / 5, depth = normal({24, 1, 3, 3}) / 3, image = normal({2, 3, 33, 32}), stem = normal({32, 3, 3, 3}) / 5;
  const Tensor depth96 = normal({96, 1, 3, 3}) / 3, project = normal({24, 96, 1, 1}) / 10;
  const Tensor depth32 = normal({32, 1, 3, 3}) / 3, project32 = normal({24, 32, 1, 1}) / 6;
  const Tensor features = normal({10, 320}), matrix = normal({100, 320}) / 18, bias96 = normal({96}), bias24 = normal({24}), bias32 = normal({32}), bias100 = normal({100});
  const Tensor residual = normal({2, 96, 15, 14}).contiguous(at::MemoryFormat::ChannelsLast);
  const auto batch_norm = [&](int64_t n) { return std::array<Tensor, 4>{positive(n), normal({n}), normal({n}), positive(n)}; };
  const auto bn96 = batch_norm(96), bn24 = batch_norm(24), bn32 = batch_norm(32);
  const effnet::Padding same = {1, 1, 1, 1}, tensorflow = {0, 1, 0, 1};
  const auto linear = [&] { return at::linear(features.to(at::kDouble), matrix.to(at::kDouble), bias100.to(at::kDouble)); };

  const auto folded = [&] {
    const auto [weight, bias] = effnet::fold_batch_norm(expand, bn96[0], bn96[1], bn96[2], bn96[3]);
    return effnet::pointwise(x, weight, bias);
  };

  struct Check {
    const char* name;
    Tensor actual;
    std::function<Tensor()> expected;
  };
  const Check checks[] = {
      {"pointwise_bn", effnet::pointwise_bn(x, expand, bn96[0], bn96[1], bn96[2], bn96[3], 1e-5, residual),
       Reference{.x = x, .weight = expand, .bn = bn96, .residual = residual}},
      {"pointwise_bn_relu", effnet::pointwise_bn_relu(x, expand, bn96[0], bn96[1], bn96[2], bn96[3]),
       Reference{.x = x, .weight = expand, .bn = bn96, .low = 0}},
      {"pointwise_bn_relu6", effnet::pointwise_bn_relu6(x, expand, bn96[0], bn96[1], bn96[2], bn96[3]),
       Reference{.x = x, .weight = expand, .bn = bn96, .low = 0, .high = 6}},
      {"pointwise_bn_relu_pool", effnet::pointwise_bn_relu_pool(x, expand, bn96[0], bn96[1], bn96[2], bn96[3]),
       [&] { return Reference{.x = x, .weight = expand, .bn = bn96, .low = 0}().mean({2, 3}); }},
      {"depthwise_bn_relu6", effnet::depthwise_bn_relu6(x, depth, bn24[0], bn24[1], bn24[2], bn24[3], 1e-5, {2, 2}, tensorflow),
       Reference{.x = x, .weight = depth, .groups = 24, .stride = 2, .padding = tensorflow, .bn = bn24, .low = 0, .high = 6}},
      {"conv_bn_relu", effnet::conv_bn_relu(image, stem, bn32[0], bn32[1], bn32[2], bn32[3]),
       Reference{.x = image, .weight = stem, .stride = 2, .padding = same, .bn = bn32, .low = 0}},
      {"linear_bias", effnet::linear_bias(features, matrix, bias100), linear},
      {"pointwise", effnet::pointwise(x, expand, bias96, residual, "relu6"),
       Reference{.x = x, .weight = expand, .bias = bias96, .residual = residual, .low = 0, .high = 6}},
      {"depthwise", effnet::depthwise(x, depth, bias24, {2, 2}, tensorflow, "relu"),
       Reference{.x = x, .weight = depth, .groups = 24, .stride = 2, .padding = tensorflow, .bias = bias24, .low = 0}},
      {"conv", effnet::conv(image, stem, bias32, {2, 2}, same, "relu6", at::MemoryFormat::ChannelsLast),
       Reference{.x = image, .weight = stem, .stride = 2, .padding = same, .bias = bias32, .low = 0, .high = 6}},
      {"pointwise_pool", effnet::pointwise_pool(x, expand, bias96, "relu"),
       [&] { return Reference{.x = x, .weight = expand, .bias = bias96, .low = 0}().mean({2, 3}); }},
      {"linear", effnet::linear(features, matrix, bias100), linear},
      {"expand_depthwise", effnet::expand_depthwise(x, expand, bias96, depth96, bias96, {2, 2}, tensorflow), [&] {
         Tensor y = Reference{.x = x, .weight = expand, .bias = bias96, .low = 0, .high = 6}();
         return Reference{.x = y, .weight = depth96, .groups = 96, .stride = 2, .padding = tensorflow, .bias = bias96, .low = 0, .high = 6}();
       }},
      {"mbconv", effnet::mbconv(x, expand, bias96, depth96, bias96, project, bias24, x), [&] {
         Tensor y = Reference{.x = x, .weight = expand, .bias = bias96, .low = 0, .high = 6}();
         y = Reference{.x = y, .weight = depth96, .groups = 96, .padding = same, .bias = bias96, .low = 0, .high = 6}();
         return Reference{.x = y, .weight = project, .bias = bias24, .residual = x}();
       }},
      // Folding commutes with the convolution.
      {"fold_batch_norm", folded(), Reference{.x = x, .weight = expand, .bn = bn96}},
      {"stem_mbconv", effnet::stem_mbconv(image, stem, bias32, depth32, bias32, project32, bias24, {2, 2}, same, "relu", {1, 1}, same, "relu6", at::MemoryFormat::ChannelsLast), [&] {
         Tensor y = Reference{.x = image, .weight = stem, .stride = 2, .padding = same, .bias = bias32, .low = 0}();
         y = Reference{.x = y, .weight = depth32, .groups = 32, .padding = same, .bias = bias32, .low = 0, .high = 6}();
         return Reference{.x = y, .weight = project32, .bias = bias24}();
       }},
      // One step: the pointwise convolution (1) of x (0) without residual (-1), with weights 0 and 1, relu6 (2).
      {"network", effnet::network(x, {expand, bias96}, {1, 0, -1, 0, 1, 2}), Reference{.x = x, .weight = expand, .bias = bias96, .low = 0, .high = 6}},
  };
  bool good = true;
  for (const Check& check : checks) {
    const double error = relative_error(check.actual, check.expected());
    std::printf("%-22s error %.1e%s\n", check.name, error, error < 1e-5 ? "" : "  WRONG");
    good &= error < 1e-5;
  }
  try {
    effnet::pointwise(x, expand, std::nullopt, std::nullopt, "gelu");
    good = false;
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::printf("a bad argument throws: %s\n", text.substr(0, text.find('\n')).c_str());
  }
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program([&] {
    const at::Device device = choose_device(argc > 1 ? argv[1] : "");
    std::printf("%zu images in the library\n", effnet::kernels().size());
    if (device.is_cuda()) {
      effnet::preload(device.index());
      std::printf("device 0 is served by %s\n", effnet::device_image(device.index()).image.c_str());
    }
    return main_on(device);
  });
}
