// What every CPU op shares: function clones per instruction set, 16-byte vectors, threads.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

// One binary is fast everywhere: the loader picks the clone for the machine it runs on.
#if defined(RLHF_TARGET_CLONES)
#define RLHF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RLHF_CLONES
#endif
#define RLHF_ALWAYS_INLINE __attribute__((always_inline))
#define RLHF_INLINE inline RLHF_ALWAYS_INLINE

namespace rlhf {

// GCC lowers wider vectors to the default target before it clones, so 16 bytes is the widest that
// stays whole in every clone.
template <typename F>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(16)));
  typedef int32_t mask __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(16)));
  typedef int64_t mask __attribute__((vector_size(16)));
  static constexpr int kLanes = 2;
};

template <typename V, typename F>
RLHF_INLINE V load(const F* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename F>
RLHF_INLINE void store(F* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// How many threads to use for `work` units when a thread should have at least `grain` of them.
// GNU OpenMP's pool does not survive a fork: a child of a process that has used it would wait for
// threads that are gone, so the child stays serial.
inline int threads_for(int64_t work, int64_t grain, int requested) {
  const int64_t useful = std::max<int64_t>(1, work / grain);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(requested, 1), useful));
  if (threads == 1) return 1;
  static std::atomic<pid_t> owner{0};
  pid_t unowned = 0;
  const pid_t self = getpid();
  if (owner.compare_exchange_strong(unowned, self)) return threads;
  return owner.load() == self ? threads : 1;
}

}  // namespace rlhf
