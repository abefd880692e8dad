#include "program.h"

#include <iterator>

#include "adapters.h"

namespace effnet {
namespace {

enum class Field {
  input, residual, weight, bias, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
  activation, stride, padding, memory_format, stem_weight, stem_bias, stem_activation, stem_stride, stem_padding
};

const char* const kFieldNames[] = {"input",          "residual",       "weight",         "bias",         "expand_weight", "expand_bias", "depthwise_weight",
                                   "depthwise_bias", "project_weight", "project_bias",   "activation",   "stride",        "padding",     "memory_format",
                                   "stem_weight",    "stem_bias",      "stem_activation", "stem_stride", "stem_padding"};

struct Kind {
  const char* name;
  std::vector<Field> fields;
};

// In the order of StepKind. A new kind has its name and fields here, and a case in infer(), compose() and network.cpp.
const std::vector<Kind>& kinds() {
  using enum Field;
  static const std::vector<Kind> all = {
      {"conv", {input, weight, bias, activation, stride, padding, memory_format}},
      {"pointwise", {input, residual, weight, bias, activation}},
      {"depthwise", {input, weight, bias, activation, stride, padding}},
      {"mbconv", {input, residual, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, activation, stride, padding}},
      {"pointwise_pool", {input, weight, bias, activation}},
      {"linear", {input, weight, bias}},
      {"stem_mbconv", {input, stem_weight, stem_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, stem_activation, stem_stride, stem_padding,
                       activation, stride, padding, memory_format}},
  };
  return all;
}

// Takes the numbers of one program, one after the other.
struct Reader {
  std::span<const int64_t> program;
  size_t weights;
  size_t at = 0;
  int64_t step = 0;  // from 1

  int64_t next(const char* op, const char* field) {
    if (at == program.size()) fail(op, std::string("program must go on with its ") + field, "an end after " + std::to_string(at) + " numbers");
    return program[at++];
  }

  int64_t within(const char* op, const char* field, int64_t least, int64_t most, const std::string& meaning) {
    const int64_t n = next(op, field);
    if (n < least || n > most) fail(op, field + (" must be " + meaning), std::to_string(n));
    return n;
  }

  int64_t result(const char* op, const char* field, bool optional) {
    return within(op, field, optional ? -1 : 0, step - 1, std::string(optional ? "-1 (none), " : "") + "0 (x) or the number of an earlier step");
  }

  int64_t index(const char* op, const char* field, bool optional) {
    return within(op, field, optional ? -1 : 0, static_cast<int64_t>(weights) - 1,
                  std::string(optional ? "-1 (none) or " : "") + "an index into the " + std::to_string(weights) + " weights");
  }

  Activation activation(const char* op, const char* field) { return Activation(within(op, field, 0, 2, "0 (none), 1 (relu) or 2 (relu6)")); }

  void read_stride(const char* op, const char* field, Window& w) {
    for (auto& n : w.stride) n = next(op, field);
  }

  // The last field of a window.
  void read_padding(const char* op, const char* field, Window& w, const char* prefix) {
    for (auto& n : w.padding) n = next(op, field);
    w = window(op, {w.stride.begin(), w.stride.end()}, {w.padding.begin(), w.padding.end()}, prefix);
  }

  void read(Step& s, Field field) {
    const char *op = s.op.c_str(), *name = kFieldNames[static_cast<int>(field)];
    switch (field) {
      case Field::input: s.input = result(op, name, false); break;
      case Field::residual: s.residual = result(op, name, true); break;
      case Field::weight:
      case Field::depthwise_weight: s.weight = index(op, name, false); break;
      case Field::bias:
      case Field::depthwise_bias: s.bias = index(op, name, true); break;
      case Field::expand_weight: s.expand_weight = index(op, name, true); break;
      case Field::expand_bias: s.expand_bias = index(op, name, true); break;
      case Field::project_weight: s.project_weight = index(op, name, false); break;
      case Field::project_bias: s.project_bias = index(op, name, true); break;
      case Field::stem_weight: s.stem_weight = index(op, name, false); break;
      case Field::stem_bias: s.stem_bias = index(op, name, true); break;
      case Field::activation: s.activation = activation(op, name); break;
      case Field::stem_activation: s.stem_activation = activation(op, name); break;
      case Field::stride: read_stride(op, name, s.window); break;
      case Field::stem_stride: read_stride(op, name, s.stem_window); break;
      case Field::padding: read_padding(op, name, s.window, ""); break;
      case Field::stem_padding: read_padding(op, name, s.stem_window, "stem_"); break;
      case Field::memory_format: {
        const int64_t format = within(op, name, -1, 1, "-1 (its input's), 0 (contiguous_format) or 1 (channels_last)");
        if (format >= 0) s.channels_last = format == 1;
        break;
      }
    }
  }
};

}  // namespace

std::vector<Step> parse_program(std::span<const int64_t> program, size_t weights) {
  std::vector<Step> steps;
  if (program.empty()) fail("network", "program must have at least one step", "none");
  for (Reader reader{program, weights}; reader.at < program.size();) {
    const std::string name = "network: step " + std::to_string(++reader.step);
    const int64_t last = static_cast<int64_t>(kinds().size()) - 1;
    const int64_t kind = reader.within(name.c_str(), "kind", 0, last, "from 0 (" + std::string(kinds()[0].name) + ") to " + std::to_string(last) + " (" + kinds()[last].name + ")");
    Step step{.kind = StepKind(kind), .op = name + " (" + kinds()[kind].name + ")"};
    for (Field field : kinds()[kind].fields) reader.read(step, field);
    steps.push_back(std::move(step));
  }
  return steps;
}

int64_t Value::numel() const {
  int64_t n = 1;
  for (size_t d = 0; d < rank; ++d) n *= sizes[d];
  return n;
}

std::vector<StepShape> infer(const std::vector<Step>& steps, const Tensor& x, const std::vector<Tensor>& weights, std::optional<int64_t> images) {
  const Meta like("x", x);
  std::vector<int64_t> given(x.sizes().begin(), x.sizes().end());
  if (images) given.at(0) = *images;
  std::vector<StepShape> shapes(steps.size());
  auto result = [&](const char* name, int64_t number) { return number == 0 ? Meta(name, {given.data(), given.size()}, like) : Meta(name, shapes[number - 1].out.shape(), like); };
  auto weight = [&](const char* name, int64_t index) { return Meta(name, weights[index]); };
  auto optional = [&](const char* name, int64_t index) { return index < 0 ? std::nullopt : std::make_optional(weight(name, index)); };

  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    const char* op = s.op.c_str();
    const Meta input = result("x", s.input);
    const bool format = s.input == 0 ? prefers_channels_last(x) : shapes[s.input - 1].out.channels_last;
    const auto residual = s.residual < 0 ? std::nullopt : std::make_optional(result("residual", s.residual));
    StepShape& shape = shapes[i];
    shape.kind = s.kind;
    Value& out = shape.out;
    auto image = [&](const ConvShape& conv, bool channels_last) {
      const int64_t plane = conv.out_height * conv.out_width;
      // A map that lies the same way in both formats is read as NCHW, as one that is there would be.
      out = {.sizes = conv.out_sizes(), .channels_last = channels_last && conv.batch > 0 && conv.out_channels > 1 && plane > 1};
    };
    auto matrix = [&](int64_t rows, int64_t columns) { out = {.sizes = {rows, columns}, .rank = 2}; };

    if (s.kind == StepKind::linear) {
      shape.linear = check_linear(op, input, weight("weight", s.weight), optional("bias", s.bias));
      matrix(shape.linear.rows, shape.linear.out_features);
      continue;
    }
    if (s.kind == StepKind::mbconv) {
      shape.block = check_mbconv(op, {.x = input, .channels_last = format, .expand_weight = optional("expand_weight", s.expand_weight),
                                      .expand_bias = optional("expand_bias", s.expand_bias), .depthwise_weight = weight("depthwise_weight", s.weight),
                                      .depthwise_bias = optional("depthwise_bias", s.bias), .project_weight = weight("project_weight", s.project_weight),
                                      .project_bias = optional("project_bias", s.project_bias), .residual = residual}, s.window);
      image(shape.block.project, format);
      continue;
    }
    if (s.kind == StepKind::stem_mbconv) {
      const bool channels_last = s.channels_last.value_or(format);
      const auto both = check_stem_mbconv(op, {.stem = {.x = input, .channels_last = channels_last, .weight = weight("stem_weight", s.stem_weight),
                                                        .bias = optional("stem_bias", s.stem_bias), .out_name = kStemMap},
                                               .block = {.x = input, .channels_last = channels_last, .depthwise_weight = weight("depthwise_weight", s.weight),
                                                         .depthwise_bias = optional("depthwise_bias", s.bias), .project_weight = weight("project_weight", s.project_weight),
                                                         .project_bias = optional("project_bias", s.project_bias)}}, s.stem_window, s.window);
      shape.conv = both.stem, shape.block = both.block;
      image(shape.block.project, channels_last);
      continue;
    }
    const ConvOperands operands{.x = input, .channels_last = format, .weight = weight("weight", s.weight), .bias = optional("bias", s.bias), .residual = residual};
    switch (s.kind) {
      case StepKind::conv:
        shape.conv = check_conv(op, operands, s.window);
        shape.conv.channels_last = s.channels_last.value_or(format);
        break;
      case StepKind::depthwise: shape.conv = check_depthwise(op, operands, s.window); break;
      default: shape.conv = check_pointwise(op, operands, s.kind == StepKind::pointwise_pool);
    }
    if (s.kind == StepKind::pointwise_pool)
      matrix(shape.conv.batch, shape.conv.out_channels);
    else
      image(shape.conv, shape.conv.channels_last);
  }
  return shapes;
}

}  // namespace effnet
