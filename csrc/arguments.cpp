#include "arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "adapters.h"

// The checks run before every launch, so a call that passes allocates nothing: each tensor is read once into a Meta, and
// text is built only to be thrown. The order of the checks is the order in effnet_aot/ops/rules.py, so that input with
// several faults is rejected for the same one everywhere.
namespace effnet {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// As Python prints a tuple.
template <class Numbers>
std::string tuple_text(const Numbers& numbers) {
  std::string text = "(";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + (numbers.size() == 1 ? ",)" : ")");
}

std::string dtype_text(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float16(), "float16"},     {aoti_torch_dtype_bfloat16(), "bfloat16"},     {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_float64(), "float64"},     {aoti_torch_dtype_uint8(), "uint8"},           {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int32(), "int32"},           {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_bool(), "bool"},           {aoti_torch_dtype_complex32(), "complex32"},   {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"}, {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"}, {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
  };
  for (auto [code, name] : names)
    if (code == dtype) return name;
  return "dtype " + std::to_string(dtype);
}

std::string device_text(int32_t type, int32_t index) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_meta()) return "meta";
  return (type == aoti_torch_device_type_cuda() ? "cuda:" : "device type " + std::to_string(type) + ":") + std::to_string(index);
}

void check_input_dtype(const char* op, const Meta& x) {
  bool half_or_float = x.dtype == aoti_torch_dtype_float32() || x.dtype == aoti_torch_dtype_float16() || x.dtype == aoti_torch_dtype_bfloat16();
  if (!half_or_float && (x.on_cuda() || x.dtype != aoti_torch_dtype_float64()))
    fail(op, std::string(x.name) + " must be float16, bfloat16 or float32 (on the CPU also float64)", x.dtype_text());
}

// `like` is what the errors call x, of which every other tensor takes device and type.
void check_device(const char* op, const Meta& t, const Meta& x, const char* like = "x") {
  if (t.device_type != x.device_type || t.device_index != x.device_index)
    fail(op, std::string(t.name) + " must be on " + x.device_text() + " like " + like, t.device_text());
}

void check_like_input(const char* op, const Meta& t, const Meta& x) {
  if (t.dtype != x.dtype) fail(op, std::string(t.name) + " must be " + x.dtype_text() + " like x", t.dtype_text());
  check_device(op, t, x);
}

// A vector of one value for each output channel; half precision inputs may come with float32 vectors.
void check_vector(const char* op, const Meta& t, const Meta& x, const char* length_name, int64_t length, const char* like = "x") {
  if (t.dtype != x.dtype && t.dtype != aoti_torch_dtype_float32())
    fail(op, std::string(t.name) + " must be " + x.dtype_text() + (x.dtype == aoti_torch_dtype_float32() ? "" : " or float32"), t.dtype_text());
  check_device(op, t, x, like);
  if (t.sizes.size() != 1 || t.sizes[0] != length)
    fail(op, std::string(t.name) + " must be (" + length_name + ",) with " + length_name + " = " + std::to_string(length), tuple_text(t.sizes));
}

void check_batch_norm(const char* op, const Meta& x, const Epilogue& epilogue, int64_t out_channels, const char* like = "x") {
  Meta weight("bn_weight", *epilogue.bn_weight);
  check_vector(op, weight, x, "C_out", out_channels, like);
  const std::pair<const char*, const Tensor*> others[] = {{"bn_bias", epilogue.bn_bias}, {"bn_mean", epilogue.bn_mean}, {"bn_var", epilogue.bn_var}};
  for (auto [name, tensor] : others) {
    Meta t(name, *tensor);
    if (t.dtype != weight.dtype) fail(op, std::string(name) + " must be " + weight.dtype_text() + " like bn_weight", t.dtype_text());
    check_vector(op, t, x, "C_out", out_channels, like);
  }
  if (!(epilogue.eps >= 0)) {  // NaN fails too
    char text[32];
    std::snprintf(text, sizeof text, "%g", epilogue.eps);
    fail(op, "eps must be at least 0", epilogue.eps != epilogue.eps ? "nan" : text);
  }
}

// The device code computes element offsets in 32 bits.
void check_indexable(const char* op, const char* of, const char* name, std::initializer_list<int64_t> sizes) {
  int64_t numel = 1;
  for (int64_t size : sizes) {
    if (size == 0) return;
    if (__builtin_mul_overflow(numel, size, &numel)) numel = std::numeric_limits<int64_t>::max();
  }
  if (numel > kMaxInt32)
    fail(op, std::string(of) + name + " must have at most 2147483647 elements on CUDA, where the kernels index in 32 bits", std::to_string(numel));
}

void check_image(const char* op, const Meta& x) {
  if (x.sizes.size() != 4 || x.sizes[1] < 1 || x.sizes[2] < 1 || x.sizes[3] < 1)
    fail(op, std::string(x.name) + " must be (N, C, H, W) with C, H and W at least 1", tuple_text(x.sizes));
  check_input_dtype(op, x);
}

// The part that all convolutions share, once the weight's shape is known to be right.
ConvShape check_convolution(const char* op, const ConvOperands& operands, const Window& window, bool pooled) {
  const auto& [x, channels_last, weight, bias, residual, epilogue, out_name] = operands;
  ConvShape s;
  s.batch = x.sizes[0], s.in_channels = x.sizes[1], s.height = x.sizes[2], s.width = x.sizes[3];
  s.out_channels = weight.sizes[0];
  s.kernel_height = weight.sizes.size() == 4 ? weight.sizes[2] : 1;
  s.kernel_width = weight.sizes.size() == 4 ? weight.sizes[3] : 1;
  s.window = window;
  s.channels_last = channels_last;

  if (epilogue) check_batch_norm(op, x, *epilogue, s.out_channels);
  if (bias) check_vector(op, *bias, x, "C_out", s.out_channels);

  auto [left, right, top, bottom] = window.padding;
  int64_t padded_height = s.height + top + bottom, padded_width = s.width + left + right;
  if (s.kernel_height > padded_height || s.kernel_width > padded_width)
    fail(op, std::string(weight.name) + " must have a kernel no larger than the padded input " + tuple_text(std::array{padded_height, padded_width}),
         tuple_text(std::array{s.kernel_height, s.kernel_width}));
  s.out_height = (padded_height - s.kernel_height) / window.stride[0] + 1;
  s.out_width = (padded_width - s.kernel_width) / window.stride[1] + 1;

  if (residual) {
    check_like_input(op, *residual, x);
    const auto out = s.out_sizes();
    if (residual->sizes.size() != 4 || !std::equal(out.begin(), out.end(), residual->sizes.begin()))
      fail(op, std::string(residual->name) + " must be " + tuple_text(out) + " like the output", tuple_text(residual->sizes));
  }

  if (x.on_cuda()) {
    check_indexable(op, "", x.name, {s.batch, s.in_channels, s.height, s.width});
    check_indexable(op, "", weight.name, {s.out_channels, s.in_channels, s.kernel_height, s.kernel_width});
    check_indexable(op, "", out_name, {s.batch, s.out_channels, pooled ? 1 : s.out_height, pooled ? 1 : s.out_width});
    check_indexable(op, "the padded height of ", x.name, {padded_height});
    check_indexable(op, "the padded width of ", x.name, {padded_width});
  }
  return s;
}

}  // namespace

void fail(const char* op, const std::string& expected, const std::string& actual) {
  throw std::runtime_error(std::string("effnet::") + op + ": " + expected + ", got " + actual);
}

Meta::Meta(const char* name, const Tensor& t) : name(name), sizes(t.sizes()) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
}

bool Meta::on_cuda() const { return device_type == aoti_torch_device_type_cuda(); }
std::string Meta::dtype_text() const { return effnet::dtype_text(dtype); }
std::string Meta::device_text() const { return effnet::device_text(device_type, device_index); }

Activation parse_activation(const char* op, StringHandle name, const char* argument) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
  const std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(name));
  if (text == "none") return Activation::none;
  if (text == "relu") return Activation::relu;
  if (text == "relu6") return Activation::relu6;
  std::string actual;
  for (char c : text) actual += c ? std::string(1, c) : "\\x00";  // which would end the message
  fail(op, std::string(argument) + " must be 'none', 'relu' or 'relu6'", "'" + actual + "'");
}

Window window(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::string& prefix) {
  auto within = [](const std::vector<int64_t>& numbers, size_t count, int64_t least) {
    bool good = numbers.size() == count;
    for (int64_t n : numbers) good = good && n >= least && n <= kMaxInt32;
    return good;
  };
  if (!within(stride, 2, 1)) fail(op, prefix + "stride must be two numbers from 1 to 2147483647", tuple_text(stride));
  if (!within(padding, 4, 0)) fail(op, prefix + "padding must be four numbers (left, right, top, bottom) from 0 to 2147483647", tuple_text(padding));
  return {.stride = {stride[0], stride[1]}, .padding = {padding[0], padding[1], padding[2], padding[3]}};
}

std::optional<bool> channels_last(const char* op, const std::optional<torch::headeronly::MemoryFormat>& format) {
  using torch::headeronly::MemoryFormat;
  if (!format) return std::nullopt;
  if (*format == MemoryFormat::Contiguous) return false;
  if (*format == MemoryFormat::ChannelsLast) return true;
  fail(op, "memory_format must be contiguous_format or channels_last", *format == MemoryFormat::Preserve ? "preserve_format" : "channels_last_3d");
}

ConvShape check_pointwise(const char* op, const ConvOperands& operands, bool pooled) {
  const Meta &x = operands.x, &weight = operands.weight;
  check_image(op, x);
  check_like_input(op, weight, x);
  auto w = weight.sizes;
  bool matrix = w.size() == 2 || (w.size() == 4 && w[2] == 1 && w[3] == 1);
  if (!matrix || w[0] < 1 || w[1] != x.sizes[1])
    fail(op, std::string(weight.name) + " must be (C_out, C_in, 1, 1) or (C_out, C_in) with C_in = " + std::to_string(x.sizes[1]), tuple_text(w));
  return check_convolution(op, operands, {}, pooled);
}

ConvShape check_depthwise(const char* op, const ConvOperands& operands, const Window& window) {
  const Meta &x = operands.x, &weight = operands.weight;
  check_image(op, x);
  check_like_input(op, weight, x);
  auto w = weight.sizes;
  if (w.size() != 4 || w[0] != x.sizes[1] || w[1] != 1 || w[2] != w[3] || (w[2] != 3 && w[2] != 5))
    fail(op, std::string(weight.name) + " must be (C, 1, k, k) with C = " + std::to_string(x.sizes[1]) + " and k = 3 or 5", tuple_text(w));
  if (window.stride[0] > 2 || window.stride[1] > 2) fail(op, "stride must be 1 or 2 in each direction", tuple_text(window.stride));
  return check_convolution(op, operands, window, /*pooled=*/false);
}

ConvShape check_conv(const char* op, const ConvOperands& operands, const Window& window) {
  const Meta &x = operands.x, &weight = operands.weight;
  check_image(op, x);
  check_like_input(op, weight, x);
  auto w = weight.sizes;
  if (w.size() != 4 || w[0] < 1 || w[1] != x.sizes[1] || w[2] < 1 || w[3] < 1)
    fail(op, std::string(weight.name) + " must be (C_out, C_in, k_h, k_w) with C_in = " + std::to_string(x.sizes[1]), tuple_text(w));
  return check_convolution(op, operands, window, /*pooled=*/false);
}

// The first of them decides.
void check_biases_alike(const char* op, std::initializer_list<const std::optional<Meta>*> biases) {
  const Meta* first = nullptr;
  for (const auto* bias : biases) {
    if (!*bias) continue;
    if (!first) first = &**bias;
    if ((*bias)->dtype != first->dtype) fail(op, std::string((*bias)->name) + " must be " + first->dtype_text() + " like " + first->name, (*bias)->dtype_text());
  }
}

ExpandDepthwiseShape check_expand_depthwise(const char* op, const ExpandDepthwiseOperands& o, const Window& window) {
  ExpandDepthwiseShape s;
  s.expand = check_pointwise(op, {.x = o.x, .channels_last = o.channels_last, .weight = o.expand_weight, .bias = o.expand_bias, .out_name = "the expanded map"});
  const auto expanded = s.expand.out_sizes();
  const Meta map("the expanded map", expanded, o.x);
  s.depthwise = check_depthwise(op, {.x = map, .channels_last = o.channels_last, .weight = o.depthwise_weight, .bias = o.depthwise_bias}, window);
  check_biases_alike(op, {&o.expand_bias, &o.depthwise_bias});
  return s;
}

MbconvShape check_mbconv(const char* op, const MbconvOperands& o, const Window& window) {
  MbconvShape s;
  Meta x = o.x;
  std::array<int64_t, 4> expanded, filtered;
  if (o.expand_weight) {
    s.expand = check_pointwise(op, {.x = x, .channels_last = o.channels_last, .weight = *o.expand_weight, .bias = o.expand_bias, .out_name = "the expanded map"});
    expanded = s.expand->out_sizes();
    x = Meta("the expanded map", expanded, o.x);
  } else if (o.expand_bias) {
    fail(op, "expand_bias must be None where expand_weight is", tuple_text(o.expand_bias->sizes));
  }
  s.depthwise = check_depthwise(op, {.x = x, .channels_last = o.channels_last, .weight = o.depthwise_weight, .bias = o.depthwise_bias, .out_name = "the filtered map"}, window);
  filtered = s.depthwise.out_sizes();
  x = Meta("the filtered map", filtered, o.x);
  s.project = check_pointwise(op, {.x = x, .channels_last = o.channels_last, .weight = o.project_weight, .bias = o.project_bias, .residual = o.residual});
  check_biases_alike(op, {&o.expand_bias, &o.depthwise_bias, &o.project_bias});
  return s;
}

StemMbconvShape check_stem_mbconv(const char* op, const StemMbconvOperands& o, const Window& stem_window, const Window& window) {
  StemMbconvShape s;
  s.stem = check_conv(op, o.stem, stem_window);
  const auto map = s.stem.out_sizes();
  MbconvOperands block = o.block;
  block.x = Meta(o.stem.out_name, map, o.stem.x);
  s.block = check_mbconv(op, block, window);
  return s;
}

LinearShape check_linear(const char* op, const Meta& x, const Meta& weight, const std::optional<Meta>& bias) {
  if (x.sizes.size() != 2 || x.sizes[1] < 1) fail(op, "x must be (rows, in_features) with in_features at least 1", tuple_text(x.sizes));
  check_input_dtype(op, x);
  check_like_input(op, weight, x);
  auto w = weight.sizes;
  if (w.size() != 2 || w[0] < 1 || w[1] != x.sizes[1])
    fail(op, "weight must be (out_features, in_features) with in_features = " + std::to_string(x.sizes[1]), tuple_text(w));
  if (bias) check_vector(op, *bias, x, "out_features", w[0]);
  if (x.on_cuda()) {
    check_indexable(op, "", "x", {x.sizes[0], x.sizes[1]});
    check_indexable(op, "", "weight", {w[0], w[1]});
    check_indexable(op, "", "the output", {x.sizes[0], w[0]});
  }
  return {.rows = x.sizes[0], .in_features = x.sizes[1], .out_features = w[0]};
}

FoldShape check_fold_batch_norm(const char* op, const Meta& weight, const Epilogue& batch_norm, std::optional<ScalarType> dtype, bool taps_first) {
  auto w = weight.sizes;
  if ((w.size() != 2 && w.size() != 4) || std::any_of(w.begin(), w.end(), [](int64_t size) { return size < 1; }))
    fail(op, "weight must be (C_out, C_in, k_h, k_w) or (C_out, C_in), each at least 1", tuple_text(w));
  check_input_dtype(op, weight);
  check_batch_norm(op, weight, batch_norm, w[0], "weight");

  // Folding rounds, it never widens.
  const bool is_double = weight.dtype == aoti_torch_dtype_float64(), is_half = !is_double && weight.dtype != aoti_torch_dtype_float32();
  const int32_t wanted = dtype ? code_of(*dtype) : weight.dtype;
  const bool is_half_wanted = wanted == aoti_torch_dtype_float16() || wanted == aoti_torch_dtype_bfloat16();
  if (wanted != weight.dtype && (is_half || !(is_half_wanted || (is_double && wanted == aoti_torch_dtype_float32())))) {
    const std::string narrower = is_half ? weight.dtype_text() + " like weight" : std::string(is_double ? "float64, " : "") + "float32, float16 or bfloat16";
    fail(op, "dtype must be " + narrower, dtype_text(wanted));
  }
  if (taps_first && (w.size() != 4 || w[1] != 1)) fail(op, "weight must be (C, 1, k_h, k_w) with taps_first", tuple_text(w));

  const bool matrix = w.size() == 2;
  FoldShape s{.out_channels = w[0], .in_channels = w[1], .kernel_height = matrix ? 1 : w[2], .kernel_width = matrix ? 1 : w[3], .rank = int(w.size()), .taps_first = taps_first};
  s.bias_dtype = wanted == aoti_torch_dtype_float64() ? ScalarType::Double : ScalarType::Float;
  s.dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(wanted));
  if (weight.on_cuda()) check_indexable(op, "", "weight", {s.out_channels, s.in_channels, s.kernel_height, s.kernel_width});
  return s;
}

int32_t code_of(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

std::optional<Meta> optional_meta(const char* name, const Tensor* t) { return t ? std::make_optional<Meta>(name, *t) : std::nullopt; }

ConvOperands operands(const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
  return {.x = Meta("x", x), .channels_last = prefers_channels_last(x), .weight = Meta("weight", weight), .bias = optional_meta("bias", epilogue.bias),
          .residual = optional_meta("residual", epilogue.residual), .batch_norm = epilogue.has_batch_norm() ? &epilogue : nullptr};
}

ExpandDepthwiseOperands operands(const Tensor& x, const ExpandDepthwise& beginning) {
  return {.x = Meta("x", x), .channels_last = prefers_channels_last(x),
          .expand_weight = Meta("expand_weight", *beginning.expand_weight), .expand_bias = optional_meta("expand_bias", beginning.expand_bias),
          .depthwise_weight = Meta("depthwise_weight", *beginning.depthwise_weight), .depthwise_bias = optional_meta("depthwise_bias", beginning.depthwise_bias)};
}

MbconvOperands operands(const Tensor& x, const Mbconv& block) {
  return {.x = Meta("x", x), .channels_last = prefers_channels_last(x),
          .expand_weight = optional_meta("expand_weight", block.expand_weight), .expand_bias = optional_meta("expand_bias", block.expand_bias),
          .depthwise_weight = Meta("depthwise_weight", *block.depthwise_weight), .depthwise_bias = optional_meta("depthwise_bias", block.depthwise_bias),
          .project_weight = Meta("project_weight", *block.project_weight), .project_bias = optional_meta("project_bias", block.project_bias),
          .residual = optional_meta("residual", block.residual)};
}

StemMbconvOperands operands(const Tensor& x, const StemMbconv& both) {
  StemMbconvOperands o{.stem = {.x = Meta("x", x), .channels_last = both.channels_last.value_or(prefers_channels_last(x)), .weight = Meta("stem_weight", *both.stem_weight),
                                .bias = optional_meta("stem_bias", both.stem_bias), .out_name = kStemMap},
                       .block = operands(x, both.block)};
  o.block.channels_last = o.stem.channels_last;
  return o;
}

bool prefers_channels_last(const Tensor& x) {
  if (x.dim() != 4 || is_contiguous(x)) return false;
  return is_channels_last(x) || (x.size(1) > 1 && x.stride(1) == 1);
}

bool is_contiguous(const Tensor& t) { return t.is_contiguous(); }

bool is_reachable(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += std::max<int64_t>(t.size(d) - 1, 0) * t.stride(d);
  return last <= kMaxInt32 && std::all_of(t.strides().begin(), t.strides().end(), [](int64_t s) { return s <= kMaxInt32; });
}

bool is_channels_last(const Tensor& t) {
  auto sizes = t.sizes(), strides = t.strides();
  if (sizes.size() != 4) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1) {
      if (strides[d] != expected) return false;
      expected *= sizes[d];
    }
  }
  return true;
}

}  // namespace effnet
