// What the three programs share.
#pragma once

#include <ATen/ATen.h>
#include <torch/cuda.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

inline at::Device choose_device(const std::string& name) {
  if (name == "cuda" || (name.empty() && torch::cuda::is_available())) return at::Device(at::kCUDA, 0);
  if (name == "cpu" || name.empty()) return at::kCPU;
  throw std::invalid_argument("device must be cpu or cuda, got " + name);
}

// max |actual - expected| / max |expected|; a NaN in actual is an infinite error.
inline double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor difference = actual.to(at::kDouble) - expected.to(actual.device(), at::kDouble);
  if (difference.isnan().any().item<bool>()) return INFINITY;
  return difference.abs().max().item<double>() / expected.to(at::kDouble).abs().max().item<double>();
}

template <class Program>
int run_program(Program program) {
  try {
    return program();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
