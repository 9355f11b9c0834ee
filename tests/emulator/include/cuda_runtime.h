// CUDA C++ and its runtime, as far as csrc uses them, for kernels compiled as C++ for a CPU.
// Whatever is missing here does not compile: add it, with the checks that a GPU's rules ask for.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../emulator.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// A block's own, as it has its OS thread to itself while it runs. Like a GPU's it holds whatever
// the block before left there.
#define __shared__ static thread_local

using std::max;
using std::min;

// Coordinates. Grids and blocks have one dimension.
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
template <unsigned emulator::Place::* kOf>
struct Coordinate {
  struct {
    operator unsigned() const { return emulator::here().*kOf; }
  } x;
};
inline constexpr Coordinate<&emulator::Place::thread> threadIdx{};
inline constexpr Coordinate<&emulator::Place::block> blockIdx{};
inline constexpr Coordinate<&emulator::Place::threads> blockDim{};
inline constexpr Coordinate<&emulator::Place::blocks> gridDim{};

// Vectors. Their alignment is what the compiler's sanitizer checks at each access.
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

inline float __uint_as_float(uint32_t word) {
  float x;
  memcpy(&x, &word, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  return word;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __fdividef(float a, float b) { return a / b; }

// Barriers and warp operations know the line that they are called from: all threads that meet must
// have come to the same one.
#define EMULATOR_SITE \
  emulator::Site site = { __builtin_FILE(), __builtin_LINE() }

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier(site); }

namespace emulator {

template <typename T>
T of_lane(uint32_t mask, T value, unsigned lane, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = from_lane(mask, bits, lane, site);  // from beyond the warp's ends a lane gets its own
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, EMULATOR_SITE) {
  return emulator::of_lane(mask, value, lane % emulator::kWarp, site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned step, EMULATOR_SITE) {
  return emulator::of_lane(mask, value, emulator::here().thread % emulator::kWarp - step, site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned step, EMULATOR_SITE) {
  return emulator::of_lane(mask, value, emulator::here().thread % emulator::kWarp + step, site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int step, EMULATOR_SITE) {
  return emulator::of_lane(mask, value, emulator::here().thread % emulator::kWarp ^ step, site);
}
inline uint32_t __ballot_sync(uint32_t mask, bool yes, EMULATOR_SITE) {
  return emulator::votes(mask, yes, site);
}
inline bool __any_sync(uint32_t mask, bool yes, EMULATOR_SITE) {
  return __ballot_sync(mask, yes, site) != 0;
}

inline void __cluster_barrier_arrive(EMULATOR_SITE) { emulator::cluster_arrive(site); }
inline void __cluster_barrier_wait(EMULATOR_SITE) { emulator::cluster_wait(site); }
inline void* __cluster_map_shared_rank(const void* mine, unsigned rank) {
  return emulator::of_cluster(mine, rank);
}

inline void __threadfence() { emulator::fence(); }
inline unsigned atomicInc(unsigned* counter, unsigned most) {
  return emulator::atomic_increment(counter, most);
}

// The runtime; its devices are alike, and share their memory. Streams are of no account: a launch
// has ended when it returns.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr { cudaDevAttrClusterLaunch };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNotSupported ? "operation not supported"
                                        : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emulator::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::machine.clusters;
  return cudaSuccess;
}
template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  if (cluster > 1 && !emulator::machine.clusters) return cudaErrorNotSupported;
  if (grid.x == 0 || block.x == 0 || block.x > emulator::kMostThreads || cluster == 0 ||
      cluster > emulator::kMostOfCluster || grid.x % cluster != 0 ||
      grid.y * grid.z * block.y * block.z != 1)
    return cudaErrorInvalidConfiguration;
  emulator::launch(grid.x, block.x, cluster, [&] { kernel(arguments); });
  return cudaSuccess;
}
