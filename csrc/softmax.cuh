// Softmax over rows of logits on the GPU: what token_logprobs.cu and kl.cu share.
//
// A warp walks a range of a row and never waits for another one: its lanes keep sums relative to
// the largest element that the warp has seen. Only the ends of the ranges are merged, in a fixed
// order: over the warps of a block and, where rows are few, over a cluster of blocks. Gaps to the
// largest element are exponents of 2 here; statistics in memory are in nats.
#pragma once

#include "rows.cuh"

namespace rlhf {

// A gap of -inf is worked with as this one: 2^gap is 0, and 0 times it is 0 and not NaN.
constexpr float kFloor = -1e30f;

// What gaps are taken to: the top, or 0 where nothing but -inf was seen, whose gap would be NaN.
RLHF_DEVICE float level(float top) { return top == -kInf ? 0 : top; }

RLHF_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
RLHF_DEVICE float warp_max(float x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Softmax sums of the columns that a warp has seen. The top is common to its lanes, and one of them
// is its owner: the lane whose `others` leaves an instance of it out.
struct WarpSums {
  float top = -kInf, base = 0;  // base = level(top)
  int owner = -1;
  float others = 0;    // of this lane: sum of 2^gap
  float weighted = 0;  // of this lane: sum of 2^gap * gap
  float fall;          // the gap of the previous top, after `raise`

  // Refers the sums to the largest element of y, if that is larger; gaps are unit * (y - top). NaN
  // is passed over here: it shows in the sums.
  template <int N>
  RLHF_DEVICE bool raise(const float (&y)[N], float unit, int lane) {
    float largest = y[0];
#pragma unroll
    for (int i = 1; i < N; ++i) largest = fmaxf(largest, y[i]);
    if (!__any_sync(~0u, largest > top)) return false;
    const float higher = warp_max(largest);
    fall = max_nan((top - higher) * unit, kFloor);
    const float weight = exp2_fast(fall), mass = others + (lane == owner ? 1.0f : 0.0f);
    weighted = weight * (weighted + fall * mass);
    others = weight * mass;
    top = base = higher;
    owner = __ffs(static_cast<int>(__ballot_sync(~0u, largest == higher))) - 1;
    return true;
  }
  RLHF_DEVICE float below(float y) const { return y - base; }

  // Adds the 2^gap of the y that `raise` got and told `raised` of.
  template <int N>
  RLHF_DEVICE void add(const float (&powers)[N], float sum, bool raised, int lane) {
    if (raised && lane == owner) {
      bool left_out = false;
      sum = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool skip = !left_out && powers[i] == 1;
        left_out |= skip;
        sum += skip ? 0.0f : powers[i];
      }
    }
    others += sum;
  }
};

// The same of a range of columns, in nats.
struct RowSums {
  float top, others, weighted;
};

RLHF_DEVICE RowSums merge(RowSums a, RowSums b, float temperature) {
  if (b.top > a.top) {
    const RowSums higher = b;
    b = a;
    a = higher;
  }
  const float gap = max_nan((b.top - level(a.top)) / temperature, kFloor);
  const float weight = expf(gap), mass = 1 + b.others;
  return {a.top, a.others + weight * mass, a.weighted + weight * (b.weighted + gap * mass)};
}

// The state of the lane whose number differs in the bit `step`.
template <typename State>
RLHF_DEVICE State exchanged(const State& state, int step) {
  constexpr int kWords = sizeof(State) / 4;
  uint32_t words[kWords];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(~0u, words[i], step);
  State other;
  memcpy(&other, words, sizeof(State));
  return other;
}

// Merges the states of a block's warps, and then those of the `parts` blocks of a cluster, into
// lane 0 of the first block. `nothing` is the state of no columns.
template <typename State, typename Merge>
RLHF_DEVICE State combine(const State& of_warp, int parts, State nothing, Merge merge) {
  static_assert(kWarps == 8, "at most 8 states are merged");
  __shared__ State of_warps[kWarps], of_block;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  auto merge_lanes = [&](State state) {
    for (int step = 1; step < kWarps; step *= 2) state = merge(state, exchanged(state, step));
    return state;
  };
  if (lane == 0) of_warps[warp] = of_warp;
  __syncthreads();
  State state = nothing;
  if (warp == 0) {
    state = merge_lanes(lane < kWarps ? of_warps[lane] : nothing);
    if (lane == 0) of_block = state;
  }
#if __CUDA_ARCH__ >= 900
  if (parts > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    if (warp == 0 && blockIdx.x % parts == 0) {
      const void* there = __cluster_map_shared_rank(&of_block, min(lane, parts - 1));
      state = merge_lanes(lane < parts ? *static_cast<const State*>(there) : nothing);
    }
    // A block stays until its state has been read.
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
#endif
  return state;
}

// The columns of block `part` of the `parts` that share a row; whole packs of any dtype, so that
// all ranges are aligned if the row is.
struct Range {
  int begin, size;

  RLHF_DEVICE Range(int columns, int parts, int part) {
    const int most = ((columns + parts - 1) / parts + 7) / 8 * 8;
    begin = min(part * most, columns);
    size = min(most, columns - begin);
  }
};

// How many blocks share a row: enough of them to fill a GPU, none with less than a tile for each of
// its warps. Not a matter of the GPU at hand, except that it must have clusters.
inline int parts_of_a_row(const char* op, int64_t rows, int64_t columns, int device) {
  constexpr int64_t kEnoughBlocks = 1024, kEnoughColumns = 8192;
  int clusters = 0;
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), op,
        "asking for the device's properties");
  int parts = 1;
  while (clusters && parts < kWarps && rows * parts < kEnoughBlocks &&
         columns >= 2 * parts * kEnoughColumns)
    parts *= 2;
  return parts;
}

}  // namespace rlhf
