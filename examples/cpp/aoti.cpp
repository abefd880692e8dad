// Runs the network that export.py exported, with no Python in the process, and compares its output with the one that
// Python computed:  aoti FOLDER
#include <ATen/Context.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <fstream>
#include <iterator>

#include "device.h"

namespace {

// The tensors of a torch.save([...]).
std::vector<at::Tensor> load_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<at::Tensor> tensors;
  const c10::IValue list = torch::pickle_load(bytes);
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program([&] {
    if (argc != 2) throw std::invalid_argument("usage: aoti FOLDER, where export.py wrote");
    const std::string folder = argv[1];
    const auto example = load_tensors(folder + "/example.pt");
    const at::Tensor x = example.at(0), expected = example.at(1);

    c10::InferenceMode guard;
    at::globalContext().setAllowTF32CuDNN(false);  // as in export.py
    torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
    const at::Tensor actual = model.run({x}).at(0);

    const double error = relative_error(actual, expected);
    std::printf("output of %ld x %ld on %s, largest difference from Python's %.1e\n", long(actual.size(0)), long(actual.size(1)), actual.device().str().c_str(), error);
    return error <= 1e-6 ? 0 : 1;
  });
}
