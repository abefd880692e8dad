// Runs a kernel of the registry on a GPU. The only part that talks to the CUDA driver, which it opens at the first
// launch (never links): the library loads on machines with no driver.
//
// An image is loaded once per process and serves every device; which image serves a device is decided once per device.
// Everything here is safe to call from several threads, and inside a CUDA-graph capture. Errors are effnet::Error.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "registry.h"

namespace effnet {

// What went wrong, for callers who need to tell failures apart; the text names op, kernel and device.
enum class Failure { invalid_argument, no_driver, no_image, driver };

struct Error : std::runtime_error {
  Error(Failure failure, const std::string& message) : std::runtime_error(message), failure(failure) {}
  Failure failure;
};

// A launch that was decided but not made, to be made any number of times at other addresses.
struct PreparedLaunch {
  const char* op;  // borrowed
  const Variant* variant;
  int64_t grid;
  std::vector<uint64_t> values;     // the kernel's run-time parameters, in order
  std::vector<uint8_t> is_address;  // which of them are: see Sequence
};

// Where to run: a device by its CUDA ordinal and a stream of it (CUstream; null is the default stream). With `prepared`
// nothing runs: launches are appended there. `early`: a kernel that can may start before the one in front of it on the stream
// has ended; then its weights, which it reads before it waits for that one, must be older than the last kernel that was not early.
// `lanes`: so many parts of a batch run side by side, of which this is one.
struct Place {
  int device = 0;
  void* stream = nullptr;
  std::vector<PreparedLaunch>* prepared = nullptr;
  bool early = false;
  int lanes = 1;
};

// Launches `variant` on `grid` blocks. `arguments` are the addresses of the kernel's run-time parameters, in order, with
// two slots at the end for the pointers that Triton adds. `op` is what the user called, for messages.
void launch(const char* op, const Variant& variant, Place place, int64_t grid, std::span<void*> arguments);

// The same from values: launch(op, variant, place, grid, pointer, int32, float, ...).
template <class... Values>
void launch(const char* op, const Variant& variant, Place place, int64_t grid, Values... values) {
  if (place.prepared) {
    auto bits = [](auto value) {
      uint64_t b = 0;
      std::memcpy(&b, &value, sizeof value);
      return b;
    };
    place.prepared->push_back({op, &variant, grid, {bits(values)...}, {std::is_pointer_v<Values>...}});
    return;
  }
  std::array<void*, sizeof...(Values) + 2> addresses{static_cast<void*>(&values)...};
  launch(op, variant, place, grid, std::span<void*>(addresses));
}

// Prepared launches: lanes that do not depend on each other, and in each of them launches to be made in order, all but the first
// early. An address in them is an index into `bases`, shifted by kBaseShift, plus an offset; index 0 is null.
//
// Addresses come back, as PyTorch's allocator hands out what was just freed. Those that were seen before become a CUDA graph:
// one call of the driver instead of one a kernel, which at small batches is most of what a network costs. In a graph, this one or
// the caller's, the lanes are branches; outside of one they run one after the other, as that takes no other stream.
constexpr int kBaseShift = 44;
class Sequence {
 public:
  Sequence() = default;
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  std::vector<std::vector<PreparedLaunch>> lanes;

  // Safe to call from several threads once `lanes` are complete.
  void run(Place place, std::span<const uint64_t> bases) const;

 private:
  struct Recording {
    int device;
    std::vector<uint64_t> bases;
    void* graph = nullptr;  // CUgraphExec; null where the addresses were seen once
  };

  void launch_all(Place place, std::span<const uint64_t> bases, bool captured) const;
  void* record(Place place, std::span<const uint64_t> bases) const;

  mutable std::mutex mutex_;
  mutable std::vector<Recording> recordings_;  // the last used one first
  mutable bool records_ = true;                // until the driver refuses
};

// Throws in a child of a process that used CUDA through this library, where nothing of CUDA works any more.
void check_not_forked();

struct Device {
  int capability;       // 90 for 9.0
  int multiprocessors;
  std::string name;
};

// Throws where there is no such device, or no driver.
const Device& device_info(int device);

// The image that serves `variant` on a device of this capability, or null: the capability's own cubin, else the cubin of
// the same major and the next lower minor capability, else PTX. EFFNET_AOT_IMAGE=cubin or ptx restricts the choice.
const Image* select_image(const Variant& variant, int capability);

// Whether `variant` is for the GPUs of this capability. What only the table of others names is not, though its PTX would do.
bool is_meant_for(const Variant& variant, int capability);

// Loads every kernel for this device, so that later calls only launch. Exported: introspection.h offers it.
__attribute__((visibility("default"))) void preload(int device);

}  // namespace effnet
