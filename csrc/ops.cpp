// Every schema of the library. The CPU and CUDA implementations are registered in cpu.cpp and cuda.cpp, what is of no device here; fake kernels, autograd and autocast in effnet_aot/ops/.
//
// padding is (left, right, top, bottom), as torch.nn.functional.pad orders it.
#include <torch/csrc/stable/library.h>

#include "network.h"

STABLE_TORCH_LIBRARY(effnet, m) {
  // Convolution and batch norm with running statistics: y = (conv(x) - mean) / sqrt(var + eps) * weight + bias.
  m.def("pointwise_bn(Tensor x, Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05, Tensor? residual=None) -> Tensor");
  m.def("pointwise_bn_relu(Tensor x, Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05) -> Tensor");
  m.def("pointwise_bn_relu6(Tensor x, Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05) -> Tensor");
  m.def("pointwise_bn_relu_pool(Tensor x, Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05) -> Tensor");
  m.def("depthwise_bn_relu6(Tensor x, Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05, int[2] stride=1, int[4] padding=1) -> Tensor");
  m.def("conv_bn_relu(Tensor x, Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05, int[2] stride=2, int[4] padding=1) -> Tensor");
  m.def("linear_bias(Tensor x, Tensor weight, Tensor bias) -> Tensor");

  // The same with batch norm already folded into weight and bias: activation(conv(x) + bias + residual).
  m.def("pointwise(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str activation='none') -> Tensor");
  m.def("depthwise(Tensor x, Tensor weight, Tensor? bias=None, int[2] stride=1, int[4] padding=1, str activation='none') -> Tensor");
  m.def("conv(Tensor x, Tensor weight, Tensor? bias=None, int[2] stride=2, int[4] padding=1, str activation='none', MemoryFormat? memory_format=None) -> Tensor");
  m.def("pointwise_pool(Tensor x, Tensor weight, Tensor? bias=None, str activation='none') -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");

  // The first two steps of an MBConv block: depthwise(pointwise(x, expand, activation), activation).
  m.def("expand_depthwise(Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor? depthwise_bias, int[2] stride=1, int[4] padding=1, str activation='relu6') -> Tensor");
  // A whole MBConv block: pointwise(depthwise(pointwise(x, expand, activation), activation), project) + residual.
  m.def("mbconv(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, Tensor? residual=None, int[2] stride=1, int[4] padding=1, str activation='relu6') -> Tensor");

  // A network's beginning: mbconv(conv(x, stem), None, None, ...) without residual.
  m.def("stem_mbconv(Tensor x, Tensor stem_weight, Tensor? stem_bias, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, int[2] stem_stride=2, int[4] stem_padding=1, str stem_activation='relu', int[2] stride=1, int[4] padding=1, str activation='relu6', MemoryFormat? memory_format=None) -> Tensor");
  // Batch norm folded into the convolution before it: the weight and the bias that the ops above take.
  m.def("fold_batch_norm(Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor bn_mean, Tensor bn_var, float eps=1e-05, ScalarType? dtype=None, bool taps_first=False) -> (Tensor, Tensor)");

  // A network of these, in one call. program.h says how a program is written.
  m.def("network(Tensor x, Tensor[] weights, int[] program) -> Tensor");
  // The same for an owner that calls it often: the library holds the weights, and a call names them all by one number. What it prepares of
  // them runs on the current stream: calls on others come after that. Not to be traced. effnet_aot/model.py is such an owner.
  m.def("_hold_network(Tensor[] weights, int[] program) -> int");
  m.def("_held_network(Tensor x, int network) -> Tensor");
  m.def("_release_network(int network) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effnet, CompositeExplicitAutograd, m) { m.impl("_release_network", TORCH_BOX(&effnet::release_network)); }
