// The table of kernels that the build embeds: data only, generated from triton_src/ (registry.cpp in the build folder).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace effnet {

enum class ImageKind { cubin, ptx };

// One compiled kernel for one compute capability (89 is 8.9); PTX serves that capability and all later ones.
struct Image {
  int capability;
  ImageKind kind;
  const unsigned char* data;  // PTX is zero-terminated
  size_t size;
  int registers;  // per thread
  int spills;     // bytes per thread
  int shared;     // bytes of dynamic shared memory per block
  int threads;    // per block
  bool dependent_launch;  // waits by itself for the kernel in front of it on the stream before it touches a map, so that it may be launched early
  const char* sha256;
};

// A number by which variants of one op are told apart, as its file in triton_src/ names it: "block_m", "aligned", ...
struct Attribute {
  const char* name;
  int value;
};

struct Variant {
  const char* op;
  const char* name;
  const char* kernel;   // the symbol in every image
  int parameters;       // run-time parameters, without Triton's two trailing pointers
  std::span<const Attribute> attributes;
  std::span<const Image> images;
  int index;  // in variants()
  bool is_default = true;  // false: serves only shapes of which a tuning table says so, and has images for that table's GPUs alone

  // The value of an attribute, or -1 where this op's variants do not have it.
  int operator[](std::string_view attribute) const {
    for (const auto& a : attributes)
      if (a.name == attribute) return a.value;
    return -1;
  }
};

std::span<const Variant> variants();

// A number that decides which variant is fast for a problem, by name: {"in_channels", 24}.
struct Extent {
  std::string_view name;
  int64_t value;
};

// A line of the tuning table: what was the fastest for this shape at this batch, by the images of this capability.
struct Tuned {
  int capability;
  const char* op;
  const char* precision;
  int variant;  // in variants(), or -1: it is faster without one
  int64_t batch;
  std::span<const Extent> shape;
};

std::span<const Tuned> tuned();

extern const char* const kTritonVersion;
extern const char* const kPtxasVersion;

}  // namespace effnet
