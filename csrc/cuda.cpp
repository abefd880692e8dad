// The CUDA implementation of every op on tensors: check, return early, make the output, launch. What is launched is
// decided in <op>.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "adapters.h"
#include "network.h"
#include "problems.h"
#include "torch_runtime.h"

namespace effnet {
namespace {

Place place_of(const Tensor& x) {
  const int device = static_cast<int>(x.get_device_index());
  return {device, current_stream(device)};
}

Precision precision_of(const Tensor& x, bool tf32) { return effnet::precision_of(x.scalar_type(), tf32); }

// A vector is read once, without strides; a sliced one (rare) is copied.
struct Vectors {
  std::array<std::optional<Tensor>, 4> copies;
  int count = 0;

  const void* data(const Tensor& t) {
    if (is_contiguous(t)) return t.const_data_ptr();
    return copies[count++].emplace(torch::stable::contiguous(t)).const_data_ptr();
  }
};

Tail tail_of(const Epilogue& epilogue, const Tensor& x, Vectors& vectors) {
  Tail tail{};
  std::tie(tail.low, tail.high) = bounds(epilogue.activation);
  const Tensor* first = epilogue.has_batch_norm() ? epilogue.bn_weight : epilogue.bias;
  if (first) tail.vectors_are_fp32 = first->scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Float;
  if (epilogue.has_batch_norm()) {
    tail.batch_norm = true;
    tail.eps = static_cast<float>(epilogue.eps);
    const Tensor* all[] = {epilogue.bn_weight, epilogue.bn_bias, epilogue.bn_mean, epilogue.bn_var};
    for (int i = 0; i < 4; ++i) tail.vectors[i] = vectors.data(*all[i]);
  } else if (epilogue.bias) {
    tail.vectors[0] = vectors.data(*epilogue.bias);
  }
  return tail;
}

Tensor empty(const Tensor& like, int32_t dtype, std::span<const int64_t> sizes, std::span<const int64_t> strides) {
  check_not_forked();  // torch's allocator would crash there
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cuda(),
                                                         static_cast<int32_t>(like.get_device_index()), &out));
  return Tensor(out);
}

Tensor empty(const Tensor& like, std::span<const int64_t> sizes, std::span<const int64_t> strides) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(like, dtype, sizes, strides);
}

Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  return empty(like, aoti_torch_dtype_uint8(), std::array<int64_t, 1>{bytes}, std::array<int64_t, 1>{1});
}

Tensor empty_image(const Tensor& like, const ConvShape& s, bool channels_last) {
  const int64_t n = s.batch, c = s.out_channels, h = s.out_height, w = s.out_width;
  const std::array<int64_t, 4> sizes{n, c, h, w};
  const auto strides = channels_last ? std::array<int64_t, 4>{c * h * w, 1, w * c, c} : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
  return empty(like, sizes, strides);
}

Tensor empty_image(const Tensor& like, const StepShape& s) { return empty_image(like, s.image(), s.image().channels_last); }

Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return empty(like, std::array<int64_t, 2>{rows, columns}, std::array<int64_t, 2>{columns, 1});
}

// The kernels read dense images; a view with other strides is copied once, into the format of the output.
Tensor dense(const Tensor& x, bool channels_last) {
  if (channels_last ? is_channels_last(x) : is_contiguous(x)) return x;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor dense(const Tensor& t) { return is_contiguous(t) ? t : torch::stable::contiguous(t); }

// Whether this bias, where there is one, is float32 beside an x of another type.
bool are_fp32(const Tensor* bias, const Tensor& x) { return bias && bias->scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Float; }

// The tensors of a chain of convolutions: their addresses, and what had to be copied, or is only held.
struct Operands {
  std::array<std::optional<Tensor>, 8> owned;
  int count = 0;

  const void* address(Tensor t) { return owned[count++].emplace(std::move(t)).const_data_ptr(); }
  const void* matrix(const Tensor* t) { return t ? address(dense(*t)) : nullptr; }

  // What expand_depthwise and mbconv share but for x.
  template <class Problem, class Block>
  void read_beginning(Problem& problem, const Block& block) {
    problem.expand_weight = matrix(block.expand_weight), problem.expand_bias = matrix(block.expand_bias);
    problem.depthwise_taps_first = is_taps_first(*block.depthwise_weight);
    problem.depthwise_weight = problem.depthwise_taps_first ? block.depthwise_weight->const_data_ptr() : matrix(block.depthwise_weight);
    problem.depthwise_bias = matrix(block.depthwise_bias);
  }
};

// A block but for its maps.
MbconvProblem block_problem(const char* op, const Tensor& x, const Mbconv& block, const MbconvShape& s, Operands& tensors) {
  const Tensor* first_bias = block.expand_bias ? block.expand_bias : block.depthwise_bias ? block.depthwise_bias : block.project_bias;
  MbconvProblem problem = mbconv_problem(op, precision_of(x, tf32_for_convolutions()), s, block.activation);
  tensors.read_beginning(problem, block);
  problem.project_weight = tensors.matrix(block.project_weight), problem.project_bias = tensors.matrix(block.project_bias);
  problem.vectors_are_fp32 = are_fp32(first_bias, x);
  return problem;
}

struct Cuda {
  static Tensor pointwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
    const ConvShape s = check_pointwise(op, operands(x, weight, epilogue));
    Tensor out = empty_image(x, s, s.channels_last);
    if (s.out_numel() == 0) return out;

    const Tensor input = dense(x, s.channels_last), matrix = dense(weight);
    Vectors vectors;
    Tail tail = tail_of(epilogue, x, vectors);
    std::optional<Tensor> residual;
    if (epilogue.residual) tail.residual = residual.emplace(dense(*epilogue.residual, s.channels_last)).const_data_ptr();
    launch_pointwise(pointwise_problem(op, precision_of(x, tf32_for_convolutions()), s, input.const_data_ptr(), matrix.const_data_ptr(), out.mutable_data_ptr(), tail), place_of(x));
    return out;
  }

  static Tensor pointwise_pool(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
    const ConvShape s = check_pointwise(op, operands(x, weight, epilogue), /*pooled=*/true);
    Tensor out = empty_matrix(x, s.batch, s.out_channels);
    if (s.batch == 0) return out;

    const Tensor input = dense(x, s.channels_last), matrix = dense(weight);
    Vectors vectors;
    const Tail tail = tail_of(epilogue, x, vectors);
    launch_pointwise_pool(pointwise_problem(op, precision_of(x, tf32_for_convolutions()), s, input.const_data_ptr(), matrix.const_data_ptr(), out.mutable_data_ptr(), tail), place_of(x));
    return out;
  }

  static Tensor depthwise(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const Window& window) {
    const ConvShape s = check_depthwise(op, operands(x, weight, epilogue), window);
    Tensor out = empty_image(x, s, s.channels_last);
    if (s.out_numel() == 0) return out;

    const bool taps_first = is_taps_first(weight);
    const Tensor input = dense(x, s.channels_last), taps = taps_first ? weight : dense(weight);
    Vectors vectors;
    const Tail tail = tail_of(epilogue, x, vectors);
    launch_depthwise(depthwise_problem(op, precision_of(x, false), s, input.const_data_ptr(), taps.const_data_ptr(), taps_first, out.mutable_data_ptr(), tail), place_of(x));
    return out;
  }

  static Tensor conv(const char* op, const Tensor& x, const Tensor& weight, const Epilogue& epilogue, const Window& window, std::optional<bool> format) {
    const ConvShape s = check_conv(op, operands(x, weight, epilogue), window);
    const bool channels_last = format.value_or(s.channels_last);
    Tensor out = empty_image(x, s, channels_last);
    if (s.out_numel() == 0) return out;

    const Tensor input = is_reachable(x) ? x : dense(x), filters = is_reachable(weight) ? weight : dense(weight);
    Vectors vectors;
    const Tail tail = tail_of(epilogue, x, vectors);
    launch_conv(conv_problem(op, precision_of(x, tf32_for_convolutions()), s, channels_last, input.const_data_ptr(), input.strides().data(),
                             filters.const_data_ptr(), filters.strides().data(), out.mutable_data_ptr(), tail), place_of(x));
    return out;
  }

  static Tensor linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor* bias) {
    const LinearShape s = check_linear(op, Meta("x", x), Meta("weight", weight), optional_meta("bias", bias));
    Tensor out = empty_matrix(x, s.rows, s.out_features);
    if (s.rows == 0) return out;

    const Tensor input = dense(x), matrix = dense(weight);
    Vectors vectors;
    const Tail tail = tail_of({.bias = bias}, x, vectors);
    launch_linear(linear_problem(op, precision_of(x, tf32_for_matmul()), s, input.const_data_ptr(), matrix.const_data_ptr(), out.mutable_data_ptr(), tail), place_of(x));
    return out;
  }

  static Tensor expand_depthwise(const char* op, const Tensor& x, const ExpandDepthwise& beginning) {
    const ExpandDepthwiseShape s = check_expand_depthwise(op, operands(x, beginning), beginning.window);
    const bool channels_last = s.depthwise.channels_last;
    Tensor out = empty_image(x, s.depthwise, channels_last);
    if (s.depthwise.out_numel() == 0) return out;

    Operands tensors;
    ExpandDepthwiseProblem problem = expand_depthwise_problem(op, precision_of(x, tf32_for_convolutions()), s, beginning.activation);
    tensors.read_beginning(problem, beginning);
    problem.x = tensors.address(dense(x, channels_last));
    problem.out = out.mutable_data_ptr();
    problem.vectors_are_fp32 = are_fp32(beginning.expand_bias ? beginning.expand_bias : beginning.depthwise_bias, x);
    const Place place = place_of(x);
    const Tensor workspace = empty_bytes(x, expand_depthwise_workspace(problem, place));
    launch_expand_depthwise(problem, workspace.mutable_data_ptr(), place);
    return out;
  }

  static Tensor mbconv(const char* op, const Tensor& x, const Mbconv& block) {
    const MbconvShape s = check_mbconv(op, operands(x, block), block.window);
    const bool channels_last = s.project.channels_last;
    Tensor out = empty_image(x, s.project, channels_last);
    if (s.project.out_numel() == 0) return out;

    Operands tensors;
    MbconvProblem problem = block_problem(op, x, block, s, tensors);
    problem.x = tensors.address(dense(x, channels_last));
    problem.residual = block.residual ? tensors.address(dense(*block.residual, channels_last)) : nullptr;
    problem.out = out.mutable_data_ptr();
    const Place place = place_of(x);
    const Tensor workspace = empty_bytes(x, mbconv_workspace(problem, place));
    launch_mbconv(problem, workspace.mutable_data_ptr(), place);
    return out;
  }

  static Tensor stem_mbconv(const char* op, const Tensor& x, const StemMbconv& both) {
    const StemMbconvShape s = check_stem_mbconv(op, operands(x, both), both.stem_window, both.block.window);
    Tensor out = empty_image(x, s.block.project, s.stem.channels_last);
    if (s.block.project.out_numel() == 0) return out;

    const Tensor input = is_reachable(x) ? x : dense(x), filters = is_reachable(*both.stem_weight) ? *both.stem_weight : dense(*both.stem_weight);
    Vectors vectors;
    Operands tensors;
    const Tail tail = tail_of({.bias = both.stem_bias, .activation = both.stem_activation}, x, vectors);
    StemMbconvProblem problem{.stem = conv_problem(op, precision_of(x, tf32_for_convolutions()), s.stem, s.stem.channels_last, input.const_data_ptr(), input.strides().data(),
                                                   filters.const_data_ptr(), filters.strides().data(), nullptr, tail),
                              .block = block_problem(op, x, both.block, s.block, tensors)};
    problem.block.out = out.mutable_data_ptr();
    const Place place = place_of(x);
    const Tensor workspace = empty_bytes(x, stem_mbconv_workspace(problem, place));
    launch_stem_mbconv(problem, workspace.mutable_data_ptr(), place);
    return out;
  }

  static Folded fold_batch_norm(const char* op, const Tensor& weight, const Epilogue& epilogue, std::optional<ScalarType> dtype, bool taps_first) {
    const FoldShape s = check_fold_batch_norm(op, Meta("weight", weight), epilogue, dtype, taps_first);
    const size_t rank = static_cast<size_t>(s.rank);
    const auto sizes = s.sizes(), strides = s.strides();
    Tensor out = empty(weight, code_of(s.dtype), std::span(sizes).first(rank), std::span(strides).first(rank));
    Tensor bias = empty(weight, code_of(s.bias_dtype), std::array{s.out_channels}, std::array<int64_t, 1>{1});

    const Tensor given = is_reachable(weight) ? weight : dense(weight);
    int64_t weight_strides[4] = {};
    std::copy(given.strides().begin(), given.strides().end(), weight_strides);
    Vectors vectors;
    const Tail tail = tail_of(epilogue, weight, vectors);
    launch_fold_batch_norm({.op = op, .precision = precision_of(weight, /*tf32=*/false), .out_precision = effnet::precision_of(s.dtype, /*tf32=*/false),
                            .weight = given.const_data_ptr(), .out = out.mutable_data_ptr(), .out_bias = bias.mutable_data_ptr(), .out_channels = s.out_channels,
                            .in_channels = s.in_channels, .kernel_y = s.kernel_height, .kernel_x = s.kernel_width, .weight_strides = weight_strides,
                            .tail = tail, .taps_first = taps_first}, place_of(weight));
    return {out, bias};
  }

  static Prepared prepare(std::vector<Tensor>& weights, std::span<const int64_t> program) {
    const char* op = "_hold_network";
    const auto steps = parse_program(program, weights.size());
    Prepared prepared;
    const auto make = [](const Tensor& like, int32_t dtype, int64_t count) { return empty(like, dtype, std::array{count}, std::array<int64_t, 1>{1}); };
    // Returns the index of the weight, which its scale follows.
    const auto append_narrow = [&](const Tensor& like, const Tensor& weight, int64_t rows, int64_t depth, bool taps_first = false) {
      Tensor narrow = make(like, aoti_torch_dtype_float16(), rows * depth), scale = make(like, aoti_torch_dtype_float32(), rows);
      launch_narrow_weight({.op = op, .weight = weight.const_data_ptr(), .out = narrow.mutable_data_ptr(), .scale = scale.mutable_data_ptr(), .rows = rows, .depth = depth,
                            .taps_first = taps_first}, place_of(like));
      weights.insert(weights.end(), {narrow, scale});
      return static_cast<int64_t>(weights.size()) - 2;
    };
    for (const MergeablePair& pair : has_merged_kernels() ? mergeable_pairs(steps, weights) : std::vector<MergeablePair>{}) {
      const Tensor first = weights[pair.first_weight], second = weights[pair.second_weight];
      if (!first.is_cuda() || second.get_device_index() != first.get_device_index()) continue;
      const int64_t rows = second.sizes()[0], depth = first.sizes()[0], columns = first.sizes()[1];
      Tensor product = make(first, aoti_torch_dtype_float32(), rows * columns), bias = make(first, aoti_torch_dtype_float32(), rows);
      launch_merge_weights({.op = op, .precision = precision_of(first, /*tf32=*/false), .first = first.const_data_ptr(),
                            .first_bias = weights[pair.first_bias].const_data_ptr(), .second = second.const_data_ptr(),
                            .second_bias = weights[pair.second_bias].const_data_ptr(), .out = product.mutable_data_ptr(), .out_bias = bias.mutable_data_ptr(),
                            .rows = rows, .depth = depth, .columns = columns}, place_of(first));
      const int64_t narrow = append_narrow(first, product, rows, columns);
      weights.push_back(bias);
      prepared.merged.push_back({pair.step, narrow, narrow + 1, narrow + 2});
    }
    for (NarrowBlock block : narrowable_blocks(steps, weights)) {
      for (int64_t* index : {&block.depthwise, &block.project}) {
        if (*index < 0) continue;
        const Tensor weight = weights[*index];
        const int64_t rows = weight.sizes()[0];
        *index = weight.is_cuda() ? append_narrow(weight, weight, rows, weight.numel() / rows, index == &block.depthwise) : -1;
      }
      prepared.narrow.push_back(block);
    }
    return prepared;
  }

  static Tensor network(const Tensor& x, const Network& network) {
    const auto plan = plan_network(x, network, tf32_for_convolutions(), tf32_for_matmul());
    if (plan->composed) return compose<Cuda>(plan->steps, x, network.weights);
    const Value& result = plan->result();
    Tensor out = result.rank == 2 ? empty_matrix(x, result.sizes[0], result.sizes[1]) : empty_image(x, plan->shapes.back());
    if (result.numel() == 0) return out;

    std::optional<Tensor> workspace;
    if (plan->workspace > 0) workspace = empty_bytes(x, plan->workspace);
    launch_network(*plan, x, network.weights, workspace ? workspace->mutable_data_ptr() : nullptr, out.mutable_data_ptr(), place_of(x));
    return out;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effnet, CUDA, m) { Adapters<Cuda>::register_all(m); }

}  // namespace effnet
