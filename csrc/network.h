// Networks: those that the library holds, and how they run on CUDA. What is checked, where every map lies, and which kernels run
// with which numbers is decided once for tensors of the same kind, and kept; a call looks it up, fills in the addresses and launches.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "launcher.h"
#include "program.h"

namespace effnet {

// What a call is handed.
struct Network {
  const std::vector<Tensor>& weights;
  std::span<const int64_t> program;
  std::span<const int64_t> signature = {};  // what plans depend on of the weights, where that is known already
};

struct HeldNetwork {
  std::vector<Tensor> weights;
  std::vector<int64_t> program, signature;

  operator Network() const { return {weights, program, signature}; }
};

// Keeps a network under a number of its own, until it is released.
int64_t hold_network(const std::vector<Tensor>& weights, std::span<const int64_t> program);
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
