#include "tuning.h"

#include <mutex>

namespace effnet {
namespace {

std::mutex mutex;
std::string wanted_op, wanted_name;
thread_local std::string choices, handed_out;

}  // namespace

std::string wanted_variant(const char* op) {
  std::lock_guard lock(mutex);
  return op == wanted_op ? wanted_name : "";
}

void record_choice(const char* op, int64_t batch, std::span<const Extent> extents, const char* chosen, const std::vector<const char*>& fitting) {
  choices += "{\"op\": \"" + std::string(op) + "\", \"batch\": " + std::to_string(batch) + ", \"shape\": {";
  for (const Extent& e : extents) choices += (&e == extents.data() ? "\"" : ", \"") + std::string(e.name) + "\": " + std::to_string(e.value);
  choices += "}, \"variant\": \"" + std::string(chosen) + "\", \"fitting\": [";
  for (const char* name : fitting) choices += (name == fitting.front() ? "\"" : ", \"") + std::string(name) + "\"";
  choices += "]}\n";
}

}  // namespace effnet

extern "C" __attribute__((visibility("default"))) void tune_effnet(int on, const char* op, const char* variant) {
  std::lock_guard lock(effnet::mutex);
  effnet::wanted_op = op ? op : "";
  effnet::wanted_name = variant ? variant : "";
  effnet::tuning_switch = on != 0;
}

extern "C" __attribute__((visibility("default"))) const char* tune_effnet_choices() {
  effnet::handed_out = std::move(effnet::choices);
  effnet::choices.clear();
  return effnet::handed_out.c_str();
}
