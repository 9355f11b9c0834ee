// From a value per thread to one of the whole grid, in one launch and in a fixed order.
//
// A block adds its threads' values up and leaves the result in memory; the last block to do so adds
// up those of all. Which one is last does not matter to the result. Values are structs of
// floats or doubles with a `merge`, and what a default-constructed one holds is nothing.
#pragma once

#include "portable.h"
#include "ticket.cuh"

namespace rlhf {

constexpr int kBlock = 256, kBlockWarps = kBlock / kWarp;
// Blocks of a loss's grid, and what each may leave.
constexpr int64_t kMostBlocks = 1024, kLeftBytes = 96;

template <typename T>
RLHF_PORTABLE T from_lane_below(const T& x, int step) {
  static_assert(sizeof(T) % 4 == 0, "words travel between lanes");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(~0u, word, step);
  T y;
  memcpy(&y, words, sizeof(T));
  return y;
}

template <typename T>
RLHF_PORTABLE T warp_total(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x.merge(from_lane_below(x, step));
  return x;
}

// The total of the block's threads, for thread 0. `left` is shared memory, a value per warp; it may
// be used again after the next barrier.
template <typename T>
RLHF_PORTABLE T block_total(T x, T* left) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_total(x);
  if (lane == 0) left[warp] = x;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  if (warp == 0) x = warp_total(lane < warps ? left[lane] : T());
  return x;
}

// Calls finish(total of all blocks) in one thread of the grid. `mine` is thread 0's, `partial` has
// room for one of each block.
template <typename T, typename Finish>
RLHF_PORTABLE void reduce_grid(const T& mine, void* partial, unsigned* ticket, T* left,
                               Finish finish) {
  static_assert(sizeof(T) <= kLeftBytes, "a block has less room");
  T* blocks = static_cast<T*>(partial);
  if (threadIdx.x == 0) blocks[blockIdx.x] = mine;
  if (!last_block(ticket)) return;
  T total;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total.merge(blocks[i]);
  total = block_total(total, left);
  if (threadIdx.x == 0) finish(total);
}

}  // namespace rlhf
