#include "tuning.h"

#include <mutex>
#include <sstream>
#include <unordered_map>

namespace effnet {
namespace {

std::mutex mutex;
std::unordered_map<std::string, std::string> wanted_variants;  // by op or problem
thread_local std::string choices, handed_out;

}  // namespace

std::string wanted_variant(const char* op, std::string_view precision, int64_t batch, std::span<const Extent> extents) {
  std::string problem = std::string(op) + "/" + std::string(precision) + "/" + std::to_string(batch);
  for (const Extent& e : extents) problem += (&e == extents.data() ? "/" : ",") + std::string(e.name) + "=" + std::to_string(e.value);
  std::lock_guard lock(mutex);
  for (const std::string& what : {problem, std::string(op)})
    if (auto found = wanted_variants.find(what); found != wanted_variants.end()) return found->second;
  return "";
}

void record_choice(const char* op, int64_t batch, std::span<const Extent> extents, const char* chosen, const std::vector<const char*>& fitting) {
  choices += "{\"op\": \"" + std::string(op) + "\", \"batch\": " + std::to_string(batch) + ", \"shape\": {";
  for (const Extent& e : extents) choices += (&e == extents.data() ? "\"" : ", \"") + std::string(e.name) + "\": " + std::to_string(e.value);
  choices += "}, \"variant\": \"" + std::string(chosen) + "\", \"fitting\": [";
  for (const char* name : fitting) choices += (name == fitting.front() ? "\"" : ", \"") + std::string(name) + "\"";
  choices += "]}\n";
}

}  // namespace effnet

extern "C" __attribute__((visibility("default"))) void tune_effnet(int on, const char* wanted) {
  std::lock_guard lock(effnet::mutex);
  effnet::wanted_variants.clear();
  std::istringstream words(wanted ? wanted : "");
  for (std::string what, variant; words >> what >> variant;) effnet::wanted_variants[what] = variant;
  effnet::tuning_tells = on == 1;
  effnet::tuning_switch = on != 0;
}

extern "C" __attribute__((visibility("default"))) const char* tune_effnet_choices() {
  effnet::handed_out = std::move(effnet::choices);
  effnet::choices.clear();
  return effnet::handed_out.c_str();
}
