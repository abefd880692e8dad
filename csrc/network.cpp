// One call launches a whole network. Besides the output it allocates one workspace, in which maps take the place of those
// that no later step reads.
#include "network.h"

#include <algorithm>
#include <mutex>

#include "adapters.h"
#include "problems.h"

namespace effnet {
namespace {

constexpr int64_t kAlignment = 256;  // bytes, of everything in the workspace
constexpr size_t kPlans = 64;        // kept; a batch size more is a plan more

// Everything of a tensor that a plan depends on.
void append(std::vector<int64_t>& signature, const Tensor& t) {
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t alignment = reinterpret_cast<uintptr_t>(t.const_data_ptr()) & 15;
  signature.push_back((((int64_t{dtype} * 256 + device_type) * 256 + device_index) * 256 + static_cast<int64_t>(sizes.size())) * 16 + alignment);
  signature.insert(signature.end(), sizes.begin(), sizes.end());
  signature.insert(signature.end(), strides.begin(), strides.end());
}

// A stretch of the workspace from the step that writes it to the last that reads it.
struct Buffer {
  int64_t bytes;
  size_t first, last;
  int64_t* offset;
};

// Large ones first, each at the lowest place that no buffer of the same time has. Returns how much all take.
int64_t lay_out(std::vector<Buffer> buffers) {
  std::stable_sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.bytes > b.bytes; });
  std::vector<Buffer> placed;  // by offset
  int64_t total = 0;
  for (const Buffer& b : buffers) {
    int64_t offset = 0;
    for (const Buffer& other : placed)
      if (b.first <= other.last && other.first <= b.last && offset + b.bytes > *other.offset) offset = std::max(offset, *other.offset + other.bytes);
    *b.offset = offset;
    placed.insert(std::upper_bound(placed.begin(), placed.end(), b, [](const Buffer& a, const Buffer& o) { return *a.offset < *o.offset; }), b);
    total = std::max(total, offset + b.bytes);
  }
  return total;
}

int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Where a step's tensors are.
struct Addresses {
  const void *x, *residual;
  void *out, *scratch;
};

MbconvProblem block_problem(const NetworkPlan& plan, size_t i, ScalarType type, const std::vector<Tensor>& weights, const Addresses& at) {
  const Step& s = plan.steps[i];
  auto address = [&](int64_t index) { return index < 0 ? nullptr : weights[index].const_data_ptr(); };
  MbconvProblem p = mbconv_problem(s.op.c_str(), precision_of(type, plan.tf32_convolutions), plan.shapes[i].block, s.activation);
  p.x = at.x, p.residual = at.residual, p.out = at.out;
  p.expand_weight = address(s.expand_weight), p.expand_bias = address(s.expand_bias);
  p.depthwise_weight = address(s.weight), p.depthwise_bias = address(s.bias);
  p.project_weight = address(s.project_weight), p.project_bias = address(s.project_bias);
  p.vectors_are_fp32 = plan.places[i].vectors_are_fp32;
  p.depthwise_taps_first = is_taps_first(weights[s.weight]);
  return p;
}

// Whether the kernels can read everything where it lies.
bool reads_in_place(const NetworkPlan& plan, const Tensor& x, const std::vector<Tensor>& weights) {
  auto dense = [&](int64_t index) { return index < 0 || is_contiguous(weights[index]); };
  auto in_format = [&](int64_t number, bool channels_last) {
    if (number == 0) return x.dim() == 2 || !channels_last ? is_contiguous(x) : is_channels_last(x);
    const Value& v = plan.shapes[number - 1].out;
    // What lies the same way in both formats is in either.
    return v.rank == 2 || v.channels_last == channels_last || v.sizes[1] == 1 || v.sizes[2] * v.sizes[3] == 1;
  };
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& s = plan.steps[i];
    const bool is_conv = s.kind == StepKind::conv;
    const bool channels_last = s.kind != StepKind::linear && plan.shapes[i].image().channels_last;
    if (!dense(s.bias) || !dense(s.expand_weight) || !dense(s.expand_bias) || !dense(s.project_weight) || !dense(s.project_bias)) return false;
    if (is_conv ? !is_reachable(weights[s.weight]) || (s.input == 0 && !is_reachable(x)) : !in_format(s.input, channels_last)) return false;
    const bool any_order = is_conv || ((s.kind == StepKind::depthwise || s.kind == StepKind::mbconv) && is_taps_first(weights[s.weight]));
    if (!any_order && !dense(s.weight)) return false;
    if (s.residual >= 0 && !in_format(s.residual, channels_last)) return false;
  }
  return true;
}

std::shared_ptr<const NetworkPlan> make_plan(const Tensor& x, const std::vector<Tensor>& weights, std::span<const int64_t> program, bool tf32_convolutions, bool tf32_matmul,
                                             const std::vector<int64_t>& signature) {
  auto plan = std::make_shared<NetworkPlan>();
  plan->program.assign(program.begin(), program.end());
  plan->signature = signature;
  plan->tf32_convolutions = tf32_convolutions, plan->tf32_matmul = tf32_matmul;
  plan->steps = parse_program(program, weights.size());
  plan->shapes = infer(plan->steps, x, weights);
  plan->composed = !reads_in_place(*plan, x, weights);
  const size_t count = plan->steps.size();
  plan->places.resize(count);
  if (plan->composed || plan->result().numel() == 0) return plan;

  std::vector<size_t> last(count);  // the step that reads a result last
  for (size_t i = 0; i < count; ++i) {
    const Step& s = plan->steps[i];
    last[i] = i;
    for (int64_t number : {s.input, s.residual})
      if (number > 0) last[number - 1] = i;
  }
  const ScalarType type = x.scalar_type();
  const int64_t element = bytes_of_element(precision_of(type, false));
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < count; ++i) {
    const Step& s = plan->steps[i];
    NetworkPlan::Place& place = plan->places[i];
    for (int64_t bias : {s.bias, s.expand_bias, s.project_bias})
      if (bias >= 0) place.vectors_are_fp32 = weights[bias].scalar_type() == ScalarType::Float && type != ScalarType::Float;
    if (i + 1 < count) buffers.push_back({padded(plan->shapes[i].out.numel() * element), i, last[i], &place.result});
    if (s.kind != StepKind::mbconv) continue;
    // Only whether addresses are aligned matters here: those in the workspace are, and so is a new output.
    const void* input = s.input == 0 ? x.const_data_ptr() : nullptr;
    const void* residual = s.residual < 0 ? nullptr : s.residual == 0 ? x.const_data_ptr() : reinterpret_cast<const void*>(kAlignment);
    const int64_t bytes = mbconv_workspace(block_problem(*plan, i, type, weights, {input, residual, nullptr, nullptr}), static_cast<int>(x.get_device_index()));
    if (bytes > 0) buffers.push_back({padded(bytes), i, i, &place.scratch});
  }
  plan->workspace = lay_out(std::move(buffers));
  return plan;
}

}  // namespace

std::shared_ptr<const NetworkPlan> plan_network(const Tensor& x, const std::vector<Tensor>& weights, std::span<const int64_t> program, bool tf32_convolutions,
                                                bool tf32_matmul) {
  static thread_local std::vector<int64_t> signature;  // keeps its memory
  signature.clear();
  signature.push_back(2 * tf32_convolutions + tf32_matmul);
  append(signature, x);
  for (const Tensor& t : weights) append(signature, t);

  static std::mutex mutex;
  static auto* plans = new std::vector<std::shared_ptr<const NetworkPlan>>;  // the last used one first
  auto find = [&] {
    return std::find_if(plans->begin(), plans->end(), [&](const auto& p) { return p->signature == signature && std::ranges::equal(p->program, program); });
  };
  {
    std::lock_guard lock(mutex);
    if (auto found = find(); found != plans->end()) {
      std::rotate(plans->begin(), found, found + 1);
      return plans->front();
    }
  }
  auto plan = make_plan(x, weights, program, tf32_convolutions, tf32_matmul, signature);
  std::lock_guard lock(mutex);
  if (plans->size() >= kPlans) plans->pop_back();
  plans->insert(plans->begin(), plan);
  return plan;
}

void launch_network(const NetworkPlan& plan, const Tensor& x, const std::vector<Tensor>& weights, void* workspace, void* out, Place place) {
  char* const base = static_cast<char*>(workspace);
  const void* const image = x.const_data_ptr();
  const ScalarType type = x.scalar_type();
  const Precision convolutions = precision_of(type, plan.tf32_convolutions), matmul = precision_of(type, plan.tf32_matmul);
  auto result = [&](int64_t number) -> const void* { return number < 0 ? nullptr : number == 0 ? image : base + plan.places[number - 1].result; };
  auto address = [&](int64_t index) { return index < 0 ? nullptr : weights[index].const_data_ptr(); };

  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& s = plan.steps[i];
    const StepShape& shape = plan.shapes[i];
    const auto& [where, scratch, vectors_are_fp32] = plan.places[i];
    const Addresses at{result(s.input), result(s.residual), where < 0 ? out : base + where, scratch < 0 ? nullptr : base + scratch};
    if (s.kind == StepKind::mbconv) {
      launch_mbconv(block_problem(plan, i, type, weights, at), at.scratch, place);
      continue;
    }
    const char* op = s.op.c_str();
    const void* weight = address(s.weight);
    const auto [low, high] = bounds(s.activation);
    const Tail tail{.vectors = {address(s.bias)}, .vectors_are_fp32 = vectors_are_fp32, .low = low, .high = high, .residual = at.residual};
    switch (s.kind) {
      case StepKind::conv: {
        const ConvShape& c = shape.conv;
        const bool nhwc = s.input > 0 && plan.shapes[s.input - 1].out.channels_last;
        const int64_t plane = c.height * c.width;
        const int64_t dense[4] = {c.in_channels * plane, nhwc ? 1 : plane, nhwc ? c.width * c.in_channels : c.width, nhwc ? c.in_channels : 1};
        launch_conv(conv_problem(op, convolutions, c, c.channels_last, at.x, s.input == 0 ? x.strides().data() : dense, weight, weights[s.weight].strides().data(), at.out, tail), place);
        break;
      }
      case StepKind::pointwise: launch_pointwise(pointwise_problem(op, convolutions, shape.conv, at.x, weight, at.out, tail), place); break;
      case StepKind::pointwise_pool: launch_pointwise_pool(pointwise_problem(op, convolutions, shape.conv, at.x, weight, at.out, tail), place); break;
      case StepKind::depthwise: launch_depthwise(depthwise_problem(op, convolutions, shape.conv, at.x, weight, is_taps_first(weights[s.weight]), at.out, tail), place); break;
      case StepKind::linear: launch_linear(linear_problem(op, matmul, shape.linear, at.x, weight, at.out, tail), place); break;
      case StepKind::mbconv: break;
    }
  }
}

}  // namespace effnet
