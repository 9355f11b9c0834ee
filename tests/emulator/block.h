// The parts of the emulator: launch.cpp deals blocks out to OS threads, block.cpp runs one.
#pragma once

#include <condition_variable>
#include <mutex>
#include <vector>

#include "emulator.h"

namespace emulator {

// Where the blocks of a cluster, each on an OS thread, wait for each other.
class Cluster {
 public:
  std::vector<char*> anchors;  // an address in each block's shared memory

  explicit Cluster(unsigned blocks) : anchors(blocks), blocks_(blocks) {}
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

// 0 to n - 1 in the schedule's order; `what` tells a launch's shuffles apart.
std::vector<unsigned> ordered(unsigned n, unsigned what);

// An address in the shared memory of the block that runs on this OS thread.
char* shared_anchor();

// Runs a block on this OS thread; throws std::runtime_error if it fails.
void run_block(unsigned index, unsigned blocks, unsigned threads, Cluster& cluster,
               const std::function<void()>& kernel);

}  // namespace emulator
