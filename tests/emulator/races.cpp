#include "races.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "block.h"

namespace emulator {

namespace {

// An access: who, when, from which instruction. `code` is null where there was none.
struct Access {
  const void* code = nullptr;
  unsigned block, thread, barriers, arrivals, fences;
  uint8_t bytes;  // of the cell, a bit each
  Kind kind;
};

// What happened last to two bytes.
constexpr uintptr_t kBytes = 2, kPage = 4096;
struct Cell {
  Access writes[kBytes];      // of each byte
  std::vector<Access> reads;  // since then, at most two of a block
};
constexpr size_t kMostReads = 16;

std::mutex mutex;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
std::map<const void*, std::vector<Release>> released;  // by atomic operations on a word

// Where the module's thread-local variables, so a block's shared memory, lie around its anchor.
struct Extent {
  ptrdiff_t begin = 0, end = 0;
};

const Extent& extent() {
  static const Extent extent = [] {
    Extent found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* found) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const char* begin = static_cast<const char*>(info->dlpi_tls_data);
            const char* end = begin + info->dlpi_phdr[i].p_memsz;
            const char* anchor = shared_anchor();
            if (info->dlpi_phdr[i].p_type == PT_TLS && begin && anchor >= begin && anchor < end)
              *static_cast<Extent*>(found) = {begin - anchor, end - anchor};
          }
          return 0;
        },
        &found);
    return found;
  }();
  return extent;
}

// The block of the cluster whose shared memory this is; null for other memory.
Cluster::Member* owner_of(const Running& me, uintptr_t address) {
  for (Cluster::Member& member : me.cluster->members) {
    const ptrdiff_t at = address - reinterpret_cast<uintptr_t>(member.anchor);
    if (at >= extent().begin && at < extent().end) return &member;
  }
  return nullptr;
}

unsigned cluster_of(const Running& me, unsigned block) {
  return block / unsigned(me.cluster->members.size());
}

bool orders(const std::vector<Release>& known, const Access& a, const Running& me) {
  for (const Release& r : known)
    if ((r.block == a.block &&
         (a.barriers < r.barriers || (a.thread == r.thread && a.fences < r.fences))) ||
        (cluster_of(me, r.block) == cluster_of(me, a.block) && a.arrivals < r.waits))
      return true;
  return false;
}

// Whether `a` happened before what the thread `me` does now.
bool before(const Access& a, const Running& me) {
  const Place& place = me.place;
  if (a.block == place.block && (a.thread == place.thread || a.barriers < me.past.barriers))
    return true;
  if (cluster_of(me, a.block) == cluster_of(me, place.block) && a.arrivals < me.past.waits)
    return true;
  return orders(me.past.known, a, me) || orders(me.past.threads[place.thread].known, a, me);
}

std::string line_of(const void* code) {
  Dl_info found;
  if (!dladdr(code, &found)) return "?";
  const std::string library = found.dli_fname;
  char offset[32];
  // The call's last byte, which belongs to the line, not where it returns to.
  snprintf(offset, sizeof(offset), "%tx",
           static_cast<const char*>(code) - static_cast<const char*>(found.dli_fbase) - 1);
  std::string line;
  if (FILE* out = popen(("addr2line -e '" + library + "' " + offset).c_str(), "r")) {
    for (int c; (c = fgetc(out)) != EOF && c != '\n';) line += char(c);
    pclose(out);
  }
  line.resize(std::min(line.size(), line.find(' ')));  // discriminators
  return line.empty() ? library : line;
}

std::string describe(const Access& a, const char* what) {
  return std::string(what) + " at " + line_of(a.code) + " by thread " + std::to_string(a.thread) +
         " of block " + std::to_string(a.block);
}

void keep(std::vector<Access>& reads, const Access& now, const Running& me) {
  unsigned of_block = 0;
  for (Access& read : reads) {
    if ((read.bytes & ~now.bytes) == 0 && before(read, me)) {
      read = now;
      return;
    }
    of_block += read.block == now.block;
  }
  if (of_block < 2 && reads.size() < kMostReads) reads.push_back(now);
}

// What is wrong with an access, or "".
std::string check(Cell& cell, const Access& now, const Running& me, bool shared) {
  for (const Access& write : cell.writes)
    // A block finds in shared memory what is left of others, of which nobody may make use.
    if (shared && write.code && cluster_of(me, write.block) != cluster_of(me, now.block)) {
      cell = Cell();
      break;
    }
  constexpr const char* kNames[] = {"read", "written", "changed by an atomic operation"};
  auto race = [&](const Access& other) {
    return std::string("race for ") + (shared ? "shared memory: " : "memory: ") +
           describe(other, kNames[other.kind]) + ", " + describe(now, kNames[now.kind]) +
           ", and nothing orders the two";
  };
  for (uintptr_t byte = 0; byte < kBytes; ++byte) {
    const Access& write = cell.writes[byte];
    if (!(now.bytes >> byte & 1)) continue;
    if (shared && !write.code && now.kind == kRead)
      return describe(now, "nobody has written the shared memory read");
    const bool atomics = write.kind == kAtomic && now.kind == kAtomic;
    if (write.code && !atomics && !before(write, me)) return race(write);
  }
  if (now.kind == kRead) {
    keep(cell.reads, now, me);
    return "";
  }
  for (const Access& read : cell.reads)
    if ((read.bytes & now.bytes) != 0 && !before(read, me)) return race(read);
  auto covered = [&](const Access& read) { return (read.bytes & ~now.bytes) == 0; };
  cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), covered),
                   cell.reads.end());
  for (uintptr_t byte = 0; byte < kBytes; ++byte)
    if (now.bytes >> byte & 1) cell.writes[byte] = now;
  return "";
}

std::string check(const Running& me, uintptr_t address, size_t bytes, Kind kind,
                  const void* code) {
  const Place& place = me.place;
  Access now = {code, place.block, place.thread, me.past.barriers,
                me.past.waits + me.fiber->arrived_at_cluster,
                me.past.threads[place.thread].fences, 0, kind};
  const std::lock_guard<std::mutex> lock(mutex);
  const Cluster::Member* owner = owner_of(me, address);
  if (owner && owner->ended)
    return describe(now, "shared memory of a block that has ended is used");
  for (uintptr_t at = address / kBytes; at * kBytes < address + bytes; ++at) {
    now.bytes = 0;
    for (uintptr_t byte = 0; byte < kBytes; ++byte)
      now.bytes |= (at * kBytes + byte - address < bytes) << byte;
    std::unique_ptr<Cell[]>& page = pages[at * kBytes / kPage];
    if (!page) page = std::make_unique<Cell[]>(kPage / kBytes);
    const std::string wrong = check(page[at % (kPage / kBytes)], now, me, owner != nullptr);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// The functions above may be the linker's pick from objects that report their accesses, too.
thread_local bool watching = false;

}  // namespace

void watch(const void* pointer, size_t bytes, Kind kind, const void* code) {
  const Running* me = running();
  if (!machine.races || me == nullptr || watching) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  // What is on its stack is the thread's own.
  const auto stack = reinterpret_cast<uintptr_t>(me->fiber->stack.get());
  if (address - stack < Fiber::kStack) return;
  watching = true;
  const std::string wrong = check(*me, address, bytes, kind, code);
  watching = false;
  if (!wrong.empty()) fail(wrong);
}

void Past::meet() {
  for (Thread& each : threads) {
    known.insert(known.end(), each.known.begin(), each.known.end());
    each.known.clear();
  }
}

void Past::barrier() {
  ++barriers;
  meet();
}

void Past::wait() {
  ++waits;
  meet();
}

void Past::fence(const Place& place) {
  Thread& me = threads[place.thread];
  ++me.fences;
  me.known.insert(me.known.end(), me.seen.begin(), me.seen.end());
  me.seen.clear();
  me.published = known;
  me.published.insert(me.published.end(), me.known.begin(), me.known.end());
  me.published.push_back({place.block, place.thread, barriers, waits, me.fences});
}

void Past::atomic(const Place& place, const void* address, const std::function<void()>& operation) {
  if (!machine.races) return operation();
  const std::lock_guard<std::mutex> lock(mutex);  // the word and what is said of it change as one
  operation();
  Thread& me = threads[place.thread];
  std::vector<Release>& others = released[address];
  me.seen.insert(me.seen.end(), others.begin(), others.end());
  others.insert(others.end(), me.published.begin(), me.published.end());
}

std::string end_of_block(const Running& me) {
  if (!machine.races || me.cluster->members.size() == 1) return "";
  const std::lock_guard<std::mutex> lock(mutex);
  Cluster::Member& own = me.cluster->members[me.place.block % me.cluster->members.size()];
  own.ended = true;
  const auto anchor = reinterpret_cast<uintptr_t>(own.anchor);
  const uintptr_t begin = anchor + extent().begin, end = anchor + extent().end;
  for (uintptr_t at = begin / kBytes; at * kBytes < end; ++at) {
    const auto page = pages.find(at * kBytes / kPage);
    if (page == pages.end()) continue;
    const Cell& cell = page->second[at % (kPage / kBytes)];
    std::vector<Access> all = cell.reads;
    all.insert(all.end(), cell.writes, cell.writes + kBytes);
    for (const Access& a : all)
      if (a.code && a.block != me.place.block &&
          cluster_of(me, a.block) == cluster_of(me, me.place.block) && !before(a, me))
        return describe(a, "the block may end before its shared memory is used");
  }
  return "";
}

void begin_races() {
  pages.clear();
  released.clear();
}

}  // namespace emulator

// What GCC calls for -fsanitize=thread.
#define EMULATOR_HOOK(name, size, kind, ...)                                         \
  extern "C" void __tsan_##name(void* pointer __VA_ARGS__) {                         \
    if (!emulator::machine.races) return;                                            \
    emulator::watch(pointer, size, emulator::kind, __builtin_return_address(0));     \
  }
#define EMULATOR_HOOKS(size)                          \
  EMULATOR_HOOK(read##size, size, kRead)              \
  EMULATOR_HOOK(write##size, size, kWrite)            \
  EMULATOR_HOOK(unaligned_read##size, size, kRead)    \
  EMULATOR_HOOK(unaligned_write##size, size, kWrite)
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
EMULATOR_HOOK(read_range, size, kRead, , uintptr_t size)
EMULATOR_HOOK(write_range, size, kWrite, , uintptr_t size)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
