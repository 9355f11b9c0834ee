// Host side of the CUDA ops: arguments, error messages, the device to run on, launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#define RLHF_DEVICE __device__ __forceinline__

namespace rlhf {

constexpr int kWarp = 32;

inline void check(cudaError_t status, const char* op, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(status) +
                             "; _cuda holds code for " RLHF_CUDA_ARCHITECTURES
                             ", other GPUs need backend=\"triton\" or \"reference\"");
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op, "reading the current device");
    if (previous_ != device) check(cudaSetDevice(device), op, "selecting the tensors' device");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// The grid's blocks in clusters of `cluster`; call it with the device already selected.
template <typename Arguments>
void launch(const char* op, void (*kernel)(Arguments), int64_t blocks, int threads, int cluster,
            uint64_t stream, const Arguments& arguments) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument(std::string(op) + ": " + std::to_string(blocks) +
                                " blocks exceed the GPU's grid; pass fewer rows at a time");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments), op, "launching the kernel");
}

}  // namespace rlhf
