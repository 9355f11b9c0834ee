// Runs kernels on a CPU, a fiber a thread: what include/cuda_runtime.h is made of.
//
// The fibers of a block share an OS thread and take turns at barriers and warp operations only;
// the blocks of a cluster have an OS thread each. What no GPU would survive ends the launch with
// an error: divergent barriers, deadlocks, warp operations without the whole warp, misaligned
// accesses, and, if asked for, races.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostOfCluster = 8;

// How launches run from now on.
struct Schedule {
  enum Order { kInOrder, kReversed, kShuffled };
  Order order = kInOrder;  // of blocks, and of a block's threads
  unsigned seed = 0;       // kShuffled: of the order, another one each launch
  unsigned workers = 1;    // OS threads that take blocks (or clusters), each with random pauses
};
// Machines and their arithmetic.
struct Machine {
  bool clusters = true;  // whether it has thread-block clusters, as sm_90 does
  bool races = false;    // whether accesses that nothing orders are errors
  bool noise = true;     // approximations are off by up to what the PTX manual allows
};
extern Schedule schedule;
extern Machine machine;
extern long launches;  // so far
extern int device;       // that is selected, of as many as are asked for
extern int launched_on;  // the device that was selected for the last launch

// A line of a kernel.
struct Site {
  const char* file;
  int line;
};

// The coordinates of the thread that asks.
struct Place {
  unsigned thread, block, threads, blocks;
};
const Place& here();

// Ends the launch, which throws std::runtime_error(what) to its caller.
[[noreturn]] void fail(const std::string& what);

void block_barrier(Site site);
// Gives `value` to the warp; returns that of `lane`, or the thread's own for a lane that is none.
uint64_t from_lane(uint32_t mask, uint64_t value, unsigned lane, Site site);
// A bit for each lane of the warp.
uint32_t votes(uint32_t mask, bool yes, Site site);
void fence();
// What `*counter` was; then it is one more, or 0 after `most`.
unsigned atomic_increment(unsigned* counter, unsigned most);
void cluster_arrive(Site site);
void cluster_wait(Site site);
// Shared memory of the cluster's block `rank`, where the caller's block has `mine`.
void* of_cluster(const void* mine, unsigned rank);
// Lets other OS threads overtake this one, if there are several.
void pause();

// Runs `kernel` in each thread of a grid, in clusters of `cluster` blocks.
void launch(unsigned blocks, unsigned threads, unsigned cluster,
            const std::function<void()>& kernel);

}  // namespace emulator
