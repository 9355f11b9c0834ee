// Scans of affine maps x -> b + c x over tiles of tokens on the GPU: a thread composes the maps of
// its tokens, a warp those of its threads by shuffles, a team those of its warps in order.
#pragma once

#include "teams.cuh"

namespace rlhf {

// The maps of `N` scans over the same tokens.
template <typename F, int N>
struct Maps {
  F b[N], c[N];

  RLHF_DEVICE static Maps identity() {
    Maps maps;
#pragma unroll
    for (int i = 0; i < N; ++i) maps.b[i] = 0, maps.c[i] = 1;
    return maps;
  }
  // `later` after this, in scan order.
  RLHF_DEVICE Maps then(const Maps& later) const {
    Maps both;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      both.b[i] = later.b[i] + later.c[i] * b[i];
      both.c[i] = later.c[i] * c[i];
    }
    return both;
  }
  RLHF_DEVICE F apply(int i, F x) const { return b[i] + c[i] * x; }
  RLHF_DEVICE Maps from_lane_before(int step) const {
    Maps other;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      other.b[i] = __shfl_up_sync(~0u, b[i], step);
      other.c[i] = __shfl_up_sync(~0u, c[i], step);
    }
    return other;
  }
  RLHF_DEVICE Maps from_lane(int lane) const {
    Maps other;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      other.b[i] = __shfl_sync(~0u, b[i], lane);
      other.c[i] = __shfl_sync(~0u, c[i], lane);
    }
    return other;
  }
};

// Scans a tile: maps[row], of the thread's groups, become those of all groups before them. Returns
// the map of the whole tile. `shared` must not be that of the last call: there is one barrier.
template <typename F, int N>
RLHF_DEVICE Maps<F, N> scan_tile(const Team& team, Maps<F, N> (&maps)[kRows],
                                 Maps<F, N> (&shared)[kMaxWarps]) {
  auto whole = Maps<F, N>::identity();
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    Maps<F, N> scanned = maps[row];
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const Maps<F, N> before = scanned.from_lane_before(step).then(scanned);
      if (team.lane >= step) scanned = before;
    }
    const Maps<F, N> before = whole.then(scanned.from_lane_before(1));
    maps[row] = team.lane == 0 ? whole : before;
    whole = whole.then(scanned.from_lane(kWarp - 1));
  }
  if (team.warps == 1) return whole;
  if (team.lane == 0) shared[team.warp] = whole;
  __syncthreads();
  auto before = Maps<F, N>::identity(), all = before;
  for (int w = 0; w < team.warps; ++w) {
    if (w == team.warp) before = all;
    all = all.then(shared[w]);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) maps[row] = before.then(maps[row]);
  return all;
}

}  // namespace rlhf
