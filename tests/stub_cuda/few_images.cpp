// A registry with hand-made images, for the choice among them: what a build for many capabilities would hold. Stands in
// for the generated one.
#include "launcher.h"

namespace effnet {
const char* const kTritonVersion = "none";
const char* const kPtxasVersion = "none";

#define CUBIN(text) reinterpret_cast<const unsigned char*>("\x7f" "ELF " text), 10
#define PTX(text) reinterpret_cast<const unsigned char*>("// " text "\n.version 8.0\n"), 25

static const Image kImages[] = {
    {80, ImageKind::cubin, CUBIN("sm_80"), 64, 0, 48 * 1024, 128, false, ""},
    {86, ImageKind::cubin, CUBIN("sm_86"), 64, 0, 60 * 1024, 128, false, ""},
    {90, ImageKind::cubin, CUBIN("sm_90"), 64, 0, 200 * 1024, 256, true, ""},
    {80, ImageKind::ptx, PTX("ptx80"), 64, 0, 60 * 1024, 128, false, ""},
    {89, ImageKind::cubin, CUBIN("sm_89"), 64, 0, 1024, 128, false, ""},
    {89, ImageKind::ptx, PTX("ptx89"), 64, 0, 1024, 128, false, ""},
    {89, ImageKind::cubin, CUBIN("step89"), 64, 0, 8 * 1024, 128, false, ""},
    {90, ImageKind::cubin, CUBIN("step90"), 64, 0, 8 * 1024, 128, true, ""},
};

// fp16, channels_last.
static const Attribute kAligned[] = {{"precision", 0}, {"channels_last", 1}, {"aligned", 1}, {"folded", 0}, {"block_m", 64}, {"block_n", 64}};
static const Attribute kGeneric[] = {{"precision", 0}, {"channels_last", 1}, {"aligned", 0}, {"folded", 0}, {"block_m", 64}, {"block_n", 64}};

static const Variant kVariants[] = {
    {"pointwise", "aligned", "effnet_pointwise", 15, kAligned, {kImages, 4}, 0},
    {"pointwise", "generic", "effnet_pointwise", 15, kGeneric, {kImages + 4, 2}, 1},
    {"sequence", "step", "effnet_pointwise", 15, {}, {kImages + 6, 2}, 2, /*is_default=*/false},
};

std::span<const Variant> variants() { return kVariants; }
std::span<const Tuned> tuned() { return {}; }
}  // namespace effnet

// A network of that one kernel, with so many blocks each time; in two lanes: each of them does all.
extern "C" __attribute__((visibility("default"))) void stub_sequence(const int64_t* grids, int count, int lanes) {
  effnet::Sequence sequence;
  sequence.lanes.resize(lanes);
  for (auto& lane : sequence.lanes)
    for (int i = 0; i < count; ++i) lane.push_back({"sequence", &effnet::kVariants[2], grids[i], std::vector<uint64_t>(15), std::vector<uint8_t>(15, 1)});
  const uint64_t null = 0;
  sequence.run({}, {&null, 1});
}
