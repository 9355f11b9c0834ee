// Finds accesses to memory that nothing orders: races that a GPU may lose, whichever way they end
// here. Also shared memory that is read before it is written.
//
// The compiler reports every access (its hooks for -fsanitize=thread; their library is not linked).
// Each piece of memory remembers who wrote and read it last, and when: so many barriers, fences and
// cluster barriers after the launch began. Of two accesses by different threads, one a write, the
// earlier must have happened before the later one, by the rules of the PTX memory model:
//  - in a block, a barrier of the block lies between them (warp shuffles order nothing);
//  - in a cluster, the one precedes an arrival, the other follows the wait;
//  - else the one is followed by a fence and then an atomic operation, in the thread itself or, after
//    a barrier, in another of its block or cluster; the other is preceded, likewise, by an atomic
//    operation on the same word that came later and then a fence; or by several such links.
// Atomic operations race with other accesses, not with each other. A block of a cluster may not end
// before the others have used its shared memory.
//
// Not seen: paths that are not taken; of reads that nothing orders, the third of a block and those
// after the first 16. Stricter than the model: what a block of a cluster has learnt by an atomic
// operation the others do not know.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

// What a fence in a thread has made visible to those who see what the thread does next: the block's
// accesses before its barrier number `barriers`, the cluster's before the wait number `waits`, the
// thread's before its fence number `fences`.
struct Release {
  unsigned block, thread, barriers, waits, fences;
};

// What the threads of a block have done so far that orders their accesses.
struct Past {
  struct Thread {
    unsigned fences = 0;
    std::vector<Release> seen;       // by its atomic operations
    std::vector<Release> known;      // seen before a fence
    std::vector<Release> published;  // by a fence, for atomic operations after it
  };
  unsigned barriers = 0, waits = 0;  // of the block, of the cluster
  std::vector<Thread> threads;
  std::vector<Release> known;  // by all of the block's threads

  void barrier();  // all threads of the block are there
  void wait();     // likewise, at the cluster's
  void fence(const Place& place);
  void atomic(const Place& place, const void* address, const std::function<void()>& operation);

 private:
  void meet();
};

enum Kind { kRead, kWrite, kAtomic };
// Ends the launch if the access of the running thread is a race.
void watch(const void* pointer, size_t bytes, Kind kind, const void* code);

struct Running;

// What is wrong with a block's end, or "".
std::string end_of_block(const Running& me);
// Forgets the accesses of the launch before.
void begin_races();

}  // namespace emulator
