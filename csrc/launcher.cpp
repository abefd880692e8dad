#include "launcher.h"

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>

namespace effnet {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kSharedWithoutOptIn = 48 * 1024;

[[noreturn]] void fail(Failure failure, const std::string& message) { throw Error(failure, message); }

std::string capability_name(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

// ---- the driver ----

struct Driver {
  decltype(&cuInit) init;
  decltype(&cuDriverGetVersion) driver_version;
  decltype(&cuGetErrorName) error_name;
  decltype(&cuGetErrorString) error_string;
  decltype(&cuDeviceGetCount) device_count;
  decltype(&cuDeviceGet) device;
  decltype(&cuDeviceGetName) device_name;
  decltype(&cuDeviceGetAttribute) device_attribute;
  decltype(&cuDevicePrimaryCtxRetain) retain_primary_context;
  decltype(&cuCtxGetCurrent) current_context;
  decltype(&cuCtxPushCurrent) push_context;
  decltype(&cuCtxPopCurrent) pop_context;
  decltype(&cuThreadExchangeStreamCaptureMode) exchange_capture_mode;
  decltype(&cuLibraryLoadData) load_library;
  decltype(&cuLibraryGetKernel) get_kernel;
  decltype(&cuKernelSetAttribute) set_kernel_attribute;
  decltype(&cuKernelGetFunction) kernel_function;
  decltype(&cuLaunchKernelEx) launch_kernel;
  decltype(&cuStreamIsCapturing) is_capturing;
  decltype(&cuStreamCreate) create_stream;
  decltype(&cuStreamDestroy) destroy_stream;
  decltype(&cuStreamBeginCapture) begin_capture;
  decltype(&cuStreamEndCapture) end_capture;
  decltype(&cuGraphInstantiateWithFlags) instantiate_graph;
  decltype(&cuGraphLaunch) launch_graph;
  decltype(&cuGraphDestroy) destroy_graph;
  decltype(&cuGraphExecDestroy) destroy_graph_exec;
  // As of CUDA 12; later headers declare others by these names. Null where a driver has dropped them.
  CUresult (*capture_info)(CUstream, CUstreamCaptureStatus*, cuuint64_t* id, CUgraph*, const CUgraphNode** dependencies, size_t* count);
  CUresult (*set_capture_dependencies)(CUstream, CUgraphNode* dependencies, size_t count, unsigned flags);
  int version = 0;

  std::string describe(CUresult result) const {
    const char *name = nullptr, *text = nullptr;
    error_name(result, &name);
    error_string(result, &text);
    return std::string(name ? name : "unknown error") + " (" + std::to_string(result) + ": " + (text ? text : "no description") + ")";
  }
  void check(CUresult result, const std::string& doing) const {
    if (result != CUDA_SUCCESS) fail(Failure::driver, "effnet_aot: " + doing + " failed: " + describe(result));
  }
};

// CUDA does not survive a fork; without this the child would crash or hang inside the driver.
std::atomic<bool> started{false}, forked{false};

Driver* open_driver() {
  void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle) fail(Failure::no_driver, std::string("effnet_aot: no CUDA driver on this machine (") + dlerror() + "); the CPU implementation needs none");
  auto driver = std::make_unique<Driver>();
  auto resolve = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, symbol));
    if (function) return;
    std::string version = "unknown version";
    if (driver->driver_version && driver->driver_version(&driver->version) == CUDA_SUCCESS)
      version = "CUDA " + std::to_string(driver->version / 1000) + "." + std::to_string(driver->version % 1000 / 10);
    fail(Failure::no_driver, std::string("effnet_aot: the CUDA driver is too old: it has no ") + symbol + ", which came with CUDA 12.0; this one is of " + version);
  };
  // Suffixes are the ABI versions that cuda.h maps the plain names to.
  resolve(driver->driver_version, "cuDriverGetVersion");
  resolve(driver->init, "cuInit");
  resolve(driver->error_name, "cuGetErrorName");
  resolve(driver->error_string, "cuGetErrorString");
  resolve(driver->device_count, "cuDeviceGetCount");
  resolve(driver->device, "cuDeviceGet");
  resolve(driver->device_name, "cuDeviceGetName");
  resolve(driver->device_attribute, "cuDeviceGetAttribute");
  resolve(driver->retain_primary_context, "cuDevicePrimaryCtxRetain");
  resolve(driver->current_context, "cuCtxGetCurrent");
  resolve(driver->push_context, "cuCtxPushCurrent_v2");
  resolve(driver->pop_context, "cuCtxPopCurrent_v2");
  resolve(driver->exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  resolve(driver->load_library, "cuLibraryLoadData");
  resolve(driver->get_kernel, "cuLibraryGetKernel");
  resolve(driver->set_kernel_attribute, "cuKernelSetAttribute");
  resolve(driver->kernel_function, "cuKernelGetFunction");
  resolve(driver->launch_kernel, "cuLaunchKernelEx");
  resolve(driver->is_capturing, "cuStreamIsCapturing");
  resolve(driver->create_stream, "cuStreamCreate");
  resolve(driver->destroy_stream, "cuStreamDestroy_v2");
  resolve(driver->begin_capture, "cuStreamBeginCapture_v2");
  resolve(driver->end_capture, "cuStreamEndCapture");
  resolve(driver->instantiate_graph, "cuGraphInstantiateWithFlags");
  resolve(driver->launch_graph, "cuGraphLaunch");
  resolve(driver->destroy_graph, "cuGraphDestroy");
  resolve(driver->destroy_graph_exec, "cuGraphExecDestroy");
  driver->capture_info = reinterpret_cast<decltype(driver->capture_info)>(dlsym(handle, "cuStreamGetCaptureInfo_v2"));
  driver->set_capture_dependencies = reinterpret_cast<decltype(driver->set_capture_dependencies)>(dlsym(handle, "cuStreamUpdateCaptureDependencies"));
  driver->check(driver->init(0), "starting the CUDA driver");
  driver->driver_version(&driver->version);
  pthread_atfork(nullptr, nullptr, [] { forked = started.load(); });
  started = true;
  return driver.release();
}

const Driver& driver() {
  static const Driver* instance = open_driver();  // a failure is thrown, and tried again at the next call
  return *instance;
}

// ---- devices ----

struct DeviceState {
  CUdevice handle;
  CUcontext context;  // the primary one, which torch and the CUDA runtime use
  Device info;
  int shared, shared_of_block, shared_reserved;  // bytes of a multiprocessor, of them for a block at most, and lost with each block
};

const DeviceState& device_state(int ordinal) {
  check_not_forked();
  static std::array<std::atomic<const DeviceState*>, kMaxDevices> states{};
  static std::mutex mutex;
  if (ordinal < 0 || ordinal >= kMaxDevices) fail(Failure::invalid_argument, "effnet_aot: device ordinal must be between 0 and " + std::to_string(kMaxDevices - 1) + ", got " + std::to_string(ordinal));
  if (const auto* state = states[ordinal].load(std::memory_order_acquire)) return *state;
  std::lock_guard lock(mutex);
  if (const auto* state = states[ordinal].load(std::memory_order_acquire)) return *state;

  const Driver& d = driver();
  const std::string which = "device " + std::to_string(ordinal);
  int count = 0;
  d.check(d.device_count(&count), "counting the devices");
  if (ordinal >= count) fail(Failure::invalid_argument, "effnet_aot: " + which + " does not exist: the driver sees " + std::to_string(count));
  auto state = std::make_unique<DeviceState>();
  d.check(d.device(&state->handle, ordinal), "opening " + which);
  auto attribute = [&](CUdevice_attribute what) {
    int value = 0;
    d.check(d.device_attribute(&value, what, state->handle), "asking " + which + " for its properties");
    return value;
  };
  char name[128] = "";
  d.check(d.device_name(name, sizeof name, state->handle), "asking " + which + " for its name");
  state->info = {.capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                 .multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
                 .name = name};
  state->shared = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  state->shared_of_block = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  state->shared_reserved = attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
  d.check(d.retain_primary_context(&state->context, state->handle), "opening the primary context of " + which);
  states[ordinal].store(state.get(), std::memory_order_release);
  return *state.release();
}

// A thread that has not touched CUDA yet has no context, and one that works on another GPU has the wrong one.
class CurrentContext {
 public:
  explicit CurrentContext(CUcontext wanted) : driver_(driver()) {
    CUcontext current = nullptr;
    driver_.check(driver_.current_context(&current), "asking for the current context");
    pushed_ = current != wanted;
    if (pushed_) driver_.check(driver_.push_context(wanted), "making the device's context current");
  }
  ~CurrentContext() {
    CUcontext ignored;
    if (pushed_) driver_.pop_context(&ignored);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// Loading allocates, which a capture of another stream would forbid ("global" capture mode) though it records nothing.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { driver().exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// ---- images ----

enum class ImagePolicy { any, cubin, ptx };

ImagePolicy image_policy() {
  static const ImagePolicy policy = [] {
    const char* text = std::getenv("EFFNET_AOT_IMAGE");
    if (!text || !*text || !std::strcmp(text, "auto")) return ImagePolicy::any;
    if (!std::strcmp(text, "cubin")) return ImagePolicy::cubin;
    if (!std::strcmp(text, "ptx")) return ImagePolicy::ptx;
    fail(Failure::invalid_argument, std::string("effnet_aot: EFFNET_AOT_IMAGE must be auto, cubin or ptx, got '") + text + "'");
  }();
  return policy;
}

bool log_enabled() {
  static const bool enabled = [] {
    const char* text = std::getenv("EFFNET_AOT_LOG");
    return text && *text && std::strcmp(text, "0");
  }();
  return enabled;
}

std::string image_name(const Image& image) {
  return (image.kind == ImageKind::cubin ? "cubin sm_" : "ptx compute_") + std::to_string(image.capability);
}

std::string device_text(int device, const Device& info) {
  return "device " + std::to_string(device) + ", " + info.name + " (compute capability " + capability_name(info.capability) + ")";
}

// What there is instead of an image that serves, and how to get one.
std::string remedy(const Variant& variant, const Device& info) {
  std::string text = "; built are: ";
  for (const auto& image : variant.images) text += (&image == variant.images.data() ? "" : ", ") + image_name(image);
  if (image_policy() != ImagePolicy::any) text += std::string(", of which EFFNET_AOT_IMAGE admits only ") + (image_policy() == ImagePolicy::cubin ? "cubins" : "PTX");
  return text + ". To build for this GPU (8.0 or later is needed), run in a checkout of the sources: EFFNET_AOT_ARCHS=" + capability_name(info.capability) +
         " pip install --no-build-isolation --force-reinstall --no-deps .";
}

// The driver's ways of saying that an image is not for this GPU, or that it is too old for the image.
bool refuses_image(CUresult result) {
  return result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_INVALID_IMAGE || result == CUDA_ERROR_INVALID_PTX ||
         result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION || result == CUDA_ERROR_JIT_COMPILER_NOT_FOUND;
}

// The kernel of an image, loaded once for the whole process. The caller holds the lock.
template <class Check>
CUkernel load(const Variant& variant, const Image& image, Check check) {
  static std::map<const Image*, CUkernel> loaded;
  if (auto it = loaded.find(&image); it != loaded.end()) return it->second;
  CUlibrary library = nullptr;
  check(driver().load_library(&library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0));
  CUkernel kernel = nullptr;
  check(driver().get_kernel(&kernel, library, variant.kernel));
  return loaded[&image] = kernel;
}

struct Ready {
  CUfunction function;
  const Image* image;
};

// What serves a variant on a device: chosen, loaded and configured at the first use.
const Ready& ready(const char* op, const Variant& variant, int device) {
  static auto* table = new std::atomic<const Ready*>[variants().size() * kMaxDevices]{};
  static std::mutex mutex;
  auto& slot = table[variant.index * kMaxDevices + device];
  if (const Ready* r = slot.load(std::memory_order_acquire)) return *r;

  std::lock_guard lock(mutex);
  if (const Ready* r = slot.load(std::memory_order_acquire)) return *r;
  const DeviceState& state = device_state(device);
  const Image* image = select_image(variant, state.info.capability);
  if (!image)
    fail(Failure::no_image, std::string("effnet::") + op + ": no image of " + variant.kernel + " serves " + device_text(device, state.info) + remedy(variant, state.info));
  const Driver& d = driver();
  auto check = [&](CUresult result) {
    if (result == CUDA_SUCCESS) return;
    const bool refused = refuses_image(result);
    fail(refused ? Failure::no_image : Failure::driver,
         std::string("effnet::") + op + ": loading " + variant.kernel + " (" + variant.name + ", " + image_name(*image) + ") onto " + device_text(device, state.info) +
             " failed: " + d.describe(result) + (refused ? remedy(variant, state.info) : ""));
  };
  RelaxedCapture relaxed;
  CUkernel kernel = load(variant, *image, check);
  if (const int most = image->dependent_launch ? state.shared_of_block : image->shared; most > kSharedWithoutOptIn)
    check(d.set_kernel_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most, kernel, state.handle));
  CUfunction function = nullptr;
  check(d.kernel_function(&function, kernel));
  if (log_enabled())
    std::fprintf(stderr, "effnet_aot: %s/%s on device %d (%s): %s, %d registers, %d bytes of shared memory\n", variant.op, variant.name, device, state.info.name.c_str(),
                 image_name(*image).c_str(), image->registers, image->shared);
  const Ready* r = new Ready{function, image};
  slot.store(r, std::memory_order_release);
  return *r;
}

// Shared memory to ask for, so that no multiprocessor takes more than its share of the blocks. Those of an early launch are
// placed while their predecessor's still hold most of the multiprocessors: they would crowd on the few that are free, and the
// network would wait for those few. Each lane has its part of the shared memory.
int spread(const DeviceState& state, const Image& image, int64_t grid, int lanes) {
  constexpr int64_t kMostShare = 4;  // blocks a multiprocessor; more of them even out by themselves
  int64_t share = (grid + state.info.multiprocessors - 1) / state.info.multiprocessors;
  if (share > kMostShare) return image.shared;
  share *= lanes;
  return std::max(image.shared, std::min(state.shared_of_block, static_cast<int>(state.shared / share) - state.shared_reserved));
}

}  // namespace

void check_not_forked() {
  if (forked.load(std::memory_order_relaxed))
    fail(Failure::driver, "effnet_aot: CUDA was used before this process was forked and cannot be used in the child; start it with the 'spawn' method");
}

const Device& device_info(int device) { return device_state(device).info; }

const Image* select_image(const Variant& variant, int capability) {
  const ImagePolicy policy = image_policy();
  const Image* best = nullptr;
  for (const Image& image : variant.images) {
    if (image.capability > capability) continue;
    if (image.kind == ImageKind::cubin) {
      if (policy == ImagePolicy::ptx || image.capability / 10 != capability / 10) continue;
    } else if (policy == ImagePolicy::cubin) {
      continue;
    }
    const bool better = !best || (image.kind == ImageKind::cubin && best->kind == ImageKind::ptx) || (image.kind == best->kind && image.capability > best->capability);
    if (better) best = &image;
  }
  return best;
}

bool is_meant_for(const Variant& variant, int capability) {
  if (variant.is_default) return true;
  const Image *image = select_image(variant, capability), *others = select_image(variants().front(), capability);
  return image && others && image->kind == others->kind && image->capability == others->capability;
}

void launch(const char* op, const Variant& variant, Place place, int64_t grid, std::span<void*> arguments) {
  const DeviceState& state = device_state(place.device);
  if (static_cast<int>(arguments.size()) != variant.parameters + 2)
    fail(Failure::invalid_argument, std::string("effnet::") + op + ": " + variant.kernel + " takes " + std::to_string(variant.parameters) + " parameters, got " + std::to_string(arguments.size() - 2));
  if (grid < 1 || grid > INT32_MAX)
    fail(Failure::invalid_argument, std::string("effnet::") + op + ": " + variant.kernel + " needs a grid of 1 to 2147483647 blocks, got " + std::to_string(grid));
  // Triton's kernels end with a pointer to global scratch memory and one to a profiler's: unused by ours.
  void* none = nullptr;
  arguments[arguments.size() - 2] = arguments[arguments.size() - 1] = &none;

  CurrentContext context(state.context);
  const Ready& r = ready(op, variant, place.device);
  // Graphs know of early launches since CUDA 12.3.
  const bool is_early = place.early && r.image->dependent_launch && driver().version >= 12030;
  CUlaunchAttribute early{.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, .value = {.programmaticStreamSerializationAllowed = 1}};
  const CUlaunchConfig config{.gridDimX = static_cast<unsigned>(grid), .gridDimY = 1, .gridDimZ = 1,
                              .blockDimX = static_cast<unsigned>(r.image->threads), .blockDimY = 1, .blockDimZ = 1,
                              .sharedMemBytes = static_cast<unsigned>(is_early ? spread(state, *r.image, grid, place.lanes) : r.image->shared), .hStream = static_cast<CUstream>(place.stream),
                              .attrs = &early, .numAttrs = is_early ? 1u : 0u};
  const CUresult result = driver().launch_kernel(&config, r.function, arguments.data(), nullptr);
  if (result != CUDA_SUCCESS)
    fail(Failure::driver, std::string("effnet::") + op + ": launching " + variant.kernel + " (" + variant.name + ", " + image_name(*r.image) + ") on device " + std::to_string(place.device) + " with grid (" +
         std::to_string(grid) + ", 1, 1) failed: " + driver().describe(result));
}

namespace {

// Branches of the graph that a stream captures. All of them begin where the stream was when this was made.
class Branches {
 public:
  explicit Branches(CUstream stream) : stream_(stream), works_(driver().capture_info && driver().set_capture_dependencies && read(beginning_)) {}

  // What is captured from now on does not wait for what was captured since the beginning. Where the driver does not do it, it waits.
  void next() {
    std::vector<CUgraphNode> end;
    works_ = works_ && read(end) && set(beginning_);
    if (works_) ends_.insert(ends_.end(), end.begin(), end.end());
  }

  // What is captured from now on waits for all branches.
  void join() {
    if (ends_.empty()) return;
    if (!read(ends_) || !set(ends_)) fail(Failure::driver, "effnet::network: joining the branches of a CUDA graph failed");
  }

 private:
  // Appends what the stream's next node would depend on.
  bool read(std::vector<CUgraphNode>& nodes) const {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    const CUgraphNode* found = nullptr;
    size_t count = 0;
    if (driver().capture_info(stream_, &status, nullptr, nullptr, &found, &count) != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return false;
    nodes.insert(nodes.end(), found, found + count);
    return true;
  }
  bool set(std::vector<CUgraphNode>& nodes) const { return driver().set_capture_dependencies(stream_, nodes.data(), nodes.size(), CU_STREAM_SET_CAPTURE_DEPENDENCIES) == CUDA_SUCCESS; }

  CUstream stream_;
  std::vector<CUgraphNode> beginning_, ends_;
  bool works_;
};

}  // namespace

Sequence::~Sequence() {
  for (const Recording& r : recordings_)
    if (r.graph) driver().destroy_graph_exec(static_cast<CUgraphExec>(r.graph));  // one that still runs is let finish
}

void Sequence::run(Place place, std::span<const uint64_t> bases) const {
  constexpr size_t kRecordings = 16;  // of addresses that take turns, on several streams say
  const DeviceState& state = device_state(place.device);
  CurrentContext context(state.context);
  CUstreamCaptureStatus capturing = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUstream stream = static_cast<CUstream>(place.stream);
  if (driver().is_capturing(stream, &capturing) != CUDA_SUCCESS || capturing != CU_STREAM_CAPTURE_STATUS_NONE) return launch_all(place, bases, /*captured=*/true);
  // Whoever finds another thread at it does not wait. A graph is not for several threads at once.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || !records_) return launch_all(place, bases, /*captured=*/false);

  auto r = std::find_if(recordings_.begin(), recordings_.end(), [&](const Recording& r) { return r.device == place.device && std::ranges::equal(r.bases, bases); });
  if (r == recordings_.end()) {
    if (recordings_.size() == kRecordings) {
      if (void* graph = recordings_.back().graph) driver().destroy_graph_exec(static_cast<CUgraphExec>(graph));
      recordings_.pop_back();
    }
    recordings_.insert(recordings_.begin(), {place.device, {bases.begin(), bases.end()}});
    return launch_all(place, bases, /*captured=*/false);
  }
  std::rotate(recordings_.begin(), r, r + 1);
  Recording& found = recordings_.front();
  if (!found.graph) found.graph = record(place, bases);
  records_ = found.graph != nullptr;
  if (!records_) return launch_all(place, bases, /*captured=*/false);
  const CUresult result = driver().launch_graph(static_cast<CUgraphExec>(found.graph), stream);
  if (result == CUDA_SUCCESS) return;
  size_t kernels = 0;
  for (const auto& lane : lanes) kernels += lane.size();
  fail(Failure::driver, std::string("effnet::network: launching ") + std::to_string(kernels) + " kernels on device " + std::to_string(place.device) + " as a graph failed: " + driver().describe(result));
}

// Null where the driver does not do it, which is no reason to fail: launching one by one will do, or tells what is wrong.
void* Sequence::record(Place place, std::span<const uint64_t> bases) const {
  const Driver& d = driver();
  RelaxedCapture relaxed;
  CUstream stream = nullptr;
  CUgraph graph = nullptr;
  CUgraphExec executable = nullptr;
  if (d.create_stream(&stream, CU_STREAM_NON_BLOCKING) != CUDA_SUCCESS) return nullptr;
  if (d.begin_capture(stream, CU_STREAM_CAPTURE_MODE_RELAXED) == CUDA_SUCCESS) {
    bool complete = true;
    place.stream = stream;
    try {
      launch_all(place, bases, /*captured=*/true);
    } catch (const Error&) {
      complete = false;
    }
    if (d.end_capture(stream, &graph) == CUDA_SUCCESS && graph) {
      if (complete && d.instantiate_graph(&executable, graph, 0) != CUDA_SUCCESS) executable = nullptr;
      d.destroy_graph(graph);
    }
  }
  d.destroy_stream(stream);
  return executable;
}

void Sequence::launch_all(Place place, std::span<const uint64_t> bases, bool captured) const {
  constexpr size_t kMost = 64;  // parameters
  uint64_t values[kMost];
  void* addresses[kMost];
  std::optional<Branches> branches;
  if (captured && lanes.size() > 1) branches.emplace(static_cast<CUstream>(place.stream));
  place.lanes = static_cast<int>(lanes.size());
  for (const auto& lane : lanes) {
    if (branches && &lane != &lanes.front()) branches->next();
    place.early = false;
    for (const PreparedLaunch& l : lane) {
      const size_t count = l.values.size();
      if (count + 2 > kMost) fail(Failure::invalid_argument, std::string("effnet::") + l.op + ": " + l.variant->kernel + " takes more than " + std::to_string(kMost - 2) + " parameters");
      for (size_t i = 0; i < count; ++i) {
        const uint64_t v = l.values[i];
        values[i] = l.is_address[i] ? bases[v >> kBaseShift] + (v & ((uint64_t{1} << kBaseShift) - 1)) : v;
        addresses[i] = &values[i];
      }
      launch(l.op, *l.variant, place, l.grid, std::span<void*>(addresses, count + 2));
      place.early = true;
    }
  }
  if (branches) branches->join();
}

void preload(int device) {
  CurrentContext context(device_state(device).context);
  for (const Variant& variant : variants())
    if (is_meant_for(variant, device_info(device).capability)) ready("preload", variant, device);
}

}  // namespace effnet
