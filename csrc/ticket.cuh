// Which block of a launch finishes last, so that it can reduce what all of them have left.
#pragma once

#include "launch.cuh"

namespace rlhf {

// True in all threads of the block that comes here last of all; what the others wrote before they
// came is then visible to it. The counter starts at 0 and wraps around to it for the next launch.
RLHF_DEVICE bool last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // The barriers extend these fences to the whole block. In another thread they would not do: a
    // fence counts only beside the atomic operation.
    __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (last) __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace rlhf
