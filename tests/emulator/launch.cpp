#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>

#include "block.h"

namespace emulator {

Schedule schedule;
Machine machine;
long launches = 0;
int device = 0, launched_on = -1;

namespace {

thread_local std::mt19937 random;  // of pauses

uint64_t seed_of(unsigned what) { return (schedule.seed + launches * 7919) * 1000003 + what; }

}  // namespace

std::vector<unsigned> ordered(unsigned n, unsigned what) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule.order == Schedule::kReversed) std::reverse(order.begin(), order.end());
  if (schedule.order == Schedule::kShuffled)
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed_of(what)));
  return order;
}

void pause() {
  if (schedule.workers < 2) return;
  if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));
}

void launch(unsigned blocks, unsigned threads, unsigned cluster,
            const std::function<void()>& kernel) {
  ++launches;
  launched_on = device;
  begin_races();
  const unsigned units = blocks / cluster;
  const unsigned workers = std::clamp(schedule.workers, 1u, units);
  const std::vector<unsigned> order = ordered(units, 0);
  std::vector<std::unique_ptr<Cluster>> clusters(units);
  for (auto& each : clusters) each = std::make_unique<Cluster>(cluster);
  std::mutex mutex;
  std::string failure;
  // The work of one OS thread: block `rank` of every so many-th cluster.
  auto work = [&](unsigned worker, unsigned rank) {
    random.seed(seed_of(worker * cluster + rank));
    for (unsigned i = worker; i < units; i += workers) {
      Cluster& own = *clusters[i];
      own.members[rank].anchor = shared_anchor();
      if (cluster > 1 && !own.wait()) return;
      pause();
      try {
        run_block(order[i] * cluster + rank, blocks, threads, own, kernel);
      } catch (const std::runtime_error& error) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (failure.empty()) failure = error.what();
        // Only now: what the others then die of is not the cause.
        for (auto& each : clusters) each->leave();
        return;
      }
    }
  };
  if (workers * cluster == 1) {
    work(0, 0);
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers * cluster; ++i)
      pool.emplace_back(work, i / cluster, i % cluster);
    for (std::thread& each : pool) each.join();
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace emulator

// For tests, by ctypes.
#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

EMULATOR_EXPORT void emulator_configure(int order, unsigned seed, unsigned workers, bool clusters,
                                        bool races, bool noise) {
  emulator::schedule = {static_cast<emulator::Schedule::Order>(order), seed, workers};
  emulator::machine = {clusters, races, noise};
}
EMULATOR_EXPORT long emulator_launches() { return emulator::launches; }
EMULATOR_EXPORT int emulator_device() { return emulator::device; }
EMULATOR_EXPORT int emulator_launched_on() { return emulator::launched_on; }
