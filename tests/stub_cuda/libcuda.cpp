// A CUDA driver without a GPU: libcuda.so.1 for tests. It answers what the launcher asks, refuses what a driver would
// refuse, and records calls as JSON lines. Device memory is host memory. Kernels can be computed, from their PTX (ptx.h).
//
//   STUB_CUDA_DEVICES      capabilities, "8.9,9.0" (default "8.9"); "" is a driver without a GPU
//   STUB_CUDA_LOG          file to append the records to
//   STUB_CUDA_PARAMETERS   file of lines "<kernel> <size of parameter> ...": how many bytes to record of each
//   STUB_CUDA_FAIL         "cuLaunchKernelEx=700" fails each such call, "cuLaunchKernelEx#2=700" only the second
//   STUB_CUDA_REJECT       "cubin" or "ptx": images that no GPU takes
//   STUB_CUDA_EXECUTE      "1": launches compute, which images of PTX alone allow (EFFNET_AOT_IMAGE=ptx)
//   STUB_CUDA_VERSION      what cuDriverGetVersion says (default 12080)
//   STUB_CUDA_MULTIPROCESSORS    of each GPU (default 128)
// An older driver, one that lacks a symbol, is made with -D<symbol>=<another name>.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "ptx.h"

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kNotInitialized = 3, kNoDevice = 100, kInvalidDevice = 101, kInvalidImage = 200, kInvalidContext = 201,
       kNoBinaryForGpu = 209, kInvalidPtx = 218, kInvalidHandle = 400, kNotFound = 500, kLaunchFailed = 719 };

struct Library { const char* image; };
struct Kernel {
  Library* library;
  std::string name;
  int shared_limit[64];  // per device
};
struct Function { Kernel* kernel; int device; };
struct Context { int device; };

std::mutex mutex;
pid_t owner = 0;
thread_local std::vector<Context*> contexts;

std::string setting(const char* name, const char* fallback) {
  const char* text = std::getenv(name);
  return text ? text : fallback;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

const std::vector<std::string>& devices() {
  static const auto all = split(setting("STUB_CUDA_DEVICES", "8.9"), ',');
  return all;
}

Context* context_of(int device) {
  static std::vector<Context> all = [] {
    std::vector<Context> made;
    for (size_t i = 0; i < devices().size(); ++i) made.push_back({int(i)});
    return made;
  }();
  return &all.at(device);
}

const std::vector<int>& parameter_sizes(const std::string& kernel) {
  static const std::vector<int> unknown;
  static const auto all = [] {
    std::map<std::string, std::vector<int>> sizes;
    std::ifstream file(setting("STUB_CUDA_PARAMETERS", ""));
    for (std::string line, name; std::getline(file, line);) {
      std::stringstream words(line);
      words >> name;
      for (int size; words >> size;) sizes[name].push_back(size);
    }
    return sizes;
  }();
  const auto found = all.find(kernel);
  return found == all.end() ? unknown : found->second;
}

std::string hex(const void* data, size_t size) {
  std::string text;
  char two[3];
  for (size_t i = 0; i < size; ++i) std::snprintf(two, sizeof two, "%02x", static_cast<const unsigned char*>(data)[i]), text += two;
  return text;
}

int current_device() { return contexts.empty() ? -1 : contexts.back()->device; }

void record(const std::string& call, const std::string& fields) {
  static const int file = [] {
    const std::string path = setting("STUB_CUDA_LOG", "");
    return path.empty() ? -1 : open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  }();
  if (file < 0) return;
  const std::string line = "{\"call\": \"" + call + "\", \"device\": " + std::to_string(current_device()) + ", \"thread\": " + std::to_string(gettid()) + (fields.empty() ? "" : ", ") + fields + "}\n";
  if (write(file, line.data(), line.size()) < 0) std::abort();
}

std::string address(const void* pointer) { return std::to_string(reinterpret_cast<uintptr_t>(pointer)); }

// What every call starts with: the failure that the test asked for, or the one that a child after fork meets.
int begin(const std::string& call) {
  static std::map<std::string, int> counts;
  std::lock_guard lock(mutex);
  const int count = ++counts[call];
  for (const auto& rule : split(setting("STUB_CUDA_FAIL", ""), ',')) {
    const auto equals = rule.find('='), number = rule.find('#');
    if (rule.substr(0, std::min(equals, number)) != call) continue;
    if (number == std::string::npos || std::stoi(rule.substr(number + 1)) == count) return std::stoi(rule.substr(equals + 1));
  }
  if (call == "cuInit") return kSuccess;
  if (owner == getpid()) return kSuccess;
  record(call, "\"refused\": true");
  return kNotInitialized;
}
#define BEGIN \
  if (int result = begin(__func__)) return result

bool executes() { return !setting("STUB_CUDA_EXECUTE", "").empty(); }

// Computes what was launched, where the test wants it: an image of PTX.
int execute(const Kernel& kernel, ptx::Dim grid, ptx::Dim block, unsigned shared, void** parameters) {
  if (!executes()) return kSuccess;
  try {
    ptx::launch(kernel.library->image, kernel.name, grid, block, shared, parameters);
    return kSuccess;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", kernel.name.c_str(), error.what());
    return kLaunchFailed;
  }
}

// What a stream records instead of running it.
struct Launch {
  Kernel* kernel;
  ptx::Dim grid, block;
  unsigned shared;
  std::vector<std::string> parameters;  // their bytes
  std::vector<size_t> after;            // numbers of the launches that it waits for, from 1
};
struct Graph { std::vector<Launch> launches; };

struct Capture {
  Graph* graph = new Graph;
  std::vector<size_t> last = {};  // what the next launch waits for
};
std::map<void*, Capture> capturing;  // by stream

Launch recorded(Kernel& kernel, ptx::Dim grid, ptx::Dim block, unsigned shared, void** parameters) {
  Launch launch{&kernel, grid, block, shared, {}, {}};
  for (int size : parameter_sizes(kernel.name)) launch.parameters.emplace_back(static_cast<const char*>(*parameters++), size);
  return launch;
}

int execute(Launch launch) {
  std::vector<void*> addresses;
  for (std::string& bytes : launch.parameters) addresses.push_back(bytes.data());
  return execute(*launch.kernel, launch.grid, launch.block, launch.shared, addresses.data());
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  BEGIN;
  record("cuInit", "");
  if (devices().empty()) return kNoDevice;
  owner = getpid();
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  *version = std::stoi(setting("STUB_CUDA_VERSION", "12080"));
  return kSuccess;
}

int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {3, "CUDA_ERROR_NOT_INITIALIZED"},
      {100, "CUDA_ERROR_NO_DEVICE"}, {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {218, "CUDA_ERROR_INVALID_PTX"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}};
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}

int cuGetErrorString(int error, const char** text) {
  *text = "text of the stub";
  return error == 12345 ? kInvalidValue : kSuccess;
}

int cuDeviceGetCount(int* count) {
  BEGIN;
  *count = int(devices().size());
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  BEGIN;
  if (ordinal < 0 || ordinal >= int(devices().size())) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

int cuDeviceGetName(char* name, int size, int device) {
  BEGIN;
  std::snprintf(name, size, "Stub GPU %d", device);
  return kSuccess;
}

// Shared memory in bytes, by capability; a block takes some for the driver.
constexpr int kReserved = 1024;

int shared_of(const std::string& capability) {
  static const std::map<std::string, int> kib = {{"8.0", 164}, {"9.0", 228}, {"10.0", 228}};
  const auto found = kib.find(capability);
  return 1024 * (found == kib.end() ? 100 : found->second);
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  BEGIN;
  const auto parts = split(devices().at(device), '.');
  switch (attribute) {
    case 16: *value = std::stoi(setting("STUB_CUDA_MULTIPROCESSORS", "128")); return kSuccess;
    case 75: *value = std::stoi(parts[0]); return kSuccess;
    case 76: *value = std::stoi(parts[1]); return kSuccess;
    case 81: *value = shared_of(devices().at(device)); return kSuccess;  // of a multiprocessor
    case 97: *value = shared_of(devices().at(device)) - kReserved; return kSuccess;  // of a block at most
    case 111: *value = kReserved; return kSuccess;
    default: return kInvalidValue;
  }
}

int cuDevicePrimaryCtxRetain(Context** context, int device) {
  BEGIN;
  record("cuDevicePrimaryCtxRetain", "\"of\": " + std::to_string(device));
  *context = context_of(device);
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }

int cuCtxGetCurrent(Context** context) {
  BEGIN;
  *context = contexts.empty() ? nullptr : contexts.back();
  return kSuccess;
}

int cuCtxSetCurrent(Context* context) {
  BEGIN;
  contexts.clear();
  if (context) contexts.push_back(context);
  return kSuccess;
}

int cuCtxPushCurrent_v2(Context* context) {
  BEGIN;
  contexts.push_back(context);
  record("cuCtxPushCurrent", "");
  return kSuccess;
}

int cuCtxPopCurrent_v2(Context** context) {
  BEGIN;
  if (contexts.empty()) return kInvalidContext;
  record("cuCtxPopCurrent", "");
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

int cuCtxSynchronize() {
  BEGIN;
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  static thread_local int current = 0;  // global
  std::swap(*mode, current);
  record("cuThreadExchangeStreamCaptureMode", "\"mode\": " + std::to_string(current));
  return kSuccess;
}

int cuLibraryLoadData(Library** library, const void* image, int*, void**, unsigned, int*, void**, unsigned) {
  BEGIN;
  const char* data = static_cast<const char*>(image);
  const bool cubin = !std::memcmp(data, "\x7f" "ELF", 4), ptx = !cubin && std::strstr(data, ".version");
  if (!cubin && !ptx) return kInvalidImage;
  const std::string kind = cubin ? "cubin" : "ptx";
  record("cuLibraryLoadData", "\"kind\": \"" + kind + "\", \"image\": " + address(image));
  if (setting("STUB_CUDA_REJECT", "") == kind) return cubin ? kNoBinaryForGpu : kInvalidPtx;
  *library = new Library{data};
  return kSuccess;
}

int cuLibraryGetKernel(Kernel** kernel, Library* library, const char* name) {
  BEGIN;
  if (!executes() && parameter_sizes(name).empty()) return kNotFound;
  *kernel = new Kernel{library, name, {}};
  std::fill_n((*kernel)->shared_limit, 64, 48 * 1024);
  return kSuccess;
}

int cuKernelSetAttribute(int attribute, int value, Kernel* kernel, int device) {
  BEGIN;
  record("cuKernelSetAttribute", "\"kernel\": \"" + kernel->name + "\", \"attribute\": " + std::to_string(attribute) + ", \"value\": " + std::to_string(value) +
         ", \"for\": " + std::to_string(device));
  if (attribute == 8) kernel->shared_limit[device] = value;
  return kSuccess;
}

int cuKernelGetFunction(Function** function, Kernel* kernel) {
  BEGIN;
  if (contexts.empty()) return kInvalidContext;
  record("cuKernelGetFunction", "\"kernel\": \"" + kernel->name + "\"");
  *function = new Function{kernel, current_device()};
  return kSuccess;
}

struct LaunchAttribute {
  int id;
  char pad[4];
  int value[16];
};

struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};

int cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** parameters, void** extra) {
  BEGIN;
  const auto [gx, gy, gz] = config->grid;
  const auto [bx, by, bz] = config->block;
  const unsigned shared = config->shared;
  void* const stream = config->stream;
  constexpr int kProgrammaticStreamSerialization = 6;
  bool early = false;
  for (unsigned i = 0; i < config->count; ++i) {
    if (config->attributes[i].id != kProgrammaticStreamSerialization) return kInvalidValue;
    early |= config->attributes[i].value[0];
  }
  Kernel& kernel = *function->kernel;
  std::string values;
  for (size_t i = 0; i < parameter_sizes(kernel.name).size(); ++i) values += (i ? ", \"" : "\"") + hex(parameters[i], parameter_sizes(kernel.name)[i]) + "\"";
  auto three = [](unsigned x, unsigned y, unsigned z) { return "[" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + "]"; };
  record("cuLaunchKernelEx", "\"kernel\": \"" + kernel.name + "\", \"image\": " + address(kernel.library->image) + ", \"grid\": " + three(gx, gy, gz) + ", \"block\": " + three(bx, by, bz) +
         ", \"shared\": " + std::to_string(shared) + ", \"stream\": " + address(stream) + ", \"early\": " + (early ? "true" : "false") +
         ", \"parameters\": [" + values + "]");
  if (current_device() != function->device) return kInvalidHandle;
  if (extra || !gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz > 1024) return kInvalidValue;
  if (int(shared) > kernel.shared_limit[function->device]) return kInvalidValue;
  if (std::lock_guard lock(mutex); capturing.contains(stream)) {
    auto& [graph, last] = capturing[stream];
    graph->launches.push_back(recorded(kernel, {gx, gy, gz}, {bx, by, bz}, shared, parameters));
    graph->launches.back().after = last;
    last = {graph->launches.size()};
    return kSuccess;
  }
  return execute(kernel, {gx, gy, gz}, {bx, by, bz}, shared, parameters);
}

int cuStreamCreate(void** stream, unsigned) {
  BEGIN;
  *stream = new char;
  return kSuccess;
}

int cuStreamDestroy_v2(void* stream) {
  BEGIN;
  delete static_cast<char*>(stream);
  return kSuccess;
}

int cuStreamIsCapturing(void* stream, int* status) {
  BEGIN;
  std::lock_guard lock(mutex);
  *status = capturing.contains(stream);
  return kSuccess;
}

int cuStreamBeginCapture_v2(void* stream, int mode) {
  BEGIN;
  record("cuStreamBeginCapture", "\"mode\": " + std::to_string(mode));
  std::lock_guard lock(mutex);
  if (!stream || capturing.contains(stream)) return kInvalidValue;
  capturing[stream];
  return kSuccess;
}

int cuStreamEndCapture(void* stream, Graph** graph) {
  BEGIN;
  std::lock_guard lock(mutex);
  if (!capturing.contains(stream)) return kInvalidValue;
  *graph = capturing.extract(stream).mapped().graph;
  return kSuccess;
}

// Nodes are their numbers.
int cuStreamGetCaptureInfo_v2(void* stream, int* status, unsigned long long*, void**, const void* const** nodes, size_t* count) {
  BEGIN;
  std::lock_guard lock(mutex);
  *status = capturing.contains(stream);
  if (*status == 0) return kSuccess;
  *nodes = reinterpret_cast<const void* const*>(capturing[stream].last.data());
  *count = capturing[stream].last.size();
  return kSuccess;
}

int cuStreamUpdateCaptureDependencies(void* stream, void** nodes, size_t count, unsigned flags) {
  BEGIN;
  std::lock_guard lock(mutex);
  constexpr unsigned kSet = 1;
  if (!capturing.contains(stream) || flags != kSet) return kInvalidValue;
  const size_t* numbers = reinterpret_cast<const size_t*>(nodes);
  capturing[stream].last.assign(numbers, numbers + count);
  return kSuccess;
}

int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
  BEGIN;
  *executable = new Graph(*graph);
  return kSuccess;
}

int cuGraphLaunch(Graph* executable, void* stream) {
  BEGIN;
  std::string after;
  for (const Launch& launch : executable->launches) {
    after += after.empty() ? "[" : ", [";
    for (size_t number : launch.after) after += (number == launch.after[0] ? "" : ", ") + std::to_string(number);
    after += "]";
  }
  record("cuGraphLaunch", "\"kernels\": " + std::to_string(executable->launches.size()) + ", \"stream\": " + address(stream) + ", \"after\": [" + after + "]");
  for (const Launch& launch : executable->launches)
    if (int result = execute(launch)) return result;
  return kSuccess;
}

int cuGraphDestroy(Graph* graph) {
  BEGIN;
  delete graph;
  return kSuccess;
}

int cuGraphExecDestroy(Graph* executable) {
  BEGIN;
  record("cuGraphExecDestroy", "");
  delete executable;
  return kSuccess;
}

int cuMemAlloc_v2(unsigned long long* pointer, size_t size) {
  BEGIN;
  if (contexts.empty()) return kInvalidContext;
  *pointer = reinterpret_cast<uintptr_t>(std::aligned_alloc(256, (size + 255) / 256 * 256));
  return kSuccess;
}

int cuMemFree_v2(unsigned long long pointer) {
  std::free(reinterpret_cast<void*>(pointer));
  return kSuccess;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t size) {
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return kSuccess;
}

int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t size) {
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return kSuccess;
}

}  // extern "C"
