// Networks on CUDA: where every map lies, decided once for tensors of the same kind, and then launched step by step.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "launcher.h"
#include "program.h"

namespace effnet {

struct NetworkPlan {
  std::vector<int64_t> program, signature;  // what the plan holds for
  std::vector<Step> steps;
  std::vector<StepShape> shapes;
  bool composed = false;  // some tensor has to be copied first, so the steps run one by one on tensors of their own

  struct Place {
    int64_t result = -1, scratch = -1;  // offsets in the workspace; -1: the result is the output, there is no scratch
    bool vectors_are_fp32 = false;
  };
  std::vector<Place> places;
  int64_t workspace = 0;  // bytes
  bool tf32_convolutions, tf32_matmul;

  const Value& result() const { return shapes.back().out; }
};

// The plan for these tensors, made at their first call and kept; throws where something does not fit.
std::shared_ptr<const NetworkPlan> plan_network(const Tensor& x, const std::vector<Tensor>& weights, std::span<const int64_t> program, bool tf32_convolutions,
                                                bool tf32_matmul);

void launch_network(const NetworkPlan& plan, const Tensor& x, const std::vector<Tensor>& weights, void* workspace, void* out, Place place);

}  // namespace effnet
