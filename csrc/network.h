// Networks: those that the library holds, and how they run on CUDA. What is checked, where every map lies, and which kernels run
// with which numbers is decided once for tensors of the same kind, and kept; a call looks it up, fills in the addresses and launches.
//
// The weights of a network that is held do not change. So products that follow each other with nothing between them, a block's
// projection and the expansion or the head behind it, are multiplied out beforehand, and a plan may take two steps' products as one; and the
// weights that float32 blocks may have narrow are made so once.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "launcher.h"
#include "program.h"

namespace effnet {

// The first product of a step, multiplied by the projection of the block before it: weight (out_channels, hidden channels of that
// block) in float16, a scale and a bias for each row in float32. They are indices into a network's weights.
struct MergedProduct {
  size_t step;
  int64_t weight, scale, bias;
};

// The weights of a block as launch_narrow_weight() makes them, each followed by its scale: indices, too; -1 where there are none.
struct NarrowBlock {
  size_t step;
  int64_t depthwise, project;
};

// What is made of the weights of a network that is held.
struct Prepared {
  std::vector<MergedProduct> merged;
  std::vector<NarrowBlock> narrow;
};

// What a call is handed.
struct Network {
  const std::vector<Tensor>& weights;  // and, behind those of the program, what `prepared` names
  std::span<const int64_t> program;
  std::span<const int64_t> signature = {};  // what plans depend on of the weights, where that is known already
  const Prepared* prepared = nullptr;
};

struct HeldNetwork {
  std::vector<Tensor> weights;
  std::vector<int64_t> program;
  Prepared prepared;
  std::vector<int64_t> signature;

  operator Network() const { return {weights, program, signature, &prepared}; }
};

// A block whose projection could be one with the first product of a step that alone reads its result. Indices of weights.
struct MergeablePair {
  size_t step;
  int64_t first_weight, first_bias, second_weight, second_bias;
};

// Of a network of float16 or float32, with float32 biases.
std::vector<MergeablePair> mergeable_pairs(const std::vector<Step>& steps, const std::vector<Tensor>& weights);

// The weights of float32 blocks that could be narrow. Indices, -1 for one that could not.
std::vector<NarrowBlock> narrowable_blocks(const std::vector<Step>& steps, const std::vector<Tensor>& weights);

// Keeps a network under a number of its own, until it is released.
int64_t hold_network(std::vector<Tensor> weights, std::span<const int64_t> program, Prepared prepared);
std::shared_ptr<const HeldNetwork> held_network(int64_t number);  // throws where no network has this number
void release_network(int64_t number);

struct NetworkPlan {
  std::vector<int64_t> program, signature;  // what the plan holds for
  std::vector<Step> steps;
  std::vector<StepShape> shapes;
  bool composed = false;  // some tensor has to be copied first, so the steps run one by one on tensors of their own

  int64_t workspace = 0;  // bytes
  Sequence sequence;

  const Value& result() const { return shapes.back().out; }
};

// The plan for these tensors, made at their first call and kept; throws where something does not fit.
std::shared_ptr<const NetworkPlan> plan_network(const Tensor& x, const Network& network, bool tf32_convolutions, bool tf32_matmul);

void launch_network(const NetworkPlan& plan, const Tensor& x, const std::vector<Tensor>& weights, void* workspace, void* out, Place place);

}  // namespace effnet
