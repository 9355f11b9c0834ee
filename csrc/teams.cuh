// The tokens of sequences on the GPU: where they lie, who takes which, how they are loaded.
//
// Tokens go in groups of 16 bytes, a group a thread at a time. A team of threads, a warp or a
// block, takes a sequence in tiles of groups. Sequences are padded rows or packed slices; where
// they may be too long for one team, they are cut into chunks, a chunk a team. All of this
// geometry follows from shapes, so that results do too: tokens that do not lie as 16-byte accesses
// need are grouped as if they did.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace rlhf {

constexpr int kMaxWarps = 8;      // of a team, and of a block
constexpr int kLoneWarps = 4;     // teams of one warp that share a block
constexpr int kRows = 2;          // groups that a thread loads before it scans: bytes in flight
constexpr int64_t kMinTiles = 8;  // to walk fewer takes no longer than a second launch
constexpr int64_t kTeams = 1024;  // enough to fill any GPU
constexpr int64_t kMaxGroups = INT32_MAX - 65536;  // of a sequence: positions are ints

template <typename F>
constexpr int kLanes = 16 / sizeof(F);

// The threads that work on one sequence, or one chunk of it.
struct Team {
  int lane, warp, warps;

  RLHF_DEVICE explicit Team(int warps)
      : lane(threadIdx.x % kWarp), warp(warps == 1 ? 0 : threadIdx.x / kWarp), warps(warps) {}
  // Of a tile's groups; a warp's lie next to each other.
  RLHF_DEVICE int group(int row) const { return (warp * kRows + row) * kWarp + lane; }
  RLHF_DEVICE int tile() const { return warps * kRows * kWarp; }
  RLHF_DEVICE bool leads() const { return warp == 0 && lane == 0; }
};

// Where tokens lie and how they are cut up.
struct Layout {
  const int32_t* offsets;  // null: rows of `length` tokens; else packed, `length` in all
  int64_t sequences, length;
  int64_t chunk;       // tokens of one, whole tiles; 0 leaves sequences whole
  int64_t row_chunks;  // of a padded row, at most
  int phase;           // elements from a 16-byte boundary to the first token; 0 for fresh outputs
  int warps;           // of a team

  __host__ __device__ int64_t slots() const {
    if (chunk == 0) return sequences;
    return offsets != nullptr ? (length + phase) / chunk + sequences : sequences * row_chunks;
  }
  int threads() const { return (warps == 1 ? kLoneWarps : warps) * kWarp; }
  int64_t blocks() const { return warps == 1 ? (slots() + kLoneWarps - 1) / kLoneWarps : slots(); }
};

// The geometry of tokens whose `phase` is yet to be set. Sequences are cut where there are few for
// a GPU, and packed ones in any case: one may be far longer than the others, the host knows none.
template <typename F>
Layout plan(const int32_t* offsets, int64_t sequences, int64_t length, bool may_cut) {
  auto quotient = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  constexpr int64_t kWarpTile = kRows * kWarp * kLanes<F>;
  if (length > kMaxGroups * kLanes<F>)
    throw std::invalid_argument("a scan over " + std::to_string(length) +
                                " tokens overflows the GPU kernel's positions");
  Layout layout = {offsets, sequences, length, 0, 1, 0, 1};
  if (sequences == 0) return layout;
  const int64_t typical = offsets != nullptr ? quotient(length, sequences) : length;
  while (layout.warps < kMaxWarps && layout.warps * kWarpTile < typical) layout.warps *= 2;
  const int64_t tile = layout.warps * kWarpTile, tiles = quotient(length, tile);
  const bool few = 4 * sequences <= kTeams;
  if (!may_cut || tiles < kMinTiles || !(few || offsets != nullptr)) return layout;
  if (offsets != nullptr) {
    layout.chunk = tile * std::max(quotient(tiles, kTeams), few ? 1 : kMinTiles);
  } else {
    layout.chunk = tile * quotient(tiles * sequences, kTeams);
    layout.row_chunks = quotient(length + kLanes<F> - 1, layout.chunk);
  }
  return layout;
}

// Whether tokens of all tensors that the launch reads and writes meet 16-byte boundaries (masks
// those of as many bytes as there are tokens in 16) at the same ones; sets the phase if they do.
template <typename F>
class Alignment {
 public:
  explicit Alignment(Layout& layout) : layout_(layout) {}
  template <typename T>
  void add(const T* data, int64_t stride) {
    if (data == nullptr) return;
    const auto address = reinterpret_cast<uintptr_t>(data);
    const int phase = static_cast<int>(address / sizeof(T) % kLanes<F>);
    if (first_) layout_.phase = phase;
    first_ = false;
    good_ &= address % sizeof(T) == 0 && phase == layout_.phase;
    good_ &= layout_.offsets != nullptr || layout_.sequences == 1 ||
             (stride - layout_.length) % kLanes<F> == 0;
  }
  bool found() {
    if (!good_) layout_.phase = 0;
    return good_;
  }

 private:
  Layout& layout_;
  bool first_ = true, good_ = true;
};

// A team's share: groups [begin, end) of a sequence, in scan order.
struct Share {
  int64_t sequence, start;  // `start`: of its first token among the outputs
  int64_t slot, chunk;      // the chunk's number among all, and in its sequence in scan order
  int groups, begin, end;
  int skew, tail;   // lanes of the sequence's first and last group that lie outside of it
  bool idle, last;  // nothing to do; the sequence ends here

  // The first group's first lane: it may lie before what `data` points to.
  template <typename T>
  RLHF_DEVICE T* row(const Layout& layout, T* data, int64_t stride) const {
    if (data == nullptr) return nullptr;
    return data + ((layout.offsets != nullptr ? start : sequence * stride) - skew);
  }
};

// Where packed sequence i starts; nobody has checked that the offsets are in range.
RLHF_DEVICE int64_t offset(const Layout& layout, int64_t i) {
  return max(int64_t(0), min(int64_t(layout.offsets[i]), layout.length));
}

// A packed sequence's chunks begin in slot (start + phase) / chunk + i: never more than there are
// slots until the next one's, and found without a sum over the sequences before it.
RLHF_DEVICE int64_t first_slot(const Layout& layout, int64_t i) {
  return (offset(layout, i) + layout.phase) / layout.chunk + i;
}

// All of a sequence of `length` tokens from `start` on.
template <typename F>
RLHF_DEVICE Share whole(const Layout& layout, int64_t sequence, int64_t start, int64_t length) {
  Share s = {sequence, start, sequence, 0, 0, 0, 0, 0, 0, false, true};
  s.skew = int((start + layout.phase) % kLanes<F>);
  s.groups = s.end = int((length + s.skew + kLanes<F> - 1) / kLanes<F>);
  s.tail = int(s.groups * int64_t(kLanes<F>) - s.skew - length);
  return s;
}

template <typename F>
RLHF_DEVICE Share share(const Layout& layout) {
  int64_t slot = blockIdx.x;
  if (layout.warps == 1) slot = slot * kLoneWarps + threadIdx.x / kWarp;
  int64_t sequence = slot, chunk = 0;
  if (layout.chunk != 0 && layout.offsets == nullptr) {
    sequence = slot / layout.row_chunks;
    chunk = slot % layout.row_chunks;
  } else if (layout.chunk != 0) {
    int64_t high = layout.sequences;
    for (sequence = 0; high - sequence > 1;) {
      const int64_t middle = (sequence + high) / 2;
      (first_slot(layout, middle) <= slot ? sequence : high) = middle;
    }
    chunk = slot - first_slot(layout, sequence);
  }
  if (slot >= layout.slots()) return {0, 0, 0, 0, 0, 0, 0, 0, 0, true, false};
  Share s;
  if (layout.offsets == nullptr) {
    s = whole<F>(layout, sequence, sequence * layout.length, layout.length);
  } else {
    const int64_t start = offset(layout, sequence), end = offset(layout, sequence + 1);
    s = whole<F>(layout, sequence, start, max(start, end) - start);
  }
  s.slot = slot;
  s.chunk = chunk;
  if (layout.chunk != 0) {
    const int64_t step = layout.chunk / kLanes<F>, begin = chunk * step;
    // The first chunk is there even if the sequence is empty.
    s.idle = begin < 0 || (begin > 0 && begin >= s.groups);
    s.begin = int(begin);
    s.end = int(min(int64_t(s.groups), begin + step));
  }
  s.last = s.end == s.groups;
  return s;
}

// Neighbouring tokens; bit k says that the k-th is there.
struct Group {
  int index;
  uint32_t inside;
};

template <typename F>
constexpr uint32_t kWhole = (1u << kLanes<F>) - 1;

// The group at position i in scan order.
template <typename F, bool kReverse>
RLHF_DEVICE Group group_at(const Share& s, int i) {
  Group g = {kReverse ? s.groups - 1 - i : i, kWhole<F>};
  if (g.index == 0) g.inside &= kWhole<F> << s.skew;
  if (g.index == s.groups - 1) g.inside &= kWhole<F> >> s.tail;
  if (i >= s.end) g.inside = 0;
  return g;
}

template <typename F>
struct Values {
  F lanes[kLanes<F>];
};

RLHF_DEVICE Values<float> load_vector(const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
RLHF_DEVICE Values<double> load_vector(const double* from) {
  const double2 x = *reinterpret_cast<const double2*>(from);
  return {{x.x, x.y}};
}
// By intrinsics: a plain vector store would be taken apart and merged with the other branch's.
RLHF_DEVICE void store_vector(float* to, const Values<float>& x) {
  __stwb(reinterpret_cast<float4*>(to),
         make_float4(x.lanes[0], x.lanes[1], x.lanes[2], x.lanes[3]));
}
RLHF_DEVICE void store_vector(double* to, const Values<double>& x) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(x.lanes[0], x.lanes[1]));
}

// What is inside; the other lanes are 0.
template <typename F, bool kVector>
RLHF_DEVICE Values<F> load(const F* row, const Group& g) {
  const F* from = row + int64_t(g.index) * kLanes<F>;
  Values<F> x;
  if (kVector && g.inside == kWhole<F>) {
    x = load_vector(from);
  } else {
#pragma unroll
    for (int k = 0; k < kLanes<F>; ++k) x.lanes[k] = g.inside >> k & 1 ? from[k] : F(0);
  }
  return x;
}

template <typename F, bool kVector>
RLHF_DEVICE void store(F* row, const Group& g, const Values<F>& x) {
  F* to = row + int64_t(g.index) * kLanes<F>;
  if (kVector && g.inside == kWhole<F>) {
    store_vector(to, x);
  } else {
#pragma unroll
    for (int k = 0; k < kLanes<F>; ++k)
      if (g.inside >> k & 1) to[k] = x.lanes[k];
  }
}

// Bit k says that the k-th token is inside and counts; a null mask counts every token.
template <typename F, bool kVector>
RLHF_DEVICE uint32_t counted(const uint8_t* row, const Group& g) {
  using Word = std::conditional_t<kLanes<F> == 4, uint32_t, uint16_t>;
  if (row == nullptr) return g.inside;
  const uint8_t* from = row + int64_t(g.index) * kLanes<F>;
  uint32_t counts = 0;
  if (kVector && g.inside == kWhole<F>) {
    const uint32_t word = *reinterpret_cast<const Word*>(from);
#pragma unroll
    for (int k = 0; k < kLanes<F>; ++k) counts |= uint32_t((word >> 8 * k & 0xff) != 0) << k;
  } else {
#pragma unroll
    for (int k = 0; k < kLanes<F>; ++k)
      if (g.inside >> k & 1) counts |= uint32_t(from[k] != 0) << k;
  }
  return counts;
}

template <typename F>
RLHF_DEVICE void keep(Values<F>& x, uint32_t counts) {
#pragma unroll
  for (int k = 0; k < kLanes<F>; ++k)
    if (!(counts >> k & 1)) x.lanes[k] = 0;
}

}  // namespace rlhf
