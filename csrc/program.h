// A network as data: what torch.ops.effnet.network runs.
//
// A program is a flat list of numbers: step after step, each a kind and its fields in the order of kKinds (program.cpp). A
// result is named by the number of its step, counted from 1; 0 is x. Weights are named by their index in the op's list. -1
// is "none". The last step's result is the network's. effnet_aot/ops/network.py builds, prints and checks the same.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "arguments.h"

namespace effnet {

enum class StepKind { conv, pointwise, depthwise, mbconv, pointwise_pool, linear, stem_mbconv };

struct Step {
  StepKind kind;
  int64_t input = 0, residual = -1;
  int64_t weight = -1, bias = -1;  // of mbconv and stem_mbconv: the depthwise ones
  int64_t expand_weight = -1, expand_bias = -1, project_weight = -1, project_bias = -1;
  Activation activation = Activation::none;
  Window window;
  int64_t stem_weight = -1, stem_bias = -1;
  Activation stem_activation = Activation::none;
  Window stem_window;
  std::optional<bool> channels_last;
  std::string op;  // what errors call it: "network: step 3 (mbconv)"
};

// Throws where the program is malformed; what fits what is checked by infer().
std::vector<Step> parse_program(std::span<const int64_t> program, size_t weights);

// A result's sizes and format, as the next step sees it.
struct Value {
  std::array<int64_t, 4> sizes{};
  size_t rank = 4;
  bool channels_last = false;

  Meta::Sizes shape() const { return {sizes.data(), rank}; }
  int64_t numel() const;
};

// By the step's kind a convolution, a block, both, or a linear layer; and the result. channels_last of a convolution is its
// output's.
struct StepShape {
  StepKind kind;
  ConvShape conv;
  MbconvShape block;
  LinearShape linear;
  Value out;

  const ConvShape& image() const { return kind == StepKind::mbconv || kind == StepKind::stem_mbconv ? block.project : conv; }
};

// Checks every step as the single op does, in order, and returns their sizes: for x, or for so many of its images.
std::vector<StepShape> infer(const std::vector<Step>& steps, const Tensor& x, const std::vector<Tensor>& weights, std::optional<int64_t> images = std::nullopt);

// The network step by step, each on tensors of its own.
template <class Backend>
Tensor compose(const std::vector<Step>& steps, const Tensor& x, const std::vector<Tensor>& weights) {
  std::vector<Tensor> values{x};
  auto weight = [&](int64_t index) { return index < 0 ? nullptr : &weights[index]; };
  for (const Step& s : steps) {
    const char* op = s.op.c_str();
    const Tensor &input = values[s.input], *w = weight(s.weight);
    const Tensor* residual = s.residual < 0 ? nullptr : &values[s.residual];
    const Epilogue epilogue{.bias = weight(s.bias), .residual = residual, .activation = s.activation};
    values.push_back([&] {
      switch (s.kind) {
        case StepKind::conv: return Backend::conv(op, input, *w, epilogue, s.window, s.channels_last);
        case StepKind::pointwise: return Backend::pointwise(op, input, *w, epilogue);
        case StepKind::depthwise: return Backend::depthwise(op, input, *w, epilogue, s.window);
        case StepKind::pointwise_pool: return Backend::pointwise_pool(op, input, *w, epilogue);
        case StepKind::linear: return Backend::linear(op, input, *w, epilogue.bias);
        case StepKind::stem_mbconv:
          return Backend::stem_mbconv(op, input, {.stem_weight = weight(s.stem_weight), .stem_bias = weight(s.stem_bias), .stem_activation = s.stem_activation,
                                                  .stem_window = s.stem_window,
                                                  .block = {.depthwise_weight = w, .depthwise_bias = epilogue.bias, .project_weight = weight(s.project_weight),
                                                            .project_bias = weight(s.project_bias), .activation = s.activation, .window = s.window},
                                                  .channels_last = s.channels_last});
        case StepKind::mbconv:
          return Backend::mbconv(op, input, {.expand_weight = weight(s.expand_weight), .expand_bias = weight(s.expand_bias), .depthwise_weight = w,
                                             .depthwise_bias = epilogue.bias, .project_weight = weight(s.project_weight),
                                             .project_bias = weight(s.project_bias), .residual = residual, .activation = s.activation, .window = s.window});
      }
      __builtin_unreachable();
    }());
  }
  return values.back();
}

}  // namespace effnet
