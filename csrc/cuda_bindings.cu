// rlhf_fast._cuda: as bindings.cpp, with a device index and a stream in place of the threads.
#include <pybind11/pybind11.h>

#include <cstdint>

namespace rlhf {
void gae_forward_cuda(uint64_t rewards, int64_t rewards_stride, uint64_t values,
                      int64_t values_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                      uint64_t lam, uint64_t bootstrap, uint64_t cu_seqlens, uint64_t advantages,
                      uint64_t returns, int64_t sequences, int64_t length, bool fp64, int device,
                      uint64_t stream);
void gae_backward_cuda(uint64_t grad_advantages, int64_t grad_advantages_stride,
                       uint64_t grad_returns, int64_t grad_returns_stride, uint64_t mask,
                       int64_t mask_stride, uint64_t gamma, uint64_t lam, uint64_t cu_seqlens,
                       uint64_t grad_rewards, uint64_t grad_values, uint64_t grad_bootstrap,
                       int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream);
}  // namespace rlhf

PYBIND11_MODULE(_cuda, m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = RLHF_CUDA_ARCHITECTURES;
  m.def("gae_forward", &rlhf::gae_forward_cuda, Unlocked());
  m.def("gae_backward", &rlhf::gae_backward_cuda, Unlocked());
}
