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

// More than a vector access takes, from a call: the compiler reports a range.
struct Large {
  double x[5];
};
__attribute__((noinline)) Large large(double x) { return {{x, 1, 2, 3, 4}}; }

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
  } else if (fault == "shuffle for a barrier") {
    shared[thread] = thread;
    a.data[thread] = __shfl_sync(~0u, lane, 0) + shared[thread ^ 1];
  } else if (fault == "barrier on one side" || fault == "barriers on both sides") {
    shared[thread] = thread;
    __syncthreads();
    const float other = shared[thread ^ 1];
    if (fault == "barriers on both sides") __syncthreads();
    shared[thread] = other;
  } else if (fault == "one word for all") {
    a.data[0] = thread;
  } else if (fault == "halves of a word") {
    reinterpret_cast<uint16_t*>(a.data)[thread] = thread;
  } else if (fault == "struct without a barrier" || fault == "struct") {
    __shared__ Large structs[64];
    structs[thread] = large(thread);
    __syncthreads();
    const Large other = structs[thread ^ 1];
    if (fault == "struct") __syncthreads();
    structs[thread] = other;
  } else if (fault == "what nobody wrote") {
    a.data[thread] = shared[thread];
  } else if (fault == "out of bounds") {
    a.data[thread] = a.data[blockDim.x + thread];
  } else if (fault == "cluster without some blocks") {
    if (blockIdx.x == 0) return;
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  } else if (fault == "shared memory of no block") {
    *static_cast<float*>(__cluster_map_shared_rank(shared, 8)) = 0;
  } else if (fault == "arrival before the work" || fault == "no wait before the next" ||
             fault == "no wait before the end" || fault == "cluster") {
    const bool late = fault == "arrival before the work";
    if (late) __cluster_barrier_arrive();
    shared[thread] = thread;
    if (!late) __cluster_barrier_arrive();
    __cluster_barrier_wait();
    const float* other = static_cast<float*>(__cluster_map_shared_rank(shared, 1 - blockIdx.x % 2));
    a.data[blockIdx.x * blockDim.x + thread] = other[thread];
    if (fault == "no wait before the end") return;
    if (fault == "no wait before the next") shared[thread] = 0;
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  } else if (fault == "ticket without a fence" || fault == "no fence after the ticket" ||
             fault == "no barrier before the ticket" || fault == "fence in another thread") {
    __shared__ bool last;
    const bool barrier = fault != "no barrier before the ticket";
    const bool elsewhere = fault == "fence in another thread";
    if (thread == 1) a.data[blockIdx.x] = 1;
    if (barrier) __syncthreads();
    if (thread == 0) {
      if (fault != "ticket without a fence") __threadfence();
      last = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
      if (fault != "no fence after the ticket" && !elsewhere) __threadfence();
    }
    __syncthreads();
    if (elsewhere) __threadfence();
    if (last && thread == elsewhere)
      for (unsigned i = 0; i < gridDim.x; ++i) a.data[gridDim.x] += a.data[i];
  } else if (fault == "ticket before the work" || fault == "none") {
    const bool late = fault != "none";
    const bool early_last = late && last_block(a.ticket);
    if (thread == 0) a.data[blockIdx.x] = 1;
    if (!(late ? early_last : last_block(a.ticket)) || thread != 0) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += a.data[i];
    a.data[gridDim.x] = sum;
  } else if (fault == "plain read of the ticket") {
    if (thread != 0) return;
    if (blockIdx.x % 2 == 0) atomicInc(a.ticket, ~0u);
    if (blockIdx.x % 2 == 1) a.data[blockIdx.x] = *a.ticket;
  } else if (fault == "third read") {
    // Blocks 0 and 1 read; the last one, which only 0 released its reads to, writes.
    float x = 0;
    if (blockIdx.x < 2 && thread < 2) x = a.data[100];
    if (blockIdx.x == 0) __syncthreads();
    if (thread == 0) {
      if (blockIdx.x != 1) __threadfence();
      const bool last = atomicInc(a.ticket, ~0u) == 2;
      __threadfence();
      if (last) a.data[100] = 1;
    }
    a.data[blockIdx.x * blockDim.x + thread + 101] = x;
  } else if (fault == "bytes of a word") {
    reinterpret_cast<uint8_t*>(a.data)[thread] = thread;
  } else if (fault == "over two tickets") {
    // From block 0 to 1 by the first word, from 1 to 2 by the second.
    if (thread != 0) return;
    unsigned* ticket = a.ticket + (blockIdx.x == 2);
    if (blockIdx.x == 0) a.data[0] = 1;
    __threadfence();
    const bool second = atomicInc(ticket, ~0u) == 1;
    __threadfence();
    if (blockIdx.x == 1 && second) atomicInc(a.ticket + 1, ~0u);
    if (blockIdx.x == 2 && second) a.data[1] = a.data[0];
  } else if (fault == "ticket after a cluster's barrier") {
    // The cluster's first block takes the ticket for all of it.
    a.data[blockIdx.x * blockDim.x + thread] = 1;
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    if (blockIdx.x % 2 != 0) return;
    __shared__ bool last;
    if (thread == 0) {
      __threadfence();
      last = atomicInc(a.ticket, ~0u) == gridDim.x / 2 - 1;
      __threadfence();
    }
    __syncthreads();
    for (unsigned i = 0; last && i < gridDim.x; ++i)
      a.data[gridDim.x * blockDim.x + thread] += a.data[i * blockDim.x + thread];
  } else if (fault == "ticket that is not atomic") {
    if (thread != 0) return;
    const unsigned seen = *a.ticket;
    __threadfence();
    *a.ticket = seen + 1;
  }
}

std::string message;

}  // namespace

// What the launch threw, or "" where it went well.
extern "C" __attribute__((visibility("default"))) const char* run_fault(const char* fault,
                                                                        float* data,
                                                                        unsigned* ticket,
                                                                        int blocks, int threads,
                                                                        int cluster) {
  const std::string name = fault;
  message.clear();
  try {
    rlhf::launch("faults", kernel, blocks, threads, cluster, 0, Arguments{&name, data, ticket});
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
