// The C API: checks what a C caller hands over, turns it into a problem of kernels.h, and exceptions into codes.
#include "effnet_aot/c_api.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <string>
#include <tuple>
#include <utility>

#include "effnet_aot/introspection.h"
#include "kernels.h"

namespace effnet {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

thread_local std::string last_error;

int failed(int status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {  // no memory for the message; the code still tells
    last_error.clear();
  }
  return status;
}

int status_of(Failure failure) {
  switch (failure) {
    case Failure::invalid_argument: return EFFNET_INVALID_ARGUMENT;
    case Failure::no_driver: return EFFNET_NO_DRIVER;
    case Failure::no_image: return EFFNET_NO_IMAGE;
    case Failure::driver: return EFFNET_DRIVER_ERROR;
  }
  return EFFNET_INTERNAL_ERROR;
}

// No exception may pass through a C caller's frames.
template <class Body>
int guarded(Body body) noexcept {
  try {
    body();
    return EFFNET_OK;
  } catch (const Error& e) {
    return failed(status_of(e.failure), e.what());
  } catch (const std::bad_alloc&) {
    return failed(EFFNET_INTERNAL_ERROR, "effnet_aot: out of host memory");
  } catch (const std::exception& e) {
    return failed(EFFNET_INTERNAL_ERROR, e.what());
  } catch (...) {
    return failed(EFFNET_INTERNAL_ERROR, "effnet_aot: unknown error");
  }
}

[[noreturn]] void invalid(const std::string& where, const std::string& expected, const std::string& actual) {
  throw Error(Failure::invalid_argument, where + ": " + expected + ", got " + actual);
}

// The checks of one call, which name the function and the member.
struct Checker {
  const char* where;

  [[noreturn]] void fail(const std::string& expected, const std::string& actual) const { invalid(where, expected, actual); }

  // A caller compiled against an older header passes a shorter struct, whose missing members are zero; one compiled
  // against a newer header may pass a longer one as long as it uses nothing that this library does not know.
  template <class Struct>
  Struct read(const char* name, const Struct* given, size_t oldest) const {
    if (!given) fail(std::string(name) + " must not be null", "null");
    const size_t size = given->struct_size;
    if (size < oldest || size > 4096)
      fail(std::string(name) + "->struct_size must be sizeof(" + name + ") = " + std::to_string(sizeof(Struct)), std::to_string(size));
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    for (size_t i = sizeof(Struct); i < size; ++i)
      if (bytes[i]) fail(std::string(name) + " must use no members beyond the " + std::to_string(sizeof(Struct)) + " bytes that this library knows", "a value in byte " + std::to_string(i));
    Struct copy{};
    std::memcpy(static_cast<void*>(&copy), given, std::min(size, sizeof(Struct)));
    return copy;
  }

  int64_t number(const char* name, int64_t value, int64_t least, int64_t most = kMaxInt32) const {
    if (value < least || value > most)
      fail(std::string(name) + " must be from " + std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
    return value;
  }

  void address(const char* name, const void* pointer, size_t element) const {
    if (!pointer) fail(std::string(name) + " must not be null", "null");
    if (reinterpret_cast<uintptr_t>(pointer) % element)
      fail(std::string(name) + " must be aligned to its elements of " + std::to_string(element) + " bytes", "an address that is not");
  }

  void addresses(const void* x, const void* weight, const void* out, Precision precision) const {
    address("x", x, bytes_of_x(precision));
    address("weight", weight, bytes_of_weight(precision));
    address("out", out, bytes_of_out(precision));
  }

  // Offsets are computed in 32 bits on the device.
  void indexable(const char* name, std::initializer_list<int64_t> sizes) const {
    int64_t elements = 1;
    for (int64_t size : sizes)
      if (__builtin_mul_overflow(elements, size, &elements)) elements = std::numeric_limits<int64_t>::max();
    if (elements > kMaxInt32) fail(std::string(name) + " must have at most 2147483647 elements", std::to_string(elements));
  }

  void strides(const char* name, const int64_t (&strides)[4], std::initializer_list<int64_t> sizes) const {
    int64_t last = 0, dimension = 0;
    for (int64_t size : sizes) {
      const int64_t stride = number(name, strides[dimension++], 0);
      int64_t reach;
      if (__builtin_mul_overflow(size - 1, stride, &reach) || __builtin_add_overflow(last, reach, &last)) last = std::numeric_limits<int64_t>::max();
    }
    if (last > kMaxInt32) fail(std::string(name) + " must reach no element beyond 2147483647", std::to_string(last));
  }

  // `narrow`: those with a narrow map that the function knows besides.
  Precision precision(int32_t value, std::initializer_list<Precision> narrow = {}) const {
    for (Precision p : narrow)
      if (value == static_cast<int32_t>(p)) return p;
    return Precision(number("precision", value, EFFNET_FP16, EFFNET_FP32));
  }
  bool channels_last(int32_t layout) const { return number("layout", layout, EFFNET_NCHW, EFFNET_NHWC) == EFFNET_NHWC; }

  // The activation's bounds.
  std::pair<float, float> clamp(const char* name, int32_t activation) const {
    number(name, activation, EFFNET_LINEAR, EFFNET_RELU6);
    return {activation == EFFNET_LINEAR ? -INFINITY : 0.f, activation == EFFNET_RELU6 ? 6.f : INFINITY};
  }

  Tail tail(const effnet_epilogue* given, Precision precision) const;
};

Tail Checker::tail(const effnet_epilogue* given, Precision precision) const {
  Tail tail{};
  tail.low = -INFINITY, tail.high = INFINITY;
  if (!given) return tail;
  const auto e = read("epilogue", given, sizeof(effnet_epilogue));
  tail.vectors_are_fp32 = number("epilogue->vectors_are_fp32", e.vectors_are_fp32, 0, 1) == 1 && bytes_of_element(precision) == 2;
  const size_t bytes = tail.vectors_are_fp32 ? 4 : bytes_of_element(precision);

  const void* vectors[] = {e.bn_weight, e.bn_bias, e.bn_mean, e.bn_var};
  const char* names[] = {"epilogue->bn_weight", "epilogue->bn_bias", "epilogue->bn_mean", "epilogue->bn_var"};
  tail.batch_norm = std::any_of(std::begin(vectors), std::end(vectors), [](const void* v) { return v; });
  if (tail.batch_norm) {
    if (e.bias) fail("epilogue->bias must be null beside batch norm", "both");
    if (!(e.bn_eps >= 0)) fail("epilogue->bn_eps must be at least 0", std::to_string(e.bn_eps));
    for (int i = 0; i < 4; ++i) address(names[i], tail.vectors[i] = vectors[i], bytes);
    tail.eps = e.bn_eps;
  } else if (e.bias) {
    address("epilogue->bias", tail.vectors[0] = e.bias, bytes);
  }
  std::tie(tail.low, tail.high) = clamp("epilogue->activation", e.activation);
  return tail;
}

// One direction of a convolution, with the names that its numbers have in the structs.
struct Axis {
  const char *size_name, *before_name, *after_name, *stride_name;
  int64_t size, before, after, kernel, stride;
};

int64_t out_size(const Checker& check, const Axis& a, int64_t largest_stride = kMaxInt32) {
  check.number(a.size_name, a.size, 1);
  check.number(a.before_name, a.before, 0);
  check.number(a.after_name, a.after, 0);
  check.number(a.stride_name, a.stride, 1, largest_stride);
  const int64_t padded = a.size + a.before + a.after;
  check.number((std::string("padded ") + a.size_name).c_str(), padded, a.kernel);
  return (padded - a.kernel) / a.stride + 1;
}

// Of products that were made one.
Precision merged_precision(const Checker& check, int32_t precision, int32_t layout) {
  if (precision != EFFNET_FP16 && precision != EFFNET_TF32) check.fail("precision must be EFFNET_FP16 or EFFNET_TF32", std::to_string(precision));
  if (layout != EFFNET_NHWC) check.fail("layout must be EFFNET_NHWC", std::to_string(layout));
  return Precision(precision);
}

constexpr size_t kSixteenBits = 2;

// The part that the 1x1 convolutions share.
PointwiseProblem pointwise_problem(const char* op, const Checker& check, const effnet_pointwise* given, bool pooled, bool merged = false) {
  const auto p = check.read("effnet_pointwise", given, offsetof(effnet_pointwise, weight_scale));
  using enum Precision;
  const Precision precision = merged   ? merged_precision(check, p.precision, p.layout)
                              : pooled ? check.precision(p.precision)
                                       : check.precision(p.precision, {narrowing, widening, widening16});
  PointwiseProblem problem{.op = op, .precision = precision, .channels_last = check.channels_last(p.layout), .x = p.x, .weight = p.weight, .out = p.out,
                           .batch = check.number("batch", p.batch, 0), .pixels = check.number("height", p.height, 1) * check.number("width", p.width, 1),
                           .in_channels = check.number("in_channels", p.in_channels, 1), .out_channels = check.number("out_channels", p.out_channels, 1),
                           .tail = check.tail(p.epilogue, precision), .variant = p.variant};
  check.indexable("x", {problem.batch, problem.in_channels, problem.pixels});
  check.indexable("weight", {problem.out_channels, problem.in_channels});
  check.indexable("out", {problem.batch, problem.out_channels, pooled ? 1 : problem.pixels});
  if (pooled && p.residual) check.fail("residual must be null", "an address");
  if (p.residual && precision == narrowing) check.fail("residual must be null with EFFNET_NARROWING", "an address");
  const bool scaled = merged || precision == widening16;
  if (p.weight_scale && !scaled) check.fail("weight_scale must be null where precision is not EFFNET_WIDENING16", "an address");
  if (merged && (problem.tail.batch_norm || !problem.tail.vectors[0])) check.fail("epilogue must have a bias", problem.tail.batch_norm ? "batch norm" : "none");
  if (merged && precision == fp16 && !problem.tail.vectors_are_fp32) check.fail("epilogue->vectors_are_fp32 must be 1", "0");
  if (problem.batch == 0) return problem;
  check.addresses(p.x, p.weight, p.out, merged && precision == tf32 ? widening16 : precision);  // which is stored as that is
  if (p.residual) check.address("residual", problem.tail.residual = p.residual, bytes_of_element(precision));
  if (scaled) check.address("weight_scale", problem.weight_scale = p.weight_scale, sizeof(float));
  return problem;
}

// A dense convolution, with the strides that its problem points to. Without `stores` its result has no address.
struct Convolution {
  Convolution(const Checker& check, const effnet_conv* given, bool stores) {
    const auto p = check.read("effnet_conv", given, sizeof(effnet_conv));
    const Precision precision = check.precision(p.precision);
    const bool channels_last = check.channels_last(p.layout);
    check.number("batch", p.batch, 0);
    check.number("in_channels", p.in_channels, 1);
    check.number("out_channels", p.out_channels, 1);
    check.number("kernel_y", p.kernel_y, 1);
    check.number("kernel_x", p.kernel_x, 1);
    const int64_t out_height = out_size(check, {"height", "top", "bottom", "stride_y", p.height, p.top, p.bottom, p.kernel_y, p.stride_y});
    const int64_t out_width = out_size(check, {"width", "left", "right", "stride_x", p.width, p.left, p.right, p.kernel_x, p.stride_x});
    check.indexable("x", {p.batch, p.in_channels, p.height, p.width});
    check.indexable("weight", {p.out_channels, p.in_channels, p.kernel_y, p.kernel_x});
    check.indexable("out", {p.batch, p.out_channels, out_height, out_width});
    const Tail tail = check.tail(p.epilogue, precision);
    const int64_t plane = p.height * p.width, taps = p.kernel_y * p.kernel_x;
    const int64_t rows_first[4] = {p.in_channels * plane, plane, p.width, 1}, dense[4] = {p.in_channels * taps, taps, p.kernel_x, 1};
    std::copy_n(p.x_strides ? p.x_strides : rows_first, 4, x_strides);
    std::copy_n(p.weight_strides ? p.weight_strides : dense, 4, weight_strides);
    if (channels_last && !p.x_strides) x_strides[1] = 1, x_strides[2] = p.width * p.in_channels, x_strides[3] = p.in_channels;
    if (p.batch > 0) {
      check.strides("x_strides", x_strides, {p.batch, p.in_channels, p.height, p.width});
      check.strides("weight_strides", weight_strides, {p.out_channels, p.in_channels, p.kernel_y, p.kernel_x});
      check.address("x", p.x, bytes_of_element(precision));
      check.address("weight", p.weight, bytes_of_element(precision));
      if (stores) check.address("out", p.out, bytes_of_out(precision));
    }
    problem = {.op = "conv", .precision = precision, .channels_last = channels_last, .x = p.x, .weight = p.weight, .out = p.out, .batch = p.batch,
               .in_channels = p.in_channels, .height = p.height, .width = p.width, .out_channels = p.out_channels, .out_height = out_height,
               .out_width = out_width, .kernel_y = p.kernel_y, .kernel_x = p.kernel_x, .stride_y = p.stride_y, .stride_x = p.stride_x, .left = p.left,
               .top = p.top, .x_strides = x_strides, .weight_strides = weight_strides, .tail = tail, .variant = p.variant};
  }
  Convolution(const Convolution&) = delete;

  int64_t x_strides[4], weight_strides[4];
  ConvProblem problem;
};

// The numbers and addresses that effnet_expand_depthwise and effnet_mbconv share, and what they make of them. Without
// `loads` x has no address.
template <class Problem, class Struct>
Problem expanding_problem(const char* op, const Checker& check, const Struct& p, bool loads = true, bool merged = false) {
  constexpr bool projects = requires { p.out_channels; };
  const Precision precision = merged     ? merged_precision(check, p.precision, p.layout)
                              : projects ? check.precision(p.precision)
                                         : check.precision(p.precision, {Precision::narrowing});
  const bool channels_last = check.channels_last(p.layout);
  check.number("batch", p.batch, 0);
  check.number("in_channels", p.in_channels, 1);
  check.number("hidden", p.hidden, 1);
  if constexpr (projects) check.number("out_channels", p.out_channels, 1);
  if (p.kernel != 3 && p.kernel != 5) check.fail("kernel must be 3 or 5", std::to_string(p.kernel));
  const int64_t out_height = out_size(check, {"height", "top", "bottom", "stride_y", p.height, p.top, p.bottom, p.kernel, p.stride_y}, 2);
  const int64_t out_width = out_size(check, {"width", "left", "right", "stride_x", p.width, p.left, p.right, p.kernel, p.stride_x}, 2);
  if constexpr (projects) {
    if (!p.expand_weight && p.expand_bias) check.fail("expand_bias must be null where expand_weight is", "an address");
    if (!p.expand_weight && p.hidden != p.in_channels)
      check.fail("hidden must be in_channels, " + std::to_string(p.in_channels) + ", where expand_weight is null", std::to_string(p.hidden));
  }
  check.indexable("x", {p.batch, p.in_channels, p.height, p.width});
  check.indexable("expanded x", {p.batch, p.hidden, p.height, p.width});
  check.indexable("filtered x", {p.batch, p.hidden, out_height, out_width});
  check.indexable("expand_weight", {p.hidden, p.in_channels});
  check.indexable("depthwise_weight", {p.hidden, p.kernel, p.kernel});

  const size_t element = bytes_of_element(precision);
  const bool fp32_biases = check.number("biases_are_fp32", p.biases_are_fp32, 0, 1) == 1;
  const size_t bias_element = fp32_biases ? 4 : element;
  const bool taps_first = check.number("depthwise_taps_first", p.depthwise_taps_first, 0, 1) == 1;
  const auto [low, high] = check.clamp("activation", p.activation);
  if (p.batch > 0) {
    if (loads) check.address("x", p.x, merged ? kSixteenBits : element);
    check.address("depthwise_weight", p.depthwise_weight, element);
    check.address("out", p.out, merged ? kSixteenBits : bytes_of_out(precision));
    if (p.expand_weight || !projects) check.address("expand_weight", p.expand_weight, merged ? kSixteenBits : element);
    if (p.expand_bias) check.address("expand_bias", p.expand_bias, bias_element);
    if (p.depthwise_bias) check.address("depthwise_bias", p.depthwise_bias, bias_element);
  }
  Problem problem{.op = op, .precision = precision, .channels_last = channels_last};
  problem.x = p.x, problem.expand_weight = p.expand_weight, problem.expand_bias = p.expand_bias;
  problem.depthwise_weight = p.depthwise_weight, problem.depthwise_bias = p.depthwise_bias, problem.out = p.out;
  problem.batch = p.batch, problem.in_channels = p.in_channels, problem.hidden = p.hidden, problem.height = p.height, problem.width = p.width;
  problem.out_height = out_height, problem.out_width = out_width, problem.kernel = p.kernel;
  problem.stride_y = p.stride_y, problem.stride_x = p.stride_x, problem.left = p.left, problem.top = p.top;
  problem.low = low, problem.high = high, problem.vectors_are_fp32 = fp32_biases && element == 2, problem.depthwise_taps_first = taps_first;
  problem.variant = p.variant;
  return problem;
}

constexpr size_t kOldestExpandDepthwise = offsetof(effnet_expand_depthwise, expand_scale);

// Their workspaces are for the callers to look at.
ExpandDepthwiseProblem expand_depthwise_problem(const Checker& check, const effnet_expand_depthwise& p) {
  if (p.expand_scale) check.fail("expand_scale must be null", "an address");
  return expanding_problem<ExpandDepthwiseProblem>("expand_depthwise", check, p);
}

ExpandDepthwiseProblem merged_depthwise_problem(const Checker& check, const effnet_expand_depthwise& p) {
  auto problem = expanding_problem<ExpandDepthwiseProblem>("merged_depthwise", check, p, /*loads=*/true, /*merged=*/true);
  if (problem.batch > 0) check.address("expand_scale", problem.expand_scale = p.expand_scale, sizeof(float));
  return problem;
}

constexpr size_t kOldestMbconv = offsetof(effnet_mbconv, narrow_depthwise_weight);

MbconvProblem mbconv_problem(const Checker& check, const effnet_mbconv& p, bool loads = true) {
  MbconvProblem problem = expanding_problem<MbconvProblem>("mbconv", check, p, loads);
  check.indexable("project_weight", {p.out_channels, p.hidden});
  check.indexable("out", {p.batch, p.out_channels, problem.out_height, problem.out_width});
  problem.project_weight = p.project_weight, problem.project_bias = p.project_bias, problem.residual = p.residual, problem.out_channels = p.out_channels;
  if (p.batch == 0) return problem;
  const size_t element = bytes_of_element(problem.precision);
  check.address("project_weight", p.project_weight, element);
  if (p.residual) check.address("residual", p.residual, element);
  if (p.project_bias) check.address("project_bias", p.project_bias, p.biases_are_fp32 ? 4 : element);
  const std::pair<const char*, const void*> weights[] = {{"narrow_depthwise_weight", p.narrow_depthwise_weight}, {"narrow_project_weight", p.narrow_project_weight}};
  const std::pair<const char*, const void*> scales[] = {{"narrow_depthwise_scale", p.narrow_depthwise_scale}, {"narrow_project_scale", p.narrow_project_scale}};
  const auto given = [](const auto& of) { return of.second != nullptr; };
  if (std::none_of(std::begin(weights), std::end(weights), given) && std::none_of(std::begin(scales), std::end(scales), given)) return problem;
  if (problem.precision != Precision::tf32) check.fail("narrow weights must be null where precision is not EFFNET_TF32", "an address");
  for (const auto& [name, address] : weights) check.address(name, address, kSixteenBits);
  for (const auto& [name, address] : scales) check.address(name, address, sizeof(float));
  problem.narrow = {p.narrow_depthwise_weight, p.narrow_depthwise_scale, p.narrow_project_weight, p.narrow_project_scale};
  return problem;
}

// A workspace is there where bytes() are needed. The kernels were chosen by the alignment that it is to have.
template <class Bytes>
void check_workspace(const Checker& check, const void* workspace, Bytes bytes, size_t element, const char* function) {
  if (workspace) check.address("workspace", workspace, element);
  if (workspace && reinterpret_cast<uintptr_t>(workspace) % 16 == 0) return;
  const int64_t needed = bytes();
  if (needed == 0) return;
  if (workspace) check.fail("workspace must lie on a 16-byte boundary", "an address that does not");
  check.fail("workspace must have " + std::to_string(needed) + " bytes, see " + function + "()", "null");
}

// A stem and the block on its map.
struct StemAndBlock {
  StemAndBlock(const Checker& check, const effnet_stem_mbconv* given)
      : p(check.read("effnet_stem_mbconv", given, sizeof(effnet_stem_mbconv))), stem(check, p.stem, /*stores=*/false) {
    problem.stem = stem.problem;
    problem.block = mbconv_problem(check, check.read("effnet_mbconv", p.block, kOldestMbconv), /*loads=*/false);
    problem.variant = p.variant;
    const ConvProblem& s = problem.stem;
    const MbconvProblem& b = problem.block;
    auto agree = [&](const char* name, int64_t given, int64_t expected) {
      if (given != expected) check.fail(std::string("block->") + name + " must be " + std::to_string(expected) + " like the stem's", std::to_string(given));
    };
    agree("precision", int64_t(b.precision), int64_t(s.precision));
    agree("layout", b.channels_last, s.channels_last);
    agree("batch", b.batch, s.batch);
    agree("in_channels", b.in_channels, s.out_channels);
    agree("height", b.height, s.out_height);
    agree("width", b.width, s.out_width);
    problem.stem.op = problem.block.op = "stem_mbconv";
  }

  effnet_stem_mbconv p;
  Convolution stem;
  StemMbconvProblem problem;
};

}  // namespace
}  // namespace effnet

using namespace effnet;

const char* effnet_last_error(void) { return last_error.c_str(); }

size_t effnet_kernel_count(void) {
  size_t count = 0;
  for (const Variant& v : variants()) count += v.images.size();
  return count;
}

int effnet_kernel_info(size_t index, effnet_kernel* kernel) {
  return guarded([&] {
    const Checker check{"effnet_kernel_info"};
    if (!kernel) check.fail("kernel must not be null", "null");
    if (kernel->struct_size < sizeof(effnet_kernel))
      check.fail("kernel->struct_size must be sizeof(effnet_kernel) = " + std::to_string(sizeof(effnet_kernel)), std::to_string(kernel->struct_size));
    size_t left = index;
    for (const Variant& v : variants()) {
      if (left >= v.images.size()) {
        left -= v.images.size();
        continue;
      }
      const Image& i = v.images[left];
      *kernel = {.struct_size = kernel->struct_size, .op = v.op, .variant = v.name, .symbol = v.kernel, .capability = i.capability,
                 .kind = i.kind == ImageKind::cubin ? EFFNET_CUBIN : EFFNET_PTX, .registers = i.registers, .spills = i.spills,
                 .shared = i.shared, .threads = i.threads, .image = i.data, .image_size = i.size, .sha256 = i.sha256};
      return;
    }
    check.fail("index must be below " + std::to_string(effnet_kernel_count()), std::to_string(index));
  });
}

int effnet_device_image(int device, char* buffer, size_t size) {
  return guarded([&] {
    const Checker check{"effnet_device_image"};
    if (!buffer) check.fail("buffer must not be null", "null");
    const std::string image = device_image(device).image;
    if (image.size() >= size) check.fail("size must be at least " + std::to_string(image.size() + 1), std::to_string(size));
    std::memcpy(buffer, image.c_str(), image.size() + 1);
  });
}

int effnet_preload(int device) {
  return guarded([&] { preload(device); });
}

int effnet_launch_pointwise(const effnet_pointwise* given, int device, void* stream) {
  return guarded([&] {
    const auto problem = pointwise_problem("pointwise", {"effnet_launch_pointwise"}, given, /*pooled=*/false);
    if (problem.batch > 0) launch_pointwise(problem, {device, stream});
  });
}

int effnet_launch_pointwise_pool(const effnet_pointwise* given, int device, void* stream) {
  return guarded([&] {
    const auto problem = pointwise_problem("pointwise_pool", {"effnet_launch_pointwise_pool"}, given, /*pooled=*/true);
    if (problem.batch > 0) launch_pointwise_pool(problem, {device, stream});
  });
}

int effnet_launch_merged_pool(const effnet_pointwise* given, int device, void* stream) {
  return guarded([&] {
    const auto problem = pointwise_problem("merged_pool", {"effnet_launch_merged_pool"}, given, /*pooled=*/true, /*merged=*/true);
    if (problem.batch > 0) launch_merged_pool(problem, {device, stream});
  });
}

int effnet_launch_merge_weights(const effnet_merge_weights* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_merge_weights"};
    const auto p = check.read("effnet_merge_weights", given, sizeof(effnet_merge_weights));
    if (p.precision != EFFNET_FP16 && p.precision != EFFNET_FP32) check.fail("precision must be EFFNET_FP16 or EFFNET_FP32", std::to_string(p.precision));
    const Precision precision{p.precision};
    check.number("rows", p.rows, 1);
    check.number("depth", p.depth, 1);
    check.number("columns", p.columns, 1);
    check.indexable("first", {p.depth, p.columns});
    check.indexable("second", {p.rows, p.depth});
    check.indexable("out", {p.rows, p.columns});
    check.address("first", p.first, bytes_of_weight(precision));
    check.address("second", p.second, bytes_of_weight(precision));
    for (const auto& [name, address] : std::initializer_list<std::pair<const char*, const void*>>{
             {"first_bias", p.first_bias}, {"second_bias", p.second_bias}, {"out", p.out}, {"out_bias", p.out_bias}})
      check.address(name, address, sizeof(float));
    launch_merge_weights({.op = "merge_weights", .precision = precision, .first = p.first, .first_bias = p.first_bias, .second = p.second, .second_bias = p.second_bias,
                          .out = p.out, .out_bias = p.out_bias, .rows = p.rows, .depth = p.depth, .columns = p.columns, .variant = p.variant}, {device, stream});
  });
}

int effnet_launch_narrow_weight(const effnet_narrow_weight* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_narrow_weight"};
    const auto p = check.read("effnet_narrow_weight", given, offsetof(effnet_narrow_weight, taps_first));
    check.number("rows", p.rows, 1);
    check.number("depth", p.depth, 1);
    check.indexable("weight", {p.rows, p.depth});
    check.address("weight", p.weight, sizeof(float));
    check.address("out", p.out, bytes_of_weight(Precision::widening16));
    check.address("scale", p.scale, sizeof(float));
    const bool taps_first = check.number("taps_first", p.taps_first, 0, 1) == 1;
    launch_narrow_weight({.op = "narrow_weight", .weight = p.weight, .out = p.out, .scale = p.scale, .rows = p.rows, .depth = p.depth, .taps_first = taps_first, .variant = p.variant},
                         {device, stream});
  });
}

int effnet_launch_depthwise(const effnet_depthwise* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_depthwise"};
    const auto p = check.read("effnet_depthwise", given, sizeof(effnet_depthwise));
    const Precision precision = check.precision(p.precision, {Precision::narrow});
    const bool channels_last = check.channels_last(p.layout);
    check.number("batch", p.batch, 0);
    check.number("channels", p.channels, 1);
    if (p.kernel != 3 && p.kernel != 5) check.fail("kernel must be 3 or 5", std::to_string(p.kernel));
    const int64_t out_height = out_size(check, {"height", "top", "bottom", "stride_y", p.height, p.top, p.bottom, p.kernel, p.stride_y}, 2);
    const int64_t out_width = out_size(check, {"width", "left", "right", "stride_x", p.width, p.left, p.right, p.kernel, p.stride_x}, 2);
    check.indexable("x", {p.batch, p.channels, p.height, p.width});
    check.indexable("weight", {p.channels, p.kernel, p.kernel});
    check.indexable("out", {p.batch, p.channels, out_height, out_width});
    const Tail tail = check.tail(p.epilogue, precision);
    if (p.batch == 0) return;
    check.addresses(p.x, p.weight, p.out, precision);
    launch_depthwise({.op = "depthwise", .precision = precision, .channels_last = channels_last, .x = p.x, .weight = p.weight, .out = p.out, .batch = p.batch,
                      .channels = p.channels, .height = p.height, .width = p.width, .out_height = out_height, .out_width = out_width, .kernel = p.kernel,
                      .stride_y = p.stride_y, .stride_x = p.stride_x, .left = p.left, .top = p.top, .tail = tail, .variant = p.variant}, {device, stream});
  });
}

int effnet_launch_conv(const effnet_conv* given, int device, void* stream) {
  return guarded([&] {
    const Convolution conv({"effnet_launch_conv"}, given, /*stores=*/true);
    if (conv.problem.batch > 0) launch_conv(conv.problem, {device, stream});
  });
}

int effnet_launch_linear(const effnet_linear* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_linear"};
    const auto p = check.read("effnet_linear", given, sizeof(effnet_linear));
    const Precision precision = check.precision(p.precision);
    check.number("rows", p.rows, 0);
    check.number("in_features", p.in_features, 1);
    check.number("out_features", p.out_features, 1);
    check.indexable("x", {p.rows, p.in_features});
    check.indexable("weight", {p.out_features, p.in_features});
    check.indexable("out", {p.rows, p.out_features});
    const Tail tail = check.tail(p.epilogue, precision);
    if (p.rows == 0) return;
    check.addresses(p.x, p.weight, p.out, precision);
    launch_linear({.op = "linear", .precision = precision, .x = p.x, .weight = p.weight, .out = p.out, .rows = p.rows, .in_features = p.in_features,
                   .out_features = p.out_features, .tail = tail, .variant = p.variant}, {device, stream});
  });
}

int effnet_launch_fold_batch_norm(const effnet_fold_batch_norm* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_fold_batch_norm"};
    const auto p = check.read("effnet_fold_batch_norm", given, sizeof(effnet_fold_batch_norm));
    const auto stored = [](Precision precision) { return precision == Precision::tf32 ? Precision::fp32 : precision; };
    const Precision precision = stored(check.precision(p.precision));
    check.number("out_precision", p.out_precision, EFFNET_FP16, EFFNET_FP32);
    const Precision out_precision = stored(Precision(p.out_precision));
    if (precision != Precision::fp32 && out_precision != precision) check.fail("out_precision must be precision where that is not FP32", std::to_string(p.out_precision));
    check.number("out_channels", p.out_channels, 1);
    check.number("in_channels", p.in_channels, 1);
    check.number("kernel_y", p.kernel_y, 1);
    check.number("kernel_x", p.kernel_x, 1);
    check.indexable("weight", {p.out_channels, p.in_channels, p.kernel_y, p.kernel_x});
    const bool taps_first = check.number("taps_first", p.taps_first, 0, 1) == 1;
    if (taps_first && p.in_channels != 1) check.fail("in_channels must be 1 with taps_first", std::to_string(p.in_channels));

    const Tail tail = check.tail(p.epilogue, precision);
    if (!tail.batch_norm) check.fail("epilogue must have a batch norm", "none");
    if (p.epilogue->activation != EFFNET_LINEAR) check.fail("epilogue->activation must be EFFNET_LINEAR", std::to_string(p.epilogue->activation));
    int64_t weight_strides[4] = {p.in_channels * p.kernel_y * p.kernel_x, p.kernel_y * p.kernel_x, p.kernel_x, 1};
    if (p.weight_strides) std::copy_n(p.weight_strides, 4, weight_strides);
    check.strides("weight_strides", weight_strides, {p.out_channels, p.in_channels, p.kernel_y, p.kernel_x});
    check.address("weight", p.weight, bytes_of_element(precision));
    check.address("out", p.out, bytes_of_element(out_precision));
    check.address("out_bias", p.out_bias, 4);
    launch_fold_batch_norm({.op = "fold_batch_norm", .precision = precision, .out_precision = out_precision, .weight = p.weight, .out = p.out,
                            .out_bias = p.out_bias, .out_channels = p.out_channels, .in_channels = p.in_channels, .kernel_y = p.kernel_y,
                            .kernel_x = p.kernel_x, .weight_strides = weight_strides, .tail = tail, .taps_first = taps_first, .variant = p.variant}, {device, stream});
  });
}

int effnet_expand_depthwise_workspace(const effnet_expand_depthwise* given, int device, size_t* bytes) {
  return guarded([&] {
    const Checker check{"effnet_expand_depthwise_workspace"};
    if (!bytes) check.fail("bytes must not be null", "null");
    const auto problem = expand_depthwise_problem(check, check.read("effnet_expand_depthwise", given, kOldestExpandDepthwise));
    *bytes = problem.batch == 0 ? 0 : expand_depthwise_workspace(problem, {.device = device});
  });
}

int effnet_launch_expand_depthwise(const effnet_expand_depthwise* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_expand_depthwise"};
    const auto p = check.read("effnet_expand_depthwise", given, kOldestExpandDepthwise);
    const auto problem = expand_depthwise_problem(check, p);
    if (problem.batch == 0) return;
    check_workspace(check, p.workspace, [&] { return expand_depthwise_workspace(problem, {.device = device}); }, bytes_of_element(problem.precision), "effnet_expand_depthwise_workspace");
    launch_expand_depthwise(problem, p.workspace, {device, stream});
  });
}

int effnet_launch_merged_depthwise(const effnet_expand_depthwise* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_merged_depthwise"};
    const auto problem = merged_depthwise_problem(check, check.read("effnet_expand_depthwise", given, kOldestExpandDepthwise));
    if (problem.batch > 0) launch_merged_depthwise(problem, {device, stream});
  });
}

int effnet_mbconv_workspace(const effnet_mbconv* given, int device, size_t* bytes) {
  return guarded([&] {
    const Checker check{"effnet_mbconv_workspace"};
    if (!bytes) check.fail("bytes must not be null", "null");
    const auto problem = mbconv_problem(check, check.read("effnet_mbconv", given, kOldestMbconv));
    *bytes = problem.batch == 0 ? 0 : mbconv_workspace(problem, {.device = device});
  });
}

int effnet_launch_mbconv(const effnet_mbconv* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_mbconv"};
    const auto p = check.read("effnet_mbconv", given, kOldestMbconv);
    const auto problem = mbconv_problem(check, p);
    if (problem.batch == 0) return;
    check_workspace(check, p.workspace, [&] { return mbconv_workspace(problem, {.device = device}); }, bytes_of_element(problem.precision), "effnet_mbconv_workspace");
    launch_mbconv(problem, p.workspace, {device, stream});
  });
}

int effnet_stem_mbconv_workspace(const effnet_stem_mbconv* given, int device, size_t* bytes) {
  return guarded([&] {
    const Checker check{"effnet_stem_mbconv_workspace"};
    if (!bytes) check.fail("bytes must not be null", "null");
    const StemAndBlock both(check, given);
    *bytes = both.problem.stem.batch == 0 ? 0 : stem_mbconv_workspace(both.problem, {.device = device});
  });
}

int effnet_launch_stem_mbconv(const effnet_stem_mbconv* given, int device, void* stream) {
  return guarded([&] {
    const Checker check{"effnet_launch_stem_mbconv"};
    const StemAndBlock both(check, given);
    if (both.problem.stem.batch == 0) return;
    if (both.p.workspace) {
      check.address("workspace", both.p.workspace, bytes_of_element(both.problem.stem.precision));
    } else if (const int64_t bytes = stem_mbconv_workspace(both.problem, {.device = device})) {
      check.fail("workspace must have " + std::to_string(bytes) + " bytes, see effnet_stem_mbconv_workspace()", "null");
    }
    launch_stem_mbconv(both.problem, both.p.workspace, {device, stream});
  });
}
