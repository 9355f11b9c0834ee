// Kernels with a fault each, to see that the emulator finds it.
#include <string>

#include "launch.cuh"
#include "ticket.cuh"

namespace {

using rlhf::last_block;

struct Arguments {
  const std::string* fault;
  float* data;  // of each block; its sum is left in the last one
  unsigned* ticket;
};

__global__ void kernel(Arguments a) {
  const std::string& fault = *a.fault;
  const int thread = threadIdx.x, lane = thread % 32;
  __shared__ float shared[1024];
  if (fault == "barrier of some threads") {
    if (thread < 32) __syncthreads();
  } else if (fault == "two barriers") {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault == "barrier against shuffle") {
    if (lane == 0) __syncthreads();
    __shfl_sync(~0u, thread, 0);
    if (lane != 0) __syncthreads();
  } else if (fault == "shuffle of some lanes") {
    if (lane < 16) __shfl_xor_sync(~0u, thread, 1);
  } else if (fault == "shuffle with a partial mask") {
    __shfl_xor_sync(0xffffu, thread, 1);
  } else if (fault == "misaligned vector") {
    const float4 x = *reinterpret_cast<const float4*>(a.data + 1);
    a.data[0] = x.x;
  } else if (fault == "missing barrier") {
    shared[thread] = thread;
    a.data[thread] = shared[blockDim.x - 1 - thread];
  } else if (fault == "out of bounds") {
    a.data[thread] = a.data[blockDim.x + thread];
  } else if (fault == "cluster without some blocks") {
    if (blockIdx.x == 0) return;
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  } else if (fault == "shared memory of no block") {
    *static_cast<float*>(__cluster_map_shared_rank(shared, 8)) = 0;
  } else if (fault == "ticket before the work" || fault == "none") {
    const bool late = fault != "none";
    const bool early_last = late && last_block(a.ticket);
    if (thread == 0) a.data[blockIdx.x] = 1;
    if (!(late ? early_last : last_block(a.ticket)) || thread != 0) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += a.data[i];
    a.data[gridDim.x] = sum;
  } else if (fault == "ticket that is not atomic") {
    if (thread != 0) return;
    const unsigned seen = *a.ticket;
    __threadfence();
    *a.ticket = seen + 1;
  }
}

}  // namespace

// What the launch threw, or "" where it went well.
extern "C" __attribute__((visibility("default"))) const char* run_fault(const char* fault,
                                                                        float* data,
                                                                        unsigned* ticket,
                                                                        int blocks, int threads,
                                                                        int cluster) {
  static std::string message;
  const std::string name = fault;
  message.clear();
  try {
    rlhf::launch("faults", kernel, blocks, threads, cluster, 0, Arguments{&name, data, ticket});
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
