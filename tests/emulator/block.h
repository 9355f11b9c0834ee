// The parts of the emulator: launch.cpp deals blocks out to OS threads, block.cpp runs one, races.cpp
// watches what it touches.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "emulator.h"
#include "races.h"

namespace emulator {

// Where the blocks of a cluster, each on an OS thread, wait for each other.
class Cluster {
 public:
  struct Member {
    char* anchor = nullptr;  // an address in the block's shared memory
    bool ended = false;
  };
  std::vector<Member> members;

  explicit Cluster(unsigned blocks) : members(blocks), blocks_(blocks) {}
  // False if a block has returned, so that the others would wait for ever.
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = rounds_;
    if (++arrived_ == blocks_) {
      arrived_ = 0;
      ++rounds_;
      changed_.notify_all();
    }
    changed_.wait(lock, [&] { return rounds_ != round || left_; });
    return rounds_ != round;
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    left_ = true;
    changed_.notify_all();
  }

 private:
  const unsigned blocks_;
  unsigned arrived_ = 0;
  long rounds_ = 0;
  bool left_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Where the threads of a warp or a block wait for each other.
struct Meeting {
  unsigned members = 0, arrived = 0, left = 0;  // left: have returned from the kernel
  long rounds = 0;
  Site site = {};  // where those who have arrived are
};

// A thread of a kernel. It outlives the kernel, and then runs the next block's.
struct Fiber {
  static constexpr size_t kStack = 128 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false, arrived_at_cluster = false;
  const Meeting* waits_for = nullptr;
  long round = 0;  // of the meeting it waits for
};

// What runs on an OS thread.
struct Running {
  Place place;  // of the fiber
  Fiber* fiber = nullptr;
  Cluster* cluster;
  Past past;
};
// On this one; null between blocks.
const Running* running();

// 0 to n - 1 in the schedule's order; `what` tells a launch's shuffles apart.
std::vector<unsigned> ordered(unsigned n, unsigned what);

// An address in the shared memory of the block that runs on this OS thread.
char* shared_anchor();

// Runs a block on this OS thread; throws std::runtime_error if it fails.
void run_block(unsigned index, unsigned blocks, unsigned threads, Cluster& cluster,
               const std::function<void()>& kernel);

}  // namespace emulator
