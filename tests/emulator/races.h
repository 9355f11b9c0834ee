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
//    a barrier, in another of its block; the other is preceded, likewise, by an atomic operation on
//    the same word that came later and then a fence.
// And a block of a cluster may not end before the others have used its shared memory.
// Races of a path that is not taken are not seen.
#pragma once

#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

// What a fence in a thread has made visible to those who see what the thread does next: the block's
// accesses before its barrier number `barriers`, the thread's before its fence number `fences`.
struct Release {
  unsigned block, thread, barriers, fences;
};

// What the threads of a block have done so far that orders their accesses.
struct Past {
  struct Thread {
    Release fence = {};           // the last one
    std::vector<Release> seen;    // by its atomic operations
    std::vector<Release> known;   // seen before a fence
  };
  unsigned barriers = 0, waits = 0;  // for the block, for the cluster
  std::vector<Thread> threads;
  std::vector<Release> known;  // by all of the block's threads since the last barrier

  void barrier();  // of the block: all its threads are there
  void fence(const Place& place);
  void atomic(const Place& place, const void* address);
};

struct Running;

// Forgets the accesses of the launch before.
void begin_races();
// What is wrong with a block's end, or "".
std::string end_of_block(const Running& me);

}  // namespace emulator
