// What `python -m effnet_aot tune` asks of the library while it measures: to take a certain variant of an op, and to tell
// which choices a call makes and what else would fit. Off, it costs one load a choice.
//
// Reached through two C functions, so that a library which was built elsewhere serves any Python:
//   void tune_effnet(int on, const char* wanted)   0: off, 1: takes and tells, 2: takes; which variants (null: none) are lines
//                                                  "<what> <variant>", <what> being an op or one of its problems, written
//                                                  "op/precision/batch/name=value,name=value"
//   const char* tune_effnet_choices(void)                           JSON lines of this thread's choices since the last call
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "registry.h"

namespace effnet {

inline std::atomic<bool> tuning_switch{false}, tuning_tells{false};

inline bool tuning_is_on() { return tuning_switch.load(std::memory_order_relaxed); }

// The variant that is to be taken for the problem, else the one for all of its op, else "".
std::string wanted_variant(const char* op, std::string_view precision, int64_t batch, std::span<const Extent> extents);

void record_choice(const char* op, int64_t batch, std::span<const Extent> extents, const char* chosen, const std::vector<const char*>& fitting);

}  // namespace effnet
