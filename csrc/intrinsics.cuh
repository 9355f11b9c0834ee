// Instructions of the GPU that CUDA C++ has no name for: all inline PTX is here.
//
// A guard by name, not a pragma: what defines it may put other functions in the place of these, as
// tests/emulator does for CPUs.
#ifndef RLHF_INTRINSICS_CUH
#define RLHF_INTRINSICS_CUH

#include "launch.cuh"

namespace rlhf {

// Single instructions, whose library versions also care for denormal numbers or drop NaN.
RLHF_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RLHF_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RLHF_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Two numbers of a word, the first in its lower half; they are rounded to nearest even.
RLHF_DEVICE void unpack_fp16(uint32_t word, float* to) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(to[0]), "=f"(to[1])
      : "r"(word));
}
RLHF_DEVICE uint32_t pack_fp16(const float* from) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(from[1]), "f"(from[0]));
  return word;
}
RLHF_DEVICE uint32_t pack_bf16(const float* from) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(from[1]), "f"(from[0]));
  return word;
}

}  // namespace rlhf

#endif  // RLHF_INTRINSICS_CUH
