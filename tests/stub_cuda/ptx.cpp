#include "ptx.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <vector>

namespace ptx {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAll = ~0u;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

// ---- numbers ----

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
float f32(u32 x) { return bits<float>(x); }
u32 f32_bits(float x) { return std::isnan(x) ? 0x7fffffffu : bits<u32>(x); }  // the GPU has one NaN

struct F16 {
  static float widen(u16 x) { return static_cast<float>(bits<_Float16>(x)); }
  static u16 narrow(float x) { return std::isnan(x) ? 0x7fff : bits<u16>(static_cast<_Float16>(x)); }
};
struct BF16 {
  static float widen(u16 x) { return f32(u32{x} << 16); }
  static u16 narrow(float x) {  // to nearest, ties to even
    const u32 b = bits<u32>(x);
    return std::isnan(x) ? 0x7fff : static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
};

float relu(float x) { return std::isnan(x) ? x : std::max(x, 0.f); }
float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

// cvt.rna.tf32: ten bits of mantissa, ties away from zero. The tensor cores themselves cut the other bits off.
u32 round_to_tf32(u32 x) { return std::isfinite(f32(x)) ? (x + 0x1000) & ~0x1fffu : x; }

// ---- a kernel ----

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&);

// Registers are numbers of rows in one of two files: one of 32 bits (narrower ones and predicates, 0 or ~0, lie in it too),
// one of 64 bits. Constants and what the hardware knows (%tid.x) are registers as well.
struct Instruction {
  Run run = nullptr;
  u32 predicate = 0;  // a register; the first holds ~0
  bool negated = false, ends_a_run = false;
  std::vector<u32> to, from;
  s64 number = 0;       // an address's offset, a label, a count
  u32 base = 0;         // the register of the address; for cp.async, of the shared one
  std::string text;
};

struct Constant {
  u32 row;
  u64 value;
};

struct Kernel {
  std::vector<Instruction> code;
  std::map<std::string, u32> rows32, rows64;
  std::vector<Constant> constants32, constants64;
  std::vector<std::string> parameters;
};

// ---- a block at work ----

struct Block {
  // What is known of a byte of shared memory. An epoch is the time between two barriers.
  struct Byte {
    u32 written = 0, read = 0;      // the epochs; 0: never
    u64 writers = 0, readers = 0;   // the warps that did, a bit each
    int copies = 0;                 // under way
  };
  std::vector<u8> shared;
  std::vector<Byte> known;
  u32 epoch = 1;
  void** parameters;

  void check(s64 address, int bytes) const {
    if (address < 0 || address + bytes > static_cast<s64>(shared.size())) fail("shared memory: " + std::to_string(address) + " is out of bounds, " + std::to_string(shared.size()) + " bytes");
    if (address % bytes) fail("shared memory: " + std::to_string(address) + " is not aligned to " + std::to_string(bytes));
  }
  void will_read(s64 address, int bytes, int warp) {
    check(address, bytes);
    for (int i = 0; i < bytes; ++i) {
      Byte& b = known[address + i];
      if (b.copies) fail("shared memory: " + std::to_string(address) + " is read while a copy to it is under way");
      if (!b.written) fail("shared memory: " + std::to_string(address) + " is read before it is written");
      if (b.written == epoch && !(b.writers >> warp & 1)) fail("shared memory: " + std::to_string(address) + " is read by warp " + std::to_string(warp) + " and written by another with no barrier between");
      if (b.read != epoch) b.read = epoch, b.readers = 0;
      b.readers |= u64{1} << warp;
    }
  }
  // The same number from several warps is no race: where a layout repeats itself, all of them write.
  void write(s64 address, const void* data, int bytes, int warp) {
    will_write(address, bytes, warp, static_cast<const u8*>(data));
    std::memcpy(&shared[address], data, bytes);
  }
  void will_write(s64 address, int bytes, int warp, const u8* data) {
    check(address, bytes);
    const u64 self = u64{1} << warp;
    for (int i = 0; i < bytes; ++i) {
      Byte& b = known[address + i];
      const bool read_by_others = b.read == epoch && b.readers & ~self, written_by_others = b.written == epoch && b.writers & ~self;
      if (read_by_others || (written_by_others && (!data || b.copies || shared[address + i] != data[i])))
        fail("shared memory: " + std::to_string(address) + " is written by warp " + std::to_string(warp) + " and used by another with no barrier between");
      if (b.written != epoch) b.written = epoch, b.writers = 0;
      b.writers |= self;
    }
  }
};

struct Copy {
  s64 to;
  std::array<u8, 16> data;
  int bytes;
};

struct Warp {
  Block& block;
  int number;
  std::vector<std::array<u32, kLanes>> file32;
  std::vector<std::array<u64, kLanes>> file64;
  std::array<u32, kLanes> pc{};
  u32 alive, active = 0;
  std::array<u32, kLanes> mask{};  // of the lanes that the present instruction concerns, ~0 each
  bool at_barrier = false;
  std::vector<Copy> copies;              // of cp.async, since the last commit
  std::deque<std::vector<Copy>> groups;  // committed

  template <class T>
  T* row(u32 index) {
    if constexpr (sizeof(T) == 8) return file64[index].data();
    else return file32[index].data();
  }
  bool on(int lane) const { return mask[lane] != 0; }
  void need_whole(const Instruction& i) const {
    if (active != kAll) fail("a warp's lanes are not together at: " + i.text);
  }
};

// ---- arithmetic: a function of one element, for all lanes ----

template <auto F, class D, class... A, size_t... I>
void apply_to(Warp& w, const Instruction& i, std::index_sequence<I...>) {
  D* const d = w.row<D>(i.to[0]);
  const auto sources = std::tuple{w.row<A>(i.from[I])...};
  for (int l = 0; l < kLanes; ++l) {
    const D value = static_cast<D>(F(std::get<I>(sources)[l]...));
    d[l] = w.on(l) ? value : d[l];
  }
}
template <auto F, class D, class... A>
void apply(Warp& w, const Instruction& i) { apply_to<F, D, A...>(w, i, std::index_sequence_for<A...>{}); }

u32 truth(bool b) { return b ? ~0u : 0u; }
template <class T> T narrow(u32 x) { return static_cast<T>(x); }

// ---- memory ----

template <class T>
u64 read_at(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
void write_at(void* p, u64 bits) {
  const T value = static_cast<T>(bits);
  std::memcpy(p, &value, sizeof value);
}

template <class T>
void set(Warp& w, u32 row, int lane, u64 value) {
  if constexpr (sizeof(T) == 8) w.file64[row][lane] = value;
  else w.file32[row][lane] = static_cast<u32>(value);
}
template <class T>
u64 get(Warp& w, u32 row, int lane) {
  if constexpr (sizeof(T) == 8) return w.file64[row][lane];
  else return w.file32[row][lane];
}

// What each lane does at its address, where `bytes` are read or written.
template <class F>
void at_global(Warp& w, const Instruction& i, size_t bytes, F access) {
  for (int l = 0; l < kLanes; ++l) {
    if (!w.on(l)) continue;
    const u64 address = w.file64[i.base][l] + i.number;
    if (address % bytes) fail("a misaligned address");
    access(l, reinterpret_cast<char*>(address));
  }
}
template <class T>
void load_global(Warp& w, const Instruction& i) {
  at_global(w, i, sizeof(T) * i.to.size(), [&](int l, const char* from) {
    for (size_t k = 0; k < i.to.size(); ++k) set<T>(w, i.to[k], l, read_at<T>(from + k * sizeof(T)));
  });
}
template <class T>
void store_global(Warp& w, const Instruction& i) {
  at_global(w, i, sizeof(T) * i.from.size(), [&](int l, char* to) {
    for (size_t k = 0; k < i.from.size(); ++k) write_at<T>(to + k * sizeof(T), get<T>(w, i.from[k], l));
  });
}
template <class T>
void load_shared(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l) {
    if (!w.on(l)) continue;
    const s64 address = w.file32[i.base][l] + i.number;
    w.block.will_read(address, static_cast<int>(sizeof(T) * i.to.size()), w.number);
    for (size_t k = 0; k < i.to.size(); ++k) set<T>(w, i.to[k], l, read_at<T>(&w.block.shared[address + k * sizeof(T)]));
  }
}
template <class T>
void store_shared(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l) {
    if (!w.on(l)) continue;
    const s64 address = w.file32[i.base][l] + i.number;
    u8 data[16];
    for (size_t k = 0; k < i.from.size(); ++k) write_at<T>(data + k * sizeof(T), get<T>(w, i.from[k], l));
    w.block.write(address, data, static_cast<int>(sizeof(T) * i.from.size()), w.number);
  }
}
template <class T>
void load_parameter(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l)
    if (w.on(l)) set<T>(w, i.to[0], l, read_at<T>(w.block.parameters[i.number]));
}

// cp.async [to], [from], bytes, bytes that are read (the others are zero): what is read now arrives when it is waited for.
void copy_async(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l) {
    if (!w.on(l)) continue;
    const s64 to = w.file32[i.base][l] + i.number;
    const int bytes = static_cast<int>(w.file32[i.from[1]][l]), given = static_cast<int>(w.file32[i.from[2]][l]);
    Copy copy{to, {}, bytes};
    w.block.will_write(to, bytes, w.number, nullptr);
    for (int k = 0; k < bytes; ++k) ++w.block.known[to + k].copies;
    const u64 from = w.file64[i.from[0]][l];
    if (from % bytes) fail("a misaligned address");
    if (given) std::memcpy(copy.data.data(), reinterpret_cast<const void*>(from), std::min(given, bytes));
    w.copies.push_back(copy);
  }
}
void commit_group(Warp& w, const Instruction&) { w.groups.push_back(std::move(w.copies)), w.copies.clear(); }
void wait_group(Warp& w, const Instruction& i) {
  for (; w.groups.size() > static_cast<size_t>(i.number); w.groups.pop_front())
    for (const Copy& c : w.groups.front()) {
      for (int k = 0; k < c.bytes; ++k) --w.block.known[c.to + k].copies;
      w.block.write(c.to, c.data.data(), c.bytes, w.number);
    }
}

// ---- what the lanes of a warp do together ----

template <bool Transposed>
void load_matrices(Warp& w, const Instruction& i) {
  w.need_whole(i);
  for (size_t matrix = 0; matrix < i.to.size(); ++matrix) {
    u16 m[8][8];
    for (int row = 0; row < 8; ++row) {
      const s64 address = w.file32[i.base][matrix * 8 + row] + i.number;
      w.block.will_read(address, 16, w.number);
      std::memcpy(m[row], &w.block.shared[address], 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const u16 low = Transposed ? m[column][row] : m[row][column], high = Transposed ? m[column + 1][row] : m[row][column + 1];
      w.file32[i.to[matrix]][l] = low | u32{high} << 16;
    }
  }
}

// Fragments as the PTX ISA draws them: lane l holds row l / 4 (and eight below), and Packed columns from l % 4 * Packed on
// (and, with more registers, so many further).
template <int Depth, int Packed, class Widen>
void multiply(Warp& w, const Instruction& i, Widen widen) {
  w.need_whole(i);
  double a[16][Depth], b[Depth][8];
  constexpr int kHalf = 4 * Packed;  // depth covered by one register of all lanes
  for (int l = 0; l < kLanes; ++l)
    for (int k = 0; k < Depth; ++k) {
      if (k % kHalf / Packed != l % 4) continue;
      const int part = k / kHalf, element = k % Packed;
      for (int row = 0; row < 2; ++row) a[l / 4 + 8 * row][k] = widen(w.file32[i.from[2 * part + row]][l], element);
      b[k][l / 4] = widen(w.file32[i.from[2 * (Depth / kHalf) + part]][l], element);
    }
  const size_t c = 3 * (Depth / kHalf);
  std::array<std::array<u32, kLanes>, 4> result;
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      double sum = f32(w.file32[i.from[c + e]][l]);
      for (int k = 0; k < Depth; ++k) sum += a[row][k] * b[k][column];
      result[e][l] = f32_bits(static_cast<float>(sum));
    }
  for (int e = 0; e < 4; ++e) w.file32[i.to[e]] = result[e];
}
template <int Depth, class Type>
void multiply_halves(Warp& w, const Instruction& i) {
  multiply<Depth, 2>(w, i, [](u32 x, int element) -> double { return Type::widen(static_cast<u16>(x >> 16 * element)); });
}
template <int Depth>
void multiply_tf32(Warp& w, const Instruction& i) {
  multiply<Depth, 1>(w, i, [](u32 x, int) -> double { return f32(std::isnan(f32(x)) ? x : x & ~0x1fffu); });
}

template <bool Butterfly>
void shuffle(Warp& w, const Instruction& i) {
  w.need_whole(i);
  const std::array<u32, kLanes> from = w.file32[i.from[0]];
  for (int l = 0; l < kLanes; ++l) {
    const u32 by = w.file32[i.from[1]][l] & 31;
    w.file32[i.to[0]][l] = from[Butterfly ? l ^ by : by];
  }
}

// Of all lanes; no kernel leaves any out.
void largest_of_lanes(Warp& w, const Instruction& i) {
  w.need_whole(i);
  const std::array<u32, kLanes> from = w.file32[i.from[0]];
  s32 largest = static_cast<s32>(from[0]);
  for (u32 value : from) largest = std::max(largest, static_cast<s32>(value));
  w.file32[i.to[0]].fill(static_cast<u32>(largest));
}

// ---- control ----

void nothing(Warp&, const Instruction&) {}
void barrier(Warp& w, const Instruction& i) {
  if (w.active != w.alive) fail("a barrier in divergent code: " + i.text);
  w.at_barrier = true;
}
void branch(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l)
    if (w.on(l)) w.pc[l] = static_cast<u32>(i.number);
}
void leave(Warp& w, const Instruction&) {
  for (int l = 0; l < kLanes; ++l)
    if (w.on(l)) w.alive &= ~(1u << l);
}

// ---- packing: mov.b32 {%rs1, %rs2}, %r1 and back; the parts have half of the bits ----

template <class Part, class Whole>
void unpack(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l)
    if (w.on(l))
      for (int k = 0; k < 2; ++k) w.file32[i.to[k]][l] = static_cast<Part>(w.row<Whole>(i.from[0])[l] >> 8 * sizeof(Part) * k);
}
template <class Part, class Whole>
void pack(Warp& w, const Instruction& i) {
  for (int l = 0; l < kLanes; ++l)
    if (w.on(l)) w.row<Whole>(i.to[0])[l] = static_cast<Part>(w.file32[i.from[0]][l]) | Whole{static_cast<Part>(w.file32[i.from[1]][l])} << 8 * sizeof(Part);
}

template <class Type, auto F>
u32 both_halves(u32 a, u32 b) {
  auto one = [&](int shift) { return u32{Type::narrow(F(Type::widen(static_cast<u16>(a >> shift)), Type::widen(static_cast<u16>(b >> shift))))} << shift; };
  return one(0) | one(16);
}
template <class Type, bool Relu>
u32 two_halves(u32 high, u32 low) {
  auto one = [](u32 x) { return u32{Type::narrow(Relu ? relu(f32(x)) : f32(x))}; };
  return one(high) << 16 | one(low);
}

u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64{b} << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 s = selector >> 4 * k & 15, byte = bytes >> 8 * (s & 7) & 255;
    result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
  }
  return result;
}
template <class T>
u32 extract(u32 a, u32 at, u32 length) {
  at &= 255, length &= 255;
  if (length == 0) return 0;
  const u64 wide = static_cast<u64>(static_cast<s64>(static_cast<T>(a)));  // its sign above it
  const u64 field = (at >= 32 ? (std::is_signed_v<T> && static_cast<s32>(a) < 0 ? ~u64{0} : 0) : wide >> at) & (length >= 32 ? 0xffffffffull : (u64{1} << length) - 1);
  if (!std::is_signed_v<T> || length >= 32 || !(field >> (length - 1) & 1)) return static_cast<u32>(field);
  return static_cast<u32>(field | ~((u64{1} << length) - 1));
}

template <class T> T quotient(T a, T b) { return b == 0 ? ~T{0} : std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0u - static_cast<u32>(a)) : a / b; }
template <class T> T remainder(T a, T b) { return b == 0 ? a : std::is_signed_v<T> && b == static_cast<T>(-1) ? 0 : a % b; }

// How an instruction's operands are read: files of destination and sources ('w' 64 bits, 'n' 32 or fewer).
struct Shape {
  Run run;
  const char* to;
  const char* from;
};

template <auto F> constexpr Shape unary() { return {apply<F, u32, u32>, "n", "n"}; }
template <auto F> constexpr Shape binary() { return {apply<F, u32, u32, u32>, "n", "nn"}; }
template <auto F> constexpr Shape ternary() { return {apply<F, u32, u32, u32, u32>, "n", "nnn"}; }
template <auto F> constexpr Shape binary64() { return {apply<F, u64, u64, u64>, "w", "ww"}; }

// Narrow results are kept with zeros above them.
template <class T, class From>
u32 cut(From x) { return static_cast<u32>(static_cast<std::make_unsigned_t<T>>(x)); }

template <class T, class Map>
void add_integers(Map& m, const std::string& type) {
  m["add." + type] = binary<[](u32 a, u32 b) { return cut<T>(a + b); }>();
  m["sub." + type] = binary<[](u32 a, u32 b) { return cut<T>(a - b); }>();
  m["mul.lo." + type] = binary<[](u32 a, u32 b) { return cut<T>(a * b); }>();
  m["mul.hi." + type] = binary<[](u32 a, u32 b) { return cut<T>(static_cast<u64>(s64{narrow<T>(a)}) * static_cast<u64>(s64{narrow<T>(b)}) >> 8 * sizeof(T)); }>();
  m["mad.lo." + type] = ternary<[](u32 a, u32 b, u32 c) { return cut<T>(a * b + c); }>();
  m["div." + type] = binary<[](u32 a, u32 b) { return cut<T>(quotient(narrow<T>(a), narrow<T>(b))); }>();
  m["rem." + type] = binary<[](u32 a, u32 b) { return cut<T>(remainder(narrow<T>(a), narrow<T>(b))); }>();
  m["min." + type] = binary<[](u32 a, u32 b) { return cut<T>(std::min(narrow<T>(a), narrow<T>(b))); }>();
  m["max." + type] = binary<[](u32 a, u32 b) { return cut<T>(std::max(narrow<T>(a), narrow<T>(b))); }>();
  m["neg." + type] = unary<[](u32 a) { return cut<T>(0u - a); }>();
  m["abs." + type] = unary<[](u32 a) { return cut<T>(static_cast<s32>(narrow<T>(a)) < 0 ? 0u - a : a); }>();
  m["shr." + type] = binary<[](u32 a, u32 by) { return cut<T>(s64{narrow<T>(a)} >> std::min<u32>(by, 63)); }>();
  m["setp.lt." + type] = binary<[](u32 a, u32 b) { return truth(narrow<T>(a) < narrow<T>(b)); }>();
  m["setp.le." + type] = binary<[](u32 a, u32 b) { return truth(narrow<T>(a) <= narrow<T>(b)); }>();
  m["setp.gt." + type] = binary<[](u32 a, u32 b) { return truth(narrow<T>(b) < narrow<T>(a)); }>();
  m["setp.ge." + type] = binary<[](u32 a, u32 b) { return truth(narrow<T>(a) >= narrow<T>(b)); }>();
  m["setp.eq." + type] = binary<[](u32 a, u32 b) { return truth(narrow<T>(a) == narrow<T>(b)); }>();
  m["setp.ne." + type] = binary<[](u32 a, u32 b) { return truth(narrow<T>(a) != narrow<T>(b)); }>();
}

template <class T, class Map>
void add_memory(Map& m, const std::string& type) {
  const char* const file = sizeof(T) == 8 ? "w" : "n";
  m["ld.global." + type] = {load_global<T>, file, "g"};
  m["st.global." + type] = {store_global<T>, "g", file};
  m["ld.shared." + type] = {load_shared<T>, file, "s"};
  m["st.shared." + type] = {store_shared<T>, "s", file};
  m["ld.param." + type] = {load_parameter<T>, file, "p"};
}

// Without ".vN", which the number of operands tells.
const std::map<std::string, Shape>& shapes() {
  static const auto all = [] {
    std::map<std::string, Shape> m;
    add_integers<s16>(m, "s16"), add_integers<u16>(m, "u16"), add_integers<s32>(m, "s32"), add_integers<u32>(m, "u32");
    add_memory<u8>(m, "b8"), add_memory<u16>(m, "b16"), add_memory<u32>(m, "b32"), add_memory<u64>(m, "b64");

    for (const char* type : {"b16", "b32", "pred"}) {
      const std::string t = type;
      m["and." + t] = binary<[](u32 a, u32 b) { return a & b; }>();
      m["or." + t] = binary<[](u32 a, u32 b) { return a | b; }>();
      m["xor." + t] = binary<[](u32 a, u32 b) { return a ^ b; }>();
      m["setp.eq." + t] = binary<[](u32 a, u32 b) { return truth(a == b); }>();
      m["setp.ne." + t] = binary<[](u32 a, u32 b) { return truth(a != b); }>();
    }
    for (const char* type : {"u16", "b16", "u32", "b32", "f32", "s32", "pred"}) {
      m[std::string("mov.") + type] = unary<[](u32 a) { return a; }>();
      m[std::string("selp.") + type] = ternary<[](u32 a, u32 b, u32 p) { return p ? a : b; }>();
    }
    m["not.b32"] = m["not.pred"] = unary<[](u32 a) { return ~a; }>();
    m["not.b16"] = unary<[](u32 a) { return ~a & 0xffff; }>();
    m["shl.b16"] = binary<[](u32 a, u32 by) { return by <= 15 ? a << by & 0xffff : 0; }>();
    m["shl.b32"] = binary<[](u32 a, u32 by) { return by <= 31 ? a << by : 0; }>();
    m["bfe.u32"] = ternary<extract<u32>>();
    m["bfe.s32"] = ternary<extract<s32>>();
    m["prmt.b32"] = ternary<permute>();

    m["mul.wide.s32"] = {apply<[](u32 a, u32 b) { return s64{static_cast<s32>(a)} * static_cast<s32>(b); }, u64, u32, u32>, "w", "nn"};
    m["mul.wide.u32"] = {apply<[](u32 a, u32 b) { return u64{a} * b; }, u64, u32, u32>, "w", "nn"};
    m["mad.wide.s32"] = {apply<[](u32 a, u32 b, u64 c) { return static_cast<u64>(s64{static_cast<s32>(a)} * static_cast<s32>(b)) + c; }, u64, u32, u32, u64>, "w", "nnw"};
    m["mad.wide.u32"] = {apply<[](u32 a, u32 b, u64 c) { return u64{a} * b + c; }, u64, u32, u32, u64>, "w", "nnw"};
    m["mul.wide.s16"] = binary<[](u32 a, u32 b) { return static_cast<u32>(narrow<s16>(a) * narrow<s16>(b)); }>();
    m["mul.wide.u16"] = binary<[](u32 a, u32 b) { return u32{narrow<u16>(a)} * narrow<u16>(b); }>();

    for (const char* type : {"s64", "u64", "b64"}) {
      const std::string t = type;
      m["add." + t] = binary64<[](u64 a, u64 b) { return a + b; }>();
      m["sub." + t] = binary64<[](u64 a, u64 b) { return a - b; }>();
      m["and." + t] = binary64<[](u64 a, u64 b) { return a & b; }>();
      m["or." + t] = binary64<[](u64 a, u64 b) { return a | b; }>();
      m["setp.eq." + t] = {apply<[](u64 a, u64 b) { return truth(a == b); }, u32, u64, u64>, "n", "ww"};
      m["setp.ne." + t] = {apply<[](u64 a, u64 b) { return truth(a != b); }, u32, u64, u64>, "n", "ww"};
      m["mov." + t] = {apply<[](u64 a) { return a; }, u64, u64>, "w", "w"};
      m["selp." + t] = {apply<[](u64 a, u64 b, u32 p) { return p ? a : b; }, u64, u64, u64, u32>, "w", "wwn"};
    }
    m["neg.s64"] = {apply<[](u64 a) { return 0 - a; }, u64, u64>, "w", "w"};
    m["mul.lo.s64"] = binary64<[](u64 a, u64 b) { return a * b; }>();
    m["setp.lt.u64"] = {apply<[](u64 a, u64 b) { return truth(a < b); }, u32, u64, u64>, "n", "ww"};
    m["setp.lt.s64"] = {apply<[](u64 a, u64 b) { return truth(static_cast<s64>(a) < static_cast<s64>(b)); }, u32, u64, u64>, "n", "ww"};
    m["shl.b64"] = {apply<[](u64 a, u32 by) { return by <= 63 ? a << by : 0; }, u64, u64, u32>, "w", "wn"};
    m["shr.u64"] = {apply<[](u64 a, u32 by) { return by <= 63 ? (a >> by) : 0; }, u64, u64, u32>, "w", "wn"};

    m["cvt.s64.s32"] = {apply<[](u32 a) { return s64{static_cast<s32>(a)}; }, u64, u32>, "w", "n"};
    m["cvt.u64.u32"] = {apply<[](u32 a) { return u64{a}; }, u64, u32>, "w", "n"};
    m["cvt.u32.u64"] = {apply<[](u64 a) { return static_cast<u32>(a); }, u32, u64>, "n", "w"};
    m["cvt.u16.u32"] = m["cvt.u32.u16"] = unary<[](u32 a) { return a & 0xffff; }>();
    m["cvt.s32.s16"] = unary<[](u32 a) { return static_cast<u32>(narrow<s16>(a)); }>();
    m["cvt.s32.s8"] = unary<[](u32 a) { return static_cast<u32>(narrow<s8>(a)); }>();
    m["cvt.s16.s8"] = unary<[](u32 a) { return u32{static_cast<u16>(narrow<s8>(a))}; }>();
    m["cvt.s8.s32"] = unary<[](u32 a) { return u32{static_cast<u16>(narrow<s8>(a))}; }>();  // to a register of 16 bits
    m["cvt.rn.f32.s32"] = unary<[](u32 a) { return f32_bits(static_cast<float>(static_cast<s32>(a))); }>();
    m["cvt.rn.f32.u32"] = unary<[](u32 a) { return f32_bits(static_cast<float>(a)); }>();
    m["cvt.rna.tf32.f32"] = unary<round_to_tf32>();
    m["cvt.f32.f16"] = unary<[](u32 a) { return f32_bits(F16::widen(narrow<u16>(a))); }>();
    m["cvt.f32.bf16"] = unary<[](u32 a) { return f32_bits(BF16::widen(narrow<u16>(a))); }>();
    m["cvt.rn.f16.f32"] = unary<[](u32 a) { return u32{F16::narrow(f32(a))}; }>();
    m["cvt.rn.bf16.f32"] = unary<[](u32 a) { return u32{BF16::narrow(f32(a))}; }>();
    m["cvt.rn.f16x2.f32"] = binary<two_halves<F16, false>>();
    m["cvt.rn.bf16x2.f32"] = binary<two_halves<BF16, false>>();
    m["cvt.rn.relu.f16x2.f32"] = binary<two_halves<F16, true>>();
    m["cvt.rn.relu.bf16x2.f32"] = binary<two_halves<BF16, true>>();
    m["add.s16x2"] = binary<[](u32 a, u32 b) { return (a + b & 0xffff) | ((a >> 16) + (b >> 16)) << 16; }>();  // 9.0 and later
    m["min.NaN.f16x2"] = binary<both_halves<F16, min_nan>>();
    m["max.NaN.f16x2"] = binary<both_halves<F16, max_nan>>();
    m["min.NaN.bf16x2"] = binary<both_halves<BF16, min_nan>>();
    m["max.NaN.bf16x2"] = binary<both_halves<BF16, max_nan>>();

    m["add.f32"] = binary<[](u32 a, u32 b) { return f32_bits(f32(a) + f32(b)); }>();
    m["sub.f32"] = binary<[](u32 a, u32 b) { return f32_bits(f32(a) - f32(b)); }>();
    m["mul.f32"] = binary<[](u32 a, u32 b) { return f32_bits(f32(a) * f32(b)); }>();
    m["div.full.f32"] = m["div.rn.f32"] = binary<[](u32 a, u32 b) { return f32_bits(f32(a) / f32(b)); }>();
    m["fma.rn.f32"] = ternary<[](u32 a, u32 b, u32 c) { return f32_bits(std::fma(f32(a), f32(b), f32(c))); }>();
    m["sqrt.rn.f32"] = unary<[](u32 a) { return f32_bits(std::sqrt(f32(a))); }>();
    m["abs.f32"] = unary<[](u32 a) { return a & 0x7fffffff; }>();
    m["neg.f32"] = unary<[](u32 a) { return a ^ 0x80000000; }>();
    m["copysign.f32"] = binary<[](u32 sign, u32 a) { return (sign & 0x80000000) | (a & 0x7fffffff); }>();
    m["min.f32"] = binary<[](u32 a, u32 b) { return f32_bits(std::fmin(f32(a), f32(b))); }>();
    m["max.f32"] = binary<[](u32 a, u32 b) { return f32_bits(std::fmax(f32(a), f32(b))); }>();
    m["min.NaN.f32"] = binary<[](u32 a, u32 b) { return f32_bits(min_nan(f32(a), f32(b))); }>();
    m["max.NaN.f32"] = binary<[](u32 a, u32 b) { return f32_bits(max_nan(f32(a), f32(b))); }>();
    m["setp.eq.f32"] = binary<[](u32 a, u32 b) { return truth(f32(a) == f32(b)); }>();
    m["setp.ne.f32"] = binary<[](u32 a, u32 b) { return truth(f32(a) < f32(b) || f32(b) < f32(a)); }>();  // false with NaN
    m["setp.neu.f32"] = binary<[](u32 a, u32 b) { return truth(f32(a) != f32(b)); }>();
    m["setp.lt.f32"] = binary<[](u32 a, u32 b) { return truth(f32(a) < f32(b)); }>();
    m["setp.gt.f32"] = binary<[](u32 a, u32 b) { return truth(f32(b) < f32(a)); }>();
    m["setp.num.f32"] = binary<[](u32 a, u32 b) { return truth(!std::isnan(f32(a)) && !std::isnan(f32(b))); }>();
    m["setp.nan.f32"] = binary<[](u32 a, u32 b) { return truth(std::isnan(f32(a)) || std::isnan(f32(b))); }>();

    m["cp.async.ca.shared.global"] = m["cp.async.cg.shared.global"] = {copy_async, "s", "gnn"};
    m["cp.async.commit_group"] = {commit_group, "", ""};
    m["cp.async.wait_group"] = {wait_group, "", "i"};
    for (const char* count : {"x1", "x2", "x4"}) {
      const std::string name = std::string("ldmatrix.sync.aligned.m8n8.") + count;
      m[name + ".shared.b16"] = {load_matrices<false>, "n", "s"};
      m[name + ".trans.shared.b16"] = {load_matrices<true>, "n", "s"};
    }
    const std::string mma = "mma.sync.aligned.m16n8k";
    m[mma + "16.row.col.f32.f16.f16.f32"] = {multiply_halves<16, F16>, "n", "n"};
    m[mma + "16.row.col.f32.bf16.bf16.f32"] = {multiply_halves<16, BF16>, "n", "n"};
    m[mma + "8.row.col.f32.f16.f16.f32"] = {multiply_halves<8, F16>, "n", "n"};
    m[mma + "8.row.col.f32.bf16.bf16.f32"] = {multiply_halves<8, BF16>, "n", "n"};
    m[mma + "8.row.col.f32.tf32.tf32.f32"] = {multiply_tf32<8>, "n", "n"};
    m[mma + "4.row.col.f32.tf32.tf32.f32"] = {multiply_tf32<4>, "n", "n"};
    m["shfl.sync.bfly.b32"] = {shuffle<true>, "n", "nnnn"};
    m["shfl.sync.idx.b32"] = {shuffle<false>, "n", "nnnn"};
    m["redux.sync.max.s32"] = {largest_of_lanes, "n", "nn"};

    m["bar.sync"] = {barrier, "", "i"};
    m["bar.warp.sync"] = {nothing, "", "i"};
    m["griddepcontrol.wait"] = m["griddepcontrol.launch_dependents"] = {nothing, "", ""};
    m["bra"] = m["bra.uni"] = {branch, "", "l"};
    m["ret"] = {leave, "", ""};
    return m;
  }();
  return all;
}

// ---- reading PTX ----

std::string without_comments(std::string_view text) {
  std::string kept;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.substr(i, 2) == "//") i = std::min(text.find('\n', i), text.size() - 1);
    kept += text[i];
  }
  return kept;
}

std::string trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t\n\r");
  return first == text.npos ? "" : std::string(text.substr(first, text.find_last_not_of(" \t\n\r") - first + 1));
}

// "a, {b, c}, [d + 4]" as three, the braces and brackets kept.
std::vector<std::string> operands_of(std::string_view text) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) parts.emplace_back();
    else parts.back() += c;
  }
  for (auto& p : parts) p = trimmed(p);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

class Reader {
 public:
  explicit Reader(Kernel& kernel) : kernel_(kernel) {
    constant(kAll, false);  // the predicate of what has none
  }

  void read(std::string_view body) {
    std::map<std::string, u32> labels;
    std::vector<std::pair<u32, std::string>> branches;
    for (size_t at = 0; at < body.size();) {
      at = body.find_first_not_of(" \t\n\r", at);
      if (at == body.npos) break;
      if (body[at] == '{' || body[at] == '}') {  // a scope, as inline assembly opens
        ++at;
        continue;
      }
      const size_t end = body.find_first_of(";:", at);
      if (end == body.npos) fail("PTX: no end of: " + std::string(body.substr(at, 60)));
      const std::string statement = trimmed(body.substr(at, end - at));
      const bool label = body[end] == ':';
      at = end + 1;
      if (label) labels[statement] = static_cast<u32>(kernel_.code.size());
      else if (!statement.empty() && statement[0] != '.') {
        if (const std::string target = decode(statement); !target.empty()) branches.emplace_back(kernel_.code.size() - 1, target);
      }
    }
    for (const auto& [index, target] : branches) {
      if (!labels.contains(target)) fail("PTX: no label " + target);
      kernel_.code[index].number = labels[target];
    }
  }

 private:
  // Returns the label that is branched to.
  std::string decode(const std::string& statement) {
    Instruction i;
    i.text = statement;
    std::string_view rest = statement;
    if (rest[0] == '@') {
      i.negated = rest[1] == '!';
      const size_t space = rest.find_first_of(" \t");
      i.predicate = row(trimmed(rest.substr(1 + i.negated, space - 1 - i.negated)), 'n');
      rest = rest.substr(rest.find_first_not_of(" \t", space));
    }
    const size_t space = std::min(rest.find_first_of(" \t"), rest.size());
    std::string name(rest.substr(0, space));
    for (const char* vector : {".v2", ".v4"})
      if (const auto found = name.find(vector); found != name.npos) name.erase(found, 3);
    std::vector<std::string> operands = operands_of(rest.substr(space));

    Shape shape{};
    if (name.starts_with("mov.b") && operands.at(0)[0] == '{') {
      shape = name == "mov.b32" ? Shape{unpack<u16, u32>, "n", "n"} : Shape{unpack<u32, u64>, "n", "w"};
    } else if (name.starts_with("mov.b") && operands.at(1)[0] == '{') {
      shape = name == "mov.b32" ? Shape{pack<u16, u32>, "n", "n"} : Shape{pack<u32, u64>, "w", "n"};
    } else {
      const auto found = shapes().find(name);
      if (found == shapes().end()) fail("PTX: an instruction that is not known here: " + statement);
      shape = found->second;
    }
    i.run = shape.run;
    i.ends_a_run = i.run == branch || i.run == leave || i.run == barrier;
    if (i.run == copy_async && operands.size() == 3) operands.push_back(operands[2]);

    std::string target;
    size_t next = 0;
    const std::string_view to = shape.to, from = shape.from;
    if (!to.empty()) take(i, operands.at(next++), to[0], i.to, target);
    for (size_t k = 0; next < operands.size(); ++k, ++next) take(i, operands[next], from.at(std::min(k, from.size() - 1)), i.from, target);
    kernel_.code.push_back(std::move(i));
    return target;
  }

  void take(Instruction& i, const std::string& operand, char kind, std::vector<u32>& rows, std::string& target) {
    switch (kind) {
      case 'i': i.number = static_cast<s64>(number(operand)); return;
      case 'l': target = operand; return;
      case 'p': i.number = parameter(trimmed(operand.substr(1, operand.size() - 2))); return;
      case 'g':
      case 's': {
        const std::string inner = trimmed(operand.substr(1, operand.size() - 2));
        const auto plus = inner.find('+');
        const u32 base = row(trimmed(inner.substr(0, plus)), kind == 'g' ? 'w' : 'n');
        const s64 offset = plus == inner.npos ? 0 : static_cast<s64>(number(trimmed(inner.substr(plus + 1))));
        if (i.run == copy_async && kind == 'g') {
          if (offset) fail("PTX: cp.async from an offset");
          rows.push_back(base);
        } else {
          i.base = base, i.number = offset;
        }
        return;
      }
      default:
        if (operand[0] != '{') return rows.push_back(row(operand, kind));
        for (const auto& element : operands_of(std::string_view(operand).substr(1, operand.size() - 2))) rows.push_back(row(element, kind));
    }
  }

  u32 row(const std::string& name, char kind) {
    const bool wide = kind == 'w';
    if (name.empty()) fail("PTX: an empty operand");
    if (name == "global_smem") return constant(0, wide);
    if (std::isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') return constant(number(name), wide);
    if (name.starts_with("%rd") != wide) fail("PTX: not a register of this width: " + name);
    auto& rows = wide ? kernel_.rows64 : kernel_.rows32;
    return rows.try_emplace(name, static_cast<u32>(rows.size())).first->second;
  }

  u32 constant(u64 value, bool wide) {
    if (!wide) value &= 0xffffffff;
    auto& rows = wide ? kernel_.rows64 : kernel_.rows32;
    const auto [found, is_new] = rows.try_emplace("#" + std::to_string(value), static_cast<u32>(rows.size()));
    if (is_new) (wide ? kernel_.constants64 : kernel_.constants32).push_back({found->second, value});
    return found->second;
  }

  static u64 number(const std::string& text) {
    if (text.starts_with("0f")) return std::stoull(text.substr(2), nullptr, 16);
    return static_cast<u64>(std::stoll(text, nullptr, 0));
  }

  s64 parameter(const std::string& name) const {
    const auto found = std::find(kernel_.parameters.begin(), kernel_.parameters.end(), name);
    if (found == kernel_.parameters.end()) fail("PTX: no parameter " + name);
    return found - kernel_.parameters.begin();
  }

  Kernel& kernel_;
};

const Kernel& kernel_of(const char* image, const std::string& name) {
  static std::mutex mutex;
  static std::map<std::pair<const char*, std::string>, std::unique_ptr<Kernel>> all;
  std::lock_guard lock(mutex);
  auto& kernel = all[{image, name}];
  if (kernel) return *kernel;

  const std::string text = without_comments(image);
  const size_t entry = text.find(".entry " + name + "(");
  if (entry == text.npos) fail("PTX: no kernel " + name);
  const size_t open = text.find('(', entry), close = text.find("\n)", open), begin = text.find('{', close), end = text.rfind('}');
  auto read = std::make_unique<Kernel>();
  for (const auto& parameter : operands_of(std::string_view(text).substr(open + 1, close - open - 1))) read->parameters.push_back(parameter.substr(parameter.find_last_of(" \t") + 1));
  Reader(*read).read(std::string_view(text).substr(begin + 1, end - begin - 1));
  kernel = std::move(read);
  return *kernel;
}

// ---- running ----

// To the next barrier, or the end. Lanes that went different ways: those that are behind go first, so that they meet again.
void run(const Kernel& kernel, Warp& w) {
  w.at_barrier = false;
  while (w.alive && !w.at_barrier) {
    u32 pc = std::numeric_limits<u32>::max(), next = pc;
    for (int l = 0; l < kLanes; ++l)
      if (w.alive >> l & 1) pc = std::min(pc, w.pc[l]);
    u32 together = 0;
    for (int l = 0; l < kLanes; ++l) {
      if (!(w.alive >> l & 1)) continue;
      if (w.pc[l] == pc) together |= 1u << l;
      else next = std::min(next, w.pc[l]);
    }
    for (bool end = false; !end && pc < next; ++pc) {
      if (pc >= kernel.code.size()) fail("PTX: ran beyond the end");
      const Instruction& i = kernel.code[pc];
      const u32* const predicate = w.file32[i.predicate].data();
      w.active = 0;
      for (int l = 0; l < kLanes; ++l) {
        const bool on = (together >> l & 1) && (predicate[l] != 0) != i.negated;
        w.mask[l] = truth(on);
        w.active |= u32{on} << l;
      }
      end = i.ends_a_run;
      for (int l = 0; l < kLanes && (end || pc + 1 >= next); ++l)
        if (together >> l & 1) w.pc[l] = pc + 1;
      try {
        if (w.active) i.run(w, i);
      } catch (const std::runtime_error& error) {
        fail(error.what() + std::string(", at: ") + i.text);
      }
    }
  }
}

}  // namespace

void launch(const char* image, const std::string& name, Dim grid, Dim size, unsigned shared_bytes, void** parameters) {
  const Kernel& kernel = kernel_of(image, name);
  if (size.x % kLanes || size.y != 1 || size.z != 1 || grid.y != 1 || grid.z != 1) fail("PTX: blocks of whole warps along x are all that is known here");
  const int warps = static_cast<int>(size.x) / kLanes;
  for (unsigned index = 0; index < grid.x; ++index) {
    Block block{.shared = std::vector<u8>(shared_bytes, 0xff), .known = std::vector<Block::Byte>(shared_bytes), .parameters = parameters};
    std::deque<Warp> all;
    for (int number = 0; number < warps; ++number) {
      Warp& w = all.emplace_back(Warp{.block = block, .number = number, .file32 = {}, .file64 = {}, .alive = kAll, .copies = {}, .groups = {}});
      w.file32.resize(kernel.rows32.size());
      w.file64.resize(kernel.rows64.size());
      for (const Constant& c : kernel.constants32) w.file32[c.row].fill(static_cast<u32>(c.value));
      for (const Constant& c : kernel.constants64) w.file64[c.row].fill(c.value);
      auto fill = [&](const char* special, u32 value) {
        if (const auto found = kernel.rows32.find(special); found != kernel.rows32.end()) w.file32[found->second].fill(value);
      };
      fill("%ctaid.x", index), fill("%nctaid.x", grid.x), fill("%ntid.x", size.x);
      for (const char* zero : {"%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"}) fill(zero, 0);
      if (const auto found = kernel.rows32.find("%tid.x"); found != kernel.rows32.end())
        for (int l = 0; l < kLanes; ++l) w.file32[found->second][l] = static_cast<u32>(number * kLanes + l);
    }
    // A warp that has ended keeps no other waiting.
    for (bool more = true; more; ++block.epoch) {
      more = false;
      for (Warp& w : all)
        if (w.alive) run(kernel, w), more |= w.at_barrier;
    }
  }
}

}  // namespace ptx
