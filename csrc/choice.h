// How the ops choose among their variants: by the tuning table where it has the problem's shape, else by a rule of thumb.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tuning.h"

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

// A variant that fetches a weight's rows at their whole depth has places for so many input channels and no more, and wastes its time with
// those that are left free.
inline bool fits_depth(const Tile& tile, int64_t in_channels) {
  const int64_t depth = (*tile.variant)["depth"];
  return in_channels <= depth && 2 * in_channels > depth;
}

// Output rows of a block that takes so many pixels of an image: as many as have windows that fit into them, shared out evenly. 0: not
// even one.
inline int64_t rows_of_band(const ExpandDepthwiseProblem& p, int64_t pixels) {
  if (p.height * p.width <= pixels) return p.out_height;
  const int64_t rows = pixels / p.width;
  if (rows < p.kernel) return 0;
  const int64_t most = std::min((rows - p.kernel) / p.stride_y + 1, p.out_height);
  return ceil_div(p.out_height, ceil_div(p.out_height, most));
}

// The variant that the caller named is for other problems.
[[noreturn]] inline void refuse(const char* op, const Tile& tile, const std::string& missing) {
  throw Error(Failure::invalid_argument, std::string("effnet::") + op + ": variant " + tile.variant->name + " does not have " + missing);
}

// For an op that has kernels only where a table names them.
inline const Tile& measured(const char* op, const Tile* tile) {
  if (!tile) throw Error(Failure::no_image, std::string("effnet::") + op + ": the library holds no kernel that was measured for such a product");
  return *tile;
}

inline int64_t area_of(const Tile& tile) { return int64_t{tile.rows} * tile.columns; }

// A problem as the tuning table knows it. What the variant's key says already (precision) need not be among the extents; a layout
// must, so that one table can hold both. In a lane `batch` is the lane's, and the table's that of all lanes together.
struct Shape {
  int64_t batch;
  std::initializer_list<Extent> extents;
};

// The variants of one op, sorted by a key that the op computes from attributes, once per process.
class TileTable {
 public:
  // `key` maps a variant to a small number; `rows` and `columns` name the attributes that give its tile.
  template <class Key>
  TileTable(const char* op, int keys, Key key, const char* rows, const char* columns) : op_(op), tiles_(keys) {
    for (const Variant& v : variants())
      if (v.op == std::string_view(op)) tiles_.at(key(v)).push_back({&v, v[rows], v[columns]});
    for (const Tuned& line : tuned()) {
      if (line.op != std::string_view(op)) continue;
      const Tile* tile = nullptr;
      for (const auto& tiles : tiles_)
        for (const Tile& t : tiles)
          if (t.variant->index == line.variant) tile = &t;
      lines_[hash(line.capability, line.shape)].push_back({&line, tile, area(line.shape)});
    }
  }

  bool has(int key) const { return !tiles_.at(key).empty(); }

  // The tile of the variant that the caller named, among those of the keys that serve the problem (the best one's and
  // those of more general ones).
  const Tile& named(const char* op, const char* name, std::initializer_list<int> keys) const {
    std::string fitting;
    for (auto k = keys.begin(); k != keys.end(); ++k) {
      if (*k < 0 || std::find(keys.begin(), k, *k) != k) continue;
      for (const Tile& tile : tiles_.at(*k)) {
        if (tile.variant->name == std::string_view(name)) return tile;
        fitting += (fitting.empty() ? "" : ", ") + std::string(tile.variant->name);
      }
    }
    throw Error(Failure::invalid_argument, std::string("effnet::") + op + ": variant must be one that fits (" + fitting + "), got '" + name + "'");
  }

  // The tile that should finish first: whole waves of blocks over the GPU, each as long as its work plus a fixed latency.
  // `blocks(tile)` is how many blocks the problem takes, 0 where the variant does not fit; `work(tile)` is a block's. Null
  // where none fits. Knows the default variants alone, not the tuning table.
  template <class Blocks, class Work>
  const Tile* find(int key, int multiprocessors, Blocks blocks, Work work) const {
    constexpr int64_t kLatency = 2048;  // elements of a tile that cost as much as starting one
    const Tile* best = nullptr;
    int64_t best_cost = std::numeric_limits<int64_t>::max();
    for (const Tile& tile : tiles_.at(key)) {
      if (!tile.variant->is_default) continue;
      const int64_t count = blocks(tile);
      const int64_t cost = ceil_div(count, multiprocessors) * (work(tile) + kLatency);
      if (count > 0 && cost < best_cost) best = &tile, best_cost = cost;
    }
    return best;
  }

  // What the tuning table says of the shape, else what find() does.
  template <class Blocks, class Work>
  const Tile& choose(int key, Place place, const Shape& shape, Blocks blocks, Work work) const {
    return choose_by_rule(key, place, shape, blocks, [&] { return find(key, device_info(place.device).multiprocessors, blocks, work); });
  }

  // The same with a rule of the op's own.
  template <class Blocks, class Rule>
  const Tile& choose_by_rule(int key, Place place, const Shape& shape, Blocks blocks, Rule otherwise) const {
    const Tile* tile = pick(key, place, shape, blocks, otherwise, /*or_none=*/false);
    if (!tile) throw Error(Failure::no_image, std::string("effnet_aot: the library holds no variant of ") + op_ + " for this data type and layout");
    return *tile;
  }

  // The same for an op that can do without these kernels, which null stands for: `otherwise()` decides where the table does not.
  template <class Blocks, class Rule>
  const Tile* choose_or_none(int key, Place place, const Shape& shape, Blocks blocks, Rule otherwise) const {
    return pick(key, place, shape, blocks, otherwise, /*or_none=*/true);
  }

  // What the tuning table says of the shape, and null where it says nothing.
  template <class Blocks>
  const Tile* choose_measured(int key, Place place, const Shape& shape, Blocks blocks) const {
    return choose_or_none(key, place, shape, blocks, []() -> const Tile* { return nullptr; });
  }

  // For an output that is so many images of rows by columns, and work that grows with the tile's area.
  const Tile& choose(int key, Place place, const Shape& shape, int64_t rows, int64_t columns, int64_t images) const {
    return choose(key, place, shape, [&](const Tile& t) { return images * ceil_div(rows, t.rows) * ceil_div(columns, t.columns); }, area_of);
  }

 private:
  static constexpr const char* kNone = "none";  // in the table and for the tuner: no variant

  struct Line {
    const Tuned* tuned;
    const Tile* tile;
    int64_t area;  // of one image's map
  };

  template <class Blocks, class Rule>
  const Tile* pick(int key, Place place, Shape shape, Blocks blocks, Rule otherwise, bool or_none) const {
    const auto& tiles = tiles_.at(key);
    shape.batch *= place.lanes;
    const Line* line = look_up(tiles, place.device, shape);
    const Tile* chosen = line && (!line->tile || blocks(*line->tile) > 0) ? line->tile : otherwise();
    if (!tuning_is_on()) [[likely]] return chosen;

    // What the tuner asks for, where it fits; and a record of all that does.
    const std::string wanted = wanted_variant(op_, precision_of(tiles), shape.batch, {shape.extents.begin(), shape.extents.size()});
    std::vector<const char*> fitting;
    if (or_none) fitting.push_back(kNone);
    for (const Tile& tile : tiles) {
      if (blocks(tile) <= 0 || !is_meant_for(*tile.variant, device_info(place.device).capability)) continue;
      fitting.push_back(tile.variant->name);
      if (tile.variant->name == wanted) chosen = &tile;
    }
    if (or_none && wanted == kNone) chosen = nullptr;
    if (tuning_tells) record_choice(op_, shape.batch, {shape.extents.begin(), shape.extents.size()}, chosen ? chosen->variant->name : kNone, fitting);
    return chosen;
  }

  // As the variants' names begin with it.
  static std::string_view precision_of(const std::vector<Tile>& tiles) {
    const std::string_view name = tiles.empty() ? "none" : tiles.front().variant->name;
    return name.substr(0, name.find('_'));
  }

  // The sizes of a map only say how much work there is; everything else tells problems apart.
  static bool is_of_map(const Extent& e) { return e.name == "height" || e.name == "width" || e.name == "pixels"; }

  template <class Extents>
  static int64_t area(const Extents& extents) {
    int64_t product = 1;
    for (const Extent& e : extents)
      if (is_of_map(e)) product *= e.value;
    return product;
  }

  template <class Extents>
  static uint64_t hash(int capability, const Extents& extents) {
    uint64_t h = 1469598103934665603u;  // FNV-1a over numbers
    auto add = [&h](int64_t value) { h = (h ^ static_cast<uint64_t>(value)) * 1099511628211u; };
    add(capability);
    for (const Extent& e : extents)
      if (!is_of_map(e)) add(e.value);
    return h;
  }

  // Among the table's lines for this problem the one whose work, images by pixels, is the nearest by ratio; and rather one
  // for maps of this size. The table is the one of the image that runs, not of the device: it tells apart the cubins of a
  // GPU and the PTX that serves it just as well. `tiles` tell the precision and whether the addresses are aligned.
  const Line* look_up(const std::vector<Tile>& tiles, int device, const Shape& shape) const {
    if (lines_.empty()) return nullptr;
    const Image* image = select_image(variants().front(), device_info(device).capability);
    if (!image) return nullptr;
    const auto found = lines_.find(hash(image->capability, shape.extents));
    if (found == lines_.end() || tiles.empty()) return nullptr;
    const std::string_view precision = precision_of(tiles);
    const double map = area(shape.extents);
    const Line* best = nullptr;
    double best_distance = std::numeric_limits<double>::infinity();
    for (const Line& line : found->second) {
      const bool here = line.tile ? line.tile >= tiles.data() && line.tile < tiles.data() + tiles.size() : line.tuned->precision == precision;
      const bool same = here && line.tuned->capability == image->capability &&
                        std::equal(shape.extents.begin(), shape.extents.end(), line.tuned->shape.begin(), line.tuned->shape.end(),
                                   [](const Extent& a, const Extent& b) { return a.name == b.name && (a.value == b.value || is_of_map(a)); });
      const double maps = map / double(line.area), batches = double(shape.batch) / double(line.tuned->batch);
      const double distance = std::abs(std::log(maps * batches)) + std::abs(std::log(maps)) / 4;
      if (same && distance < best_distance) best = &line, best_distance = distance;
    }
    return best;
  }

  const char* op_;
  std::vector<std::vector<Tile>> tiles_;
  std::unordered_map<uint64_t, std::vector<Line>> lines_;  // of the tuning table
};

constexpr int kPrecisions = 8;

// The key of the ops whose variants differ in precision, layout, alignment and whether they have batch norm folded: the 1x1
// convolutions.
constexpr int kLayoutKeys = kPrecisions * 8;
inline int layout_key(Precision precision, bool channels_last, bool is_aligned, bool folded = false) {
  return ((static_cast<int>(precision) * 2 + channels_last) * 2 + is_aligned) * 2 + folded;
}

}  // namespace effnet
