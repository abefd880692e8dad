// One call launches a whole network. Besides the output it allocates one workspace, in which maps take the place of those
// that no later step reads.
#include "network.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <unordered_map>

#include "adapters.h"
#include "problems.h"
#include "tuning.h"

namespace effnet {
namespace {

constexpr size_t kPlans = 64;        // kept; a batch size more is a plan more

// Everything of a tensor that a plan depends on.
void append(std::vector<int64_t>& signature, const Tensor& t) {
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t alignment = reinterpret_cast<uintptr_t>(t.const_data_ptr()) & 15;  // decides between variants
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
    // Reads the picture, and the weights that it is multiplied with, through their strides.
    const bool has_stem = s.kind == StepKind::stem_mbconv, is_conv = s.kind == StepKind::conv || has_stem;
    const bool channels_last = s.kind != StepKind::linear && plan.shapes[i].image().channels_last;
    if (!dense(s.stem_bias) || !dense(s.bias) || !dense(s.expand_weight) || !dense(s.expand_bias) || !dense(s.project_weight) || !dense(s.project_bias)) return false;
    if (is_conv ? !is_reachable(weights[has_stem ? s.stem_weight : s.weight]) || (s.input == 0 && !is_reachable(x)) : !in_format(s.input, channels_last)) return false;
    const bool any_order = s.kind == StepKind::conv || ((s.kind == StepKind::depthwise || s.kind == StepKind::mbconv || has_stem) && is_taps_first(weights[s.weight]));
    if (!any_order && !dense(s.weight)) return false;
    if (s.residual >= 0 && !in_format(s.residual, channels_last)) return false;
  }
  return true;
}

// Addresses in a plan: which tensor, and how far into it. Alignment is part of what a plan holds for, so a weight's is kept.
enum Base : uint64_t { kNull, kImage, kWorkspace, kOutput, kWeights };

uint64_t alignment(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) & 15; }

void* symbol(uint64_t base, uint64_t offset) { return reinterpret_cast<void*>(base << kBaseShift | offset); }

// In how many lanes a batch runs. Kernels one after the other leave a part of the GPU idle whenever one ends; those of another lane
// fill that. With fewer pixels a multiprocessor than these, kernels of half the batch have too few blocks.
int lanes_of(const Tensor& x) {
  constexpr int64_t kPixels = 13'500;
  const auto sizes = x.sizes();
  if (x.dim() != 4 || sizes[0] % 2) return 1;
  return sizes[0] * sizes[2] * sizes[3] < kPixels * device_info(static_cast<int>(x.get_device_index())).multiprocessors ? 1 : 2;
}

// Decides where everything of a lane lies and what is launched.
struct Planner {
  const std::vector<Step>& steps;
  const Tensor& x;  // of all lanes
  const std::vector<Tensor>& weights;
  const Prepared* prepared;  // null: nothing is
  bool tf32_convolutions, tf32_matmul;
  int lanes;
  int64_t first, images;  // of x, which are this lane's
  int64_t workspace;      // where the lane's part begins, and after place_maps() where it ends

  struct At {
    int64_t result = -1, scratch = -1;  // offsets in the workspace; -1: the result is the output, there is no scratch
  };
  std::vector<At> places = std::vector<At>(steps.size());
  std::vector<StepShape> shapes = infer(steps, x, weights, images);
  ScalarType type = x.scalar_type();
  Precision convolutions = precision_of(type, tf32_convolutions);
  int device = static_cast<int>(x.get_device_index());
  mutable std::array<int64_t, 4> dense{};  // strides of the map that a convolution reads, until its launch
  std::vector<const MergedProduct*> merged = std::vector<const MergedProduct*>(steps.size());  // of every step, null where its products are its own

  // Which products are taken as one: where that was measured to be faster.
  std::vector<const MergedProduct*> merge() const {
    std::vector<const MergedProduct*> chosen(steps.size());
    if (!prepared) return chosen;
    for (const MergedProduct& m : prepared->merged) {
      const Step& s = steps[m.step];
      if (!has_mergeable_map(plain_block(s.input - 1))) continue;
      if (s.kind == StepKind::pointwise_pool ? merges_pool(pool(m.step, &m), place()) : has_mergeable_map(plain_block(m.step)) && merges_beginning(block(m.step, &m), place()))
        chosen[m.step] = &m;
    }
    return chosen;
  }

  // Whether the projection of a block is part of the step that reads its result.
  bool projects_later(size_t i) const {
    return std::any_of(merged.begin(), merged.end(), [&](const MergedProduct* m) { return m && steps[m->step].input == static_cast<int64_t>(i) + 1; });
  }

  void* image(int64_t number) const {
    if (number > 0) return symbol(kWorkspace, places[number - 1].result);
    return number < 0 ? nullptr : symbol(kImage, alignment(x) + first * x.strides()[0] * bytes_of_element(convolutions));
  }
  void* weight(int64_t index) const { return index < 0 ? nullptr : symbol(kWeights + index, alignment(weights[index])); }
  void* out(size_t i) const {
    if (places[i].result >= 0) return symbol(kWorkspace, places[i].result);
    return symbol(kOutput, first * (shapes[i].out.numel() / images) * bytes_of_element(convolutions));
  }

  bool are_fp32(std::initializer_list<int64_t> biases) const {
    for (int64_t bias : biases)
      if (bias >= 0) return weights[bias].scalar_type() == ScalarType::Float && type != ScalarType::Float;
    return false;
  }

  bool vectors_are_fp32(const Step& s) const { return are_fp32({s.bias, s.expand_bias, s.project_bias}); }

  // A convolution that reads its input through strides: the network's, or those of a map.
  ConvProblem convolution(size_t i, int64_t weight_index, const Tail& tail, void* result) const {
    const Step& s = steps[i];
    const ConvShape& c = shapes[i].conv;
    const bool nhwc = s.input > 0 && shapes[s.input - 1].out.channels_last;
    const int64_t plane = c.height * c.width, k = c.in_channels;
    dense = {k * plane, nhwc ? 1 : plane, nhwc ? c.width * k : c.width, nhwc ? k : 1};
    const int64_t* strides = s.input == 0 ? x.strides().data() : dense.data();
    return conv_problem(s.op.c_str(), convolutions, c, c.channels_last, image(s.input), strides, weight(weight_index), weights[weight_index].strides().data(), result, tail);
  }

  StemMbconvProblem stem_and_block(size_t i) const {
    const Step& s = steps[i];
    const auto [low, high] = bounds(s.stem_activation);
    const Tail tail{.vectors = {weight(s.stem_bias)}, .vectors_are_fp32 = are_fp32({s.stem_bias}), .low = low, .high = high};
    StemMbconvProblem p{.stem = convolution(i, s.stem_weight, tail, nullptr), .block = block(i)};
    p.block.x = nullptr;
    return p;
  }

  MbconvProblem block(size_t i) const {
    MbconvProblem p = merged[i] ? block(i, merged[i]) : plain_block(i);
    if (projects_later(i)) p.project_weight = nullptr, p.project_bias = nullptr;
    return p;
  }

  MbconvProblem block(size_t i, const MergedProduct* m) const {
    MbconvProblem p = plain_block(i);
    p.in_channels = shapes[steps[i].input - 1].block.project.in_channels;
    p.expand_weight = weight(m->weight), p.expand_scale = weight(m->scale), p.expand_bias = weight(m->bias);
    return p;
  }

  NarrowWeights narrow_weights(const NarrowBlock& n) const {
    NarrowWeights found;
    if (n.depthwise >= 0) found.depthwise = weight(n.depthwise), found.depthwise_scale = weight(n.depthwise + 1);
    if (n.project >= 0) found.project = weight(n.project), found.project_scale = weight(n.project + 1);
    return found;
  }

  // With all of its own products.
  MbconvProblem plain_block(size_t i) const {
    const Step& s = steps[i];
    MbconvProblem p = mbconv_problem(s.op.c_str(), convolutions, shapes[i].block, s.activation);
    p.x = image(s.input), p.residual = image(s.residual), p.out = out(i);
    p.expand_weight = weight(s.expand_weight), p.expand_bias = weight(s.expand_bias);
    p.depthwise_weight = weight(s.weight), p.depthwise_bias = weight(s.bias);
    p.project_weight = weight(s.project_weight), p.project_bias = weight(s.project_bias);
    if (prepared)
      for (const NarrowBlock& n : prepared->narrow)
        if (n.step == i) p.narrow = narrow_weights(n);
    p.vectors_are_fp32 = vectors_are_fp32(s);
    p.depthwise_taps_first = is_taps_first(weights[s.weight]);
    return p;
  }

  int64_t bytes_of_result(size_t i) const {
    if (!projects_later(i)) return shapes[i].out.numel() * bytes_of_element(convolutions);
    constexpr int64_t kSixteenBits = 2;
    return shapes[i].block.depthwise.out_numel() * kSixteenBits;
  }

  Tail tail_of(const Step& s) const {
    const auto [low, high] = bounds(s.activation);
    return {.vectors = {weight(s.bias)}, .vectors_are_fp32 = vectors_are_fp32(s), .low = low, .high = high, .residual = image(s.residual)};
  }

  PointwiseProblem pool(size_t i, const MergedProduct* m) const {
    const Step& s = steps[i];
    PointwiseProblem p = pointwise_problem(s.op.c_str(), convolutions, shapes[i].conv, image(s.input), weight(s.weight), out(i), tail_of(s));
    if (!m) return p;
    p.in_channels = shapes[s.input - 1].block.project.in_channels;
    p.weight = weight(m->weight), p.weight_scale = weight(m->scale), p.tail.vectors[0] = weight(m->bias);
    return p;
  }

  Place place(std::vector<PreparedLaunch>* prepared = nullptr) const { return {.device = device, .prepared = prepared, .lanes = lanes}; }

  void place_maps() {
    const size_t count = steps.size();
    std::vector<size_t> last(count);  // the step that reads a result last
    for (size_t i = 0; i < count; ++i) {
      last[i] = i;
      for (int64_t number : {steps[i].input, steps[i].residual})
        if (number > 0) last[number - 1] = i;
    }
    for (size_t i = 0; i + 1 < count; ++i) places[i].result = 0;  // aligned, which is all that the kernels and the size of a scratch may depend on
    merged = merge();
    std::vector<Buffer> buffers;
    for (size_t i = 0; i + 1 < count; ++i) buffers.push_back({padded(bytes_of_result(i)), i, last[i], &places[i].result});
    for (size_t i = 0; i < count; ++i) {
      const StepKind kind = steps[i].kind;
      const int64_t bytes = kind == StepKind::mbconv ? mbconv_workspace(block(i), place()) : kind == StepKind::stem_mbconv ? stem_mbconv_workspace(stem_and_block(i), place()) : 0;
      if (bytes > 0) buffers.push_back({padded(bytes), i, i, &places[i].scratch});
    }
    const int64_t begin = workspace;
    workspace += lay_out(std::move(buffers));
    for (At& at : places)
      for (int64_t* offset : {&at.result, &at.scratch})
        if (*offset >= 0) *offset += begin;
  }

  void prepare(size_t i, std::vector<PreparedLaunch>& lane) {
    const Step& s = steps[i];
    const Place place = this->place(&lane);
    void* const scratch = places[i].scratch < 0 ? nullptr : symbol(kWorkspace, places[i].scratch);
    if (s.kind == StepKind::mbconv) return launch_mbconv(block(i), scratch, place);
    if (s.kind == StepKind::stem_mbconv) return launch_stem_mbconv(stem_and_block(i), scratch, place);

    const char* op = s.op.c_str();
    const ConvShape& c = shapes[i].conv;
    void *const input = image(s.input), *const w = weight(s.weight), *const result = out(i);
    const Tail tail = tail_of(s);
    switch (s.kind) {
      case StepKind::conv: return launch_conv(convolution(i, s.weight, tail, result), place);
      case StepKind::pointwise: return launch_pointwise(pointwise_problem(op, convolutions, c, input, w, result, tail), place);
      case StepKind::pointwise_pool: return merged[i] ? launch_merged_pool(pool(i, merged[i]), place) : launch_pointwise_pool(pool(i, nullptr), place);
      case StepKind::depthwise: return launch_depthwise(depthwise_problem(op, convolutions, c, input, w, is_taps_first(weights[s.weight]), result, tail), place);
      case StepKind::linear: return launch_linear(linear_problem(op, precision_of(type, tf32_matmul), shapes[i].linear, input, w, result, tail), place);
      case StepKind::mbconv:
      case StepKind::stem_mbconv: break;
    }
  }
};

std::shared_ptr<const NetworkPlan> make_plan(const Tensor& x, const Network& network, bool tf32_convolutions, bool tf32_matmul, const std::vector<int64_t>& signature) {
  const auto& [weights, program, known, prepared] = network;
  auto plan = std::make_shared<NetworkPlan>();
  plan->program.assign(program.begin(), program.end());
  plan->signature = signature;
  plan->steps = parse_program(program, weights.size());
  plan->shapes = infer(plan->steps, x, weights);
  plan->composed = !reads_in_place(*plan, x, weights);
  if (plan->composed || plan->result().numel() == 0) return plan;

  const int lanes = lanes_of(x);
  const int64_t images = x.sizes()[0] / lanes;
  for (int lane = 0; lane < lanes; ++lane) {
    Planner planner{.steps = plan->steps, .x = x, .weights = weights, .prepared = prepared, .tf32_convolutions = tf32_convolutions, .tf32_matmul = tf32_matmul,
                    .lanes = lanes, .first = lane * images, .images = images, .workspace = plan->workspace};
    planner.place_maps();
    auto& launches = plan->sequence.lanes.emplace_back();
    for (size_t i = 0; i < plan->steps.size(); ++i) planner.prepare(i, launches);
    plan->workspace = planner.workspace;
  }
  return plan;
}

}  // namespace

std::shared_ptr<const NetworkPlan> plan_network(const Tensor& x, const Network& network, bool tf32_convolutions, bool tf32_matmul) {
  const auto& [weights, program, known, prepared] = network;
  static thread_local std::vector<int64_t> signature;  // keeps its memory
  signature.clear();
  signature.push_back(2 * tf32_convolutions + tf32_matmul);
  append(signature, x);
  signature.insert(signature.end(), known.begin(), known.end());
  if (known.empty())
    for (const Tensor& t : weights) append(signature, t);
  // What the tuner tries is no plan for others.
  if (tuning_is_on()) [[unlikely]] return make_plan(x, network, tf32_convolutions, tf32_matmul, signature);

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
  auto plan = make_plan(x, network, tf32_convolutions, tf32_matmul, signature);
  std::lock_guard lock(mutex);
  if (plans->size() >= kPlans) plans->pop_back();
  plans->insert(plans->begin(), plan);
  return plan;
}

namespace {

struct Held {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const HeldNetwork>> networks;
  int64_t last = 0;
};

Held& held() {
  static auto* all = new Held;  // whoever holds one may outlive static objects
  return *all;
}

}  // namespace

namespace {

// What fits what is checked by infer(), at the first call.
bool is_matrix(const Tensor& t, ScalarType type) { return t.scalar_type() == type && t.dim() >= 2 && is_contiguous(t) && t.numel() == t.sizes()[0] * t.sizes()[1]; }

}  // namespace

std::vector<MergeablePair> mergeable_pairs(const std::vector<Step>& steps, const std::vector<Tensor>& weights) {
  std::vector<int> readers(steps.size() + 1);
  for (const Step& s : steps) {
    ++readers[s.input];
    if (s.residual > 0) ++readers[s.residual];
  }
  const auto is_bias = [&](int64_t bias, int64_t channels) {
    return bias >= 0 && weights[bias].scalar_type() == ScalarType::Float && is_contiguous(weights[bias]) && weights[bias].numel() == channels;
  };
  std::vector<MergeablePair> pairs;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    const bool is_block = s.kind == StepKind::mbconv;
    if (s.input == 0 || readers[s.input] != 1 || !(is_block || s.kind == StepKind::pointwise_pool)) continue;
    const Step& before = steps[s.input - 1];
    if (before.kind != StepKind::mbconv || before.residual >= 0) continue;
    const MergeablePair pair{i, before.project_weight, before.project_bias, is_block ? s.expand_weight : s.weight, is_block ? s.expand_bias : s.bias};
    if (pair.second_weight < 0) continue;
    const Tensor &first = weights[pair.first_weight], &second = weights[pair.second_weight];
    const ScalarType type = first.scalar_type();
    if ((type != ScalarType::Half && type != ScalarType::Float) || !is_matrix(first, type) || !is_matrix(second, type)) continue;
    const int64_t rows = second.sizes()[0], depth = first.sizes()[0], columns = first.sizes()[1];
    if (second.sizes()[1] != depth || columns % 8 || rows * columns > std::numeric_limits<int32_t>::max()) continue;
    if (!is_bias(pair.first_bias, depth) || !is_bias(pair.second_bias, rows)) continue;
    pairs.push_back(pair);
  }
  return pairs;
}

std::vector<NarrowBlock> narrowable_blocks(const std::vector<Step>& steps, const std::vector<Tensor>& weights) {
  std::vector<NarrowBlock> found;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    if (s.kind != StepKind::mbconv || s.expand_weight < 0) continue;
    const Tensor &filters = weights[s.weight], &projection = weights[s.project_weight];
    const bool has_filters = filters.scalar_type() == ScalarType::Float && is_taps_first(filters) && filters.sizes()[0] % 8 == 0 && alignment(filters) == 0;
    const bool has_projection = is_matrix(projection, ScalarType::Float) && projection.sizes()[1] % 8 == 0 && alignment(projection) == 0;
    if (has_filters || has_projection) found.push_back({i, has_filters ? s.weight : -1, has_projection ? s.project_weight : -1});
  }
  return found;
}

int64_t hold_network(std::vector<Tensor> weights, std::span<const int64_t> program, Prepared prepared) {
  auto kept = std::make_shared<HeldNetwork>(std::move(weights), std::vector(program.begin(), program.end()), std::move(prepared));
  for (const Tensor& t : kept->weights) append(kept->signature, t);
  std::lock_guard lock(held().mutex);
  held().networks.emplace(++held().last, std::move(kept));
  return held().last;
}

std::shared_ptr<const HeldNetwork> held_network(int64_t number) {
  std::lock_guard lock(held().mutex);
  const auto found = held().networks.find(number);
  if (found == held().networks.end()) fail("_held_network", "network must be a number that _hold_network gave and _release_network did not take back", std::to_string(number));
  return found->second;
}

void release_network(int64_t number) {
  std::shared_ptr<const HeldNetwork> last;  // the weights are freed after the lock
  std::lock_guard lock(held().mutex);
  const auto found = held().networks.find(number);
  if (found == held().networks.end()) return;
  last = std::move(found->second);
  held().networks.erase(found);
}

void launch_network(const NetworkPlan& plan, const Tensor& x, const std::vector<Tensor>& weights, void* workspace, void* out, Place place) {
  static thread_local std::vector<uint64_t> bases;  // keeps its memory
  auto base = [](const void* address, uint64_t offset) { return reinterpret_cast<uint64_t>(address) - offset; };
  bases.assign({0, base(x.const_data_ptr(), alignment(x)), base(workspace, 0), base(out, 0)});
  for (const Tensor& t : weights) bases.push_back(base(t.const_data_ptr(), alignment(t)));
  plan.sequence.run(place, bases);
}

}  // namespace effnet
