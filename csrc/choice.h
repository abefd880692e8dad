// How the ops choose among their variants.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels.h"

namespace effnet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every pointer lies on a 16-byte boundary and every extent is a multiple of 8: what the aligned variants were
// promised at compile time. One OR and two tests a call.
inline bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> extents) {
  uintptr_t p = 0;
  int64_t e = 0;
  for (const void* pointer : pointers) p |= reinterpret_cast<uintptr_t>(pointer);
  for (int64_t extent : extents) e |= extent;
  return (p & 15) == 0 && (e & 7) == 0;
}

// Bits of the kernels' `flags`, as triton_src/_epilogue.py names them.
inline int32_t flags(const Tail& tail) {
  return (tail.batch_norm ? 1 : 0) | (!tail.batch_norm && tail.vectors[0] ? 2 : 0) | (tail.vectors_are_fp32 ? 4 : 0) | (tail.residual ? 8 : 0);
}

// A tile of the output and the variant that computes it.
struct Tile {
  const Variant* variant;
  int rows, columns;
};

// The variants of one op, sorted by a key that the op computes from attributes, once per process.
class TileTable {
 public:
  // `key` maps a variant to a small number; `rows` and `columns` name the attributes that give its tile.
  template <class Key>
  TileTable(const char* op, int keys, Key key, const char* rows, const char* columns) : op_(op), tiles_(keys) {
    for (const Variant& v : variants())
      if (v.op == std::string_view(op)) tiles_.at(key(v)).push_back({&v, v[rows], v[columns]});
  }

  // The tile of the variant that the caller named, among those of the keys that serve the problem (the best one's and
  // those of more general ones).
  const Tile& named(const char* op, const char* name, std::initializer_list<int> keys) const {
    std::string fitting;
    for (auto k = keys.begin(); k != keys.end(); ++k) {
      if (std::find(keys.begin(), k, *k) != k) continue;
      for (const Tile& tile : tiles_.at(*k)) {
        if (tile.variant->name == std::string_view(name)) return tile;
        fitting += (fitting.empty() ? "" : ", ") + std::string(tile.variant->name);
      }
    }
    throw Error(Failure::invalid_argument, std::string("effnet::") + op + ": variant must be one that fits (" + fitting + "), got '" + name + "'");
  }

  // The tile that should finish first: whole waves of blocks over the GPU, each as long as its work plus a fixed latency.
  // `blocks(tile)` is how many blocks the problem takes, 0 where the variant does not fit; `work(tile)` is a block's.
  template <class Blocks, class Work>
  const Tile& choose(int key, int multiprocessors, Blocks blocks, Work work) const {
    constexpr int64_t kLatency = 2048;  // elements of a tile that cost as much as starting one
    const Tile* best = nullptr;
    int64_t best_cost = std::numeric_limits<int64_t>::max();
    for (const Tile& tile : tiles_.at(key)) {
      const int64_t count = blocks(tile);
      const int64_t cost = ceil_div(count, multiprocessors) * (work(tile) + kLatency);
      if (count > 0 && cost < best_cost) best = &tile, best_cost = cost;
    }
    if (!best) throw Error(Failure::no_image, std::string("effnet_aot: the library holds no variant of ") + op_ + " for this data type and layout");
    return *best;
  }

  // For an output that is so many images of rows by columns, and work that grows with the tile's area.
  const Tile& choose(int key, int64_t rows, int64_t columns, int64_t images, int multiprocessors) const {
    return choose(key, multiprocessors, [&](const Tile& t) { return images * ceil_div(rows, t.rows) * ceil_div(columns, t.columns); },
                  [](const Tile& t) { return int64_t{t.rows} * t.columns; });
  }

 private:
  const char* op_;
  std::vector<std::vector<Tile>> tiles_;
};

constexpr int kPrecisions = 4;

// The key of the ops whose variants differ in precision, layout and alignment: the 1x1 convolutions.
constexpr int kLayoutKeys = kPrecisions * 4;
inline int layout_key(Precision precision, bool channels_last, bool is_aligned) { return (static_cast<int>(precision) * 2 + channels_last) * 2 + is_aligned; }

}  // namespace effnet
