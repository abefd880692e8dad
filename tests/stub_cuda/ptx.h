// Executes kernels from their PTX on the CPU, as far as the instructions go that this package's kernels are made of.
#pragma once

#include <string>

namespace ptx {

struct Dim {
  unsigned x, y, z;
};

// Runs all blocks of a kernel on host memory, one after the other; the warps of a block in turns, from barrier to barrier.
// Throws std::runtime_error for what a GPU would do silently, or not at all: an unknown instruction, a barrier in divergent
// code, shared memory that is read before it is written, out of bounds, or in a race with another warp.
void launch(const char* image, const std::string& kernel, Dim grid, Dim block, unsigned shared_bytes, void** parameters);

}  // namespace ptx
