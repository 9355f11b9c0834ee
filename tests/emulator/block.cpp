#include "block.h"

#include <algorithm>
#include <stdexcept>

namespace emulator {

namespace {

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

struct Warp : Meeting {
  uint64_t given[kWarp], got[kWarp];
};

struct Block : Running {
  const std::function<void()>* kernel;
  Meeting all;       // its barriers
  Meeting clusters;  // the cluster's barriers, within this block
  std::vector<Warp> warps;
  jmp_buf scheduler;
  std::string failure;

  Warp& warp() { return warps[place.thread / kWarp]; }
};

thread_local Block* block = nullptr;  // that runs on this OS thread
thread_local std::vector<std::unique_ptr<Fiber>> fibers;
thread_local char anchor;

// Switches by setjmp and longjmp, which unlike swapcontext make no system call. Frames are left
// but never unwound: errors travel as `failure`, not as exceptions.
__attribute__((noinline)) void to_scheduler() {
  if (_setjmp(block->fiber->resume) == 0) _longjmp(block->scheduler, 1);
}
__attribute__((noinline)) void to_fiber(Fiber& fiber) {
  block->fiber = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void leave(Meeting& meeting, const char* what) {
  ++meeting.left;
  if (meeting.arrived > 0)
    fail(std::string("a thread returned while others wait at ") + what + " at " +
         text(meeting.site));
}

void run_fiber() {
  for (;;) {
    (*block->kernel)();
    if (block->fiber->arrived_at_cluster) fail("a thread returned without cluster_barrier_wait");
    leave(block->warp(), "a warp operation");
    leave(block->all, "a barrier");
    leave(block->clusters, "a cluster's barrier");
    block->fiber->done = true;
    to_scheduler();
  }
}

// Waits for all members; the last one to arrive calls `complete` first.
template <typename Complete>
void meet(Meeting& meeting, const char* what, Site site, Complete complete) {
  if (meeting.left > 0)
    fail(std::string(what) + " at " + text(site) + " which not all threads reach: " +
         std::to_string(meeting.left) + " of " + std::to_string(meeting.members) +
         " have returned");
  if (meeting.arrived == 0) meeting.site = site;
  if (meeting.site.line != site.line || std::string(meeting.site.file) != site.file)
    fail(std::string(what) + " is divergent: threads are at " + text(meeting.site) + " and at " +
         text(site));
  Fiber& fiber = *block->fiber;
  if (++meeting.arrived == meeting.members) {
    complete();
    meeting.arrived = 0;
    ++meeting.rounds;
    return;
  }
  fiber.waits_for = &meeting;
  fiber.round = meeting.rounds;
  to_scheduler();
}

// Gives `value` to the warp and returns those of its lanes, which stay until the next call.
const uint64_t* exchange(uint32_t mask, uint64_t value, Site site) {
  Warp& warp = block->warp();
  if (mask != ~0u || warp.members != kWarp)
    fail("a warp operation at " + text(site) + " without the whole warp: its mask names " +
         std::to_string(__builtin_popcount(mask)) + " lanes of " + std::to_string(warp.members));
  warp.given[block->place.thread % kWarp] = value;
  meet(warp, "a warp operation", site, [&] { std::copy_n(warp.given, kWarp, warp.got); });
  return warp.got;
}

void prepare(Fiber& fiber) {
  if (!fiber.started) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Fiber::kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  fiber.done = fiber.arrived_at_cluster = false;
  fiber.waits_for = nullptr;
}

// Resumes whoever need not wait, until all have returned.
void run_threads(Block& b) {
  const unsigned threads = b.place.threads;
  const std::vector<unsigned> order = ordered(threads, b.place.block + 1);
  for (unsigned done = 0; done < threads;) {
    bool progress = false;
    for (unsigned thread : order) {
      Fiber& fiber = *fibers[thread];
      if (fiber.done) continue;
      if (fiber.waits_for && fiber.waits_for->rounds == fiber.round) continue;
      fiber.waits_for = nullptr;
      b.place.thread = thread;
      to_fiber(fiber);
      if (!b.failure.empty()) return;
      progress = true;
      done += fiber.done;
    }
    if (!progress) {
      b.failure = "deadlock: some threads wait at " + text(b.all.site) + ", others elsewhere";
      return;
    }
  }
}

}  // namespace

void run_block(unsigned index, unsigned blocks, unsigned threads, Cluster& cluster,
               const std::function<void()>& kernel) {
  Block b;
  b.place = {0, index, threads, blocks};
  b.kernel = &kernel;
  b.cluster = &cluster;
  b.all.members = b.clusters.members = threads;
  b.past.threads.resize(threads);
  b.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  for (unsigned t = 0; t < threads; ++t) ++b.warps[t / kWarp].members;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned t = 0; t < threads; ++t) prepare(*fibers[t]);
  block = &b;
  run_threads(b);
  if (b.failure.empty()) b.failure = end_of_block(b);
  block = nullptr;
  if (b.failure.empty()) return cluster.leave();
  const unsigned thread = b.place.thread;
  fibers.clear();  // they are in the middle of something
  throw std::runtime_error("emulated GPU, block " + std::to_string(index) + ", thread " +
                           std::to_string(thread) + ": " + b.failure);
}

const Running* running() { return block; }

char* shared_anchor() { return &anchor; }

const Place& here() { return block->place; }

void fail(const std::string& what) {
  block->failure = what;
  _longjmp(block->scheduler, 1);
}

void block_barrier(Site site) {
  meet(block->all, "__syncthreads", site, [] { block->past.barrier(); });
}

uint64_t from_lane(uint32_t mask, uint64_t value, unsigned lane, Site site) {
  return exchange(mask, value, site)[lane < kWarp ? lane : block->place.thread % kWarp];
}

uint32_t votes(uint32_t mask, bool yes, Site site) {
  const uint64_t* lanes = exchange(mask, yes, site);
  uint32_t bits = 0;
  for (unsigned i = 0; i < kWarp; ++i) bits |= uint32_t(lanes[i]) << i;
  return bits;
}

void cluster_arrive(Site site) {
  if (block->fiber->arrived_at_cluster) fail("a thread arrives twice, again at " + text(site));
  block->fiber->arrived_at_cluster = true;
}

void cluster_wait(Site site) {
  if (!block->fiber->arrived_at_cluster)
    fail("a thread waits that has not arrived, at " + text(site));
  meet(block->clusters, "a cluster's barrier", site, [&] {
    if (!block->cluster->wait())
      fail("a cluster's barrier at " + text(site) + " which not all blocks reach");
    block->past.wait();
  });
  block->fiber->arrived_at_cluster = false;
}

void fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  block->past.fence(block->place);
  pause();
}

unsigned atomic_increment(unsigned* counter, unsigned most) {
  watch(counter, sizeof(*counter), kAtomic, __builtin_return_address(0));
  unsigned old = __atomic_load_n(counter, __ATOMIC_RELAXED);
  block->past.atomic(block->place, counter, [&] {
    while (!__atomic_compare_exchange_n(counter, &old, old >= most ? 0 : old + 1, false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  pause();
  return old;
}

void* of_cluster(const void* mine, unsigned rank) {
  if (rank >= block->cluster->members.size())
    fail("shared memory of block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(block->cluster->members.size()));
  // Thread-local variables lie alike in all threads.
  return block->cluster->members[rank].anchor + (static_cast<const char*>(mine) - &anchor);
}

}  // namespace emulator

// What GCC and Clang call for -fsanitize=alignment, here without their library: an access at an
// address that is no multiple of its type's alignment.
struct MismatchedAccess {
  const char* file;
  uint32_t line, column;
  const struct {
    uint16_t kind, info;
    char name[1];
  } * type;
  uint8_t log_alignment, kind;
};
extern "C" __attribute__((noreturn)) void __ubsan_handle_type_mismatch_v1_abort(
    const MismatchedAccess* access, uintptr_t address) {
  const std::string what = "misaligned access at " +
                           emulator::text({access->file, int(access->line)}) + ": " +
                           access->type->name + " at address " + std::to_string(address) +
                           ", which is no multiple of " +
                           std::to_string(1 << access->log_alignment);
  if (emulator::block == nullptr) throw std::runtime_error(what);
  emulator::fail(what);
}

