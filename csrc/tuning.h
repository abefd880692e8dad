// What `python -m effnet_aot tune` asks of the library while it measures: to take a certain variant of an op, and to tell
// which choices a call makes and what else would fit. Off, it costs one load a choice.
//
// Reached through two C functions, so that a library which was built elsewhere serves any Python:
//   void tune_effnet(int on, const char* op, const char* variant)   on or off, and the variant to take (null: none)
//   const char* tune_effnet_choices(void)                           JSON lines of this thread's choices since the last call
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "registry.h"

namespace effnet {

inline std::atomic<bool> tuning_switch{false};

inline bool tuning_is_on() { return tuning_switch.load(std::memory_order_relaxed); }

// The variant of `op` that is to be taken, or "".
std::string wanted_variant(const char* op);

void record_choice(const char* op, int64_t batch, std::span<const Extent> extents, const char* chosen, const std::vector<const char*>& fitting);

}  // namespace effnet
