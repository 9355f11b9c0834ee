#include "races.h"

#include <dlfcn.h>
#include <link.h>

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
};

// What happened last to 2 bytes, the smallest elements that kernels write.
constexpr uintptr_t kBytes = 2, kPage = 4096;
struct Cell {
  Access write, reads[2];  // reads that nothing orders, of two threads if there are so many
};

std::mutex mutex;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
std::map<const void*, std::vector<Release>> released;  // by atomic operations on a word

// Where the module's thread-local variables, so a block's shared memory, lie around its anchor.
struct Extent {
  ptrdiff_t begin = 0, end = 0;

  Extent() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const char* begin = static_cast<const char*>(info->dlpi_tls_data);
            const char* end = begin + info->dlpi_phdr[i].p_memsz;
            const char* anchor = shared_anchor();
            if (info->dlpi_phdr[i].p_type == PT_TLS && begin && anchor >= begin && anchor < end)
              *static_cast<Extent*>(self) = {begin - anchor, end - anchor};
          }
          return 0;
        },
        this);
  }
  Extent(ptrdiff_t begin, ptrdiff_t end) : begin(begin), end(end) {}
};

const Extent& extent() {
  static const Extent found;
  return found;
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

bool orders(const std::vector<Release>& known, const Access& a) {
  for (const Release& r : known)
    if (r.block == a.block &&
        (a.barriers < r.barriers || (a.thread == r.thread && a.fences < r.fences)))
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
  return orders(me.past.known, a) || orders(me.past.threads[place.thread].known, a);
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
  return line.empty() ? library : line;
}

std::string describe(const Access& a, const char* what) {
  return std::string(what) + " at " + line_of(a.code) + " by thread " + std::to_string(a.thread) +
         " of block " + std::to_string(a.block);
}

// What is wrong with an access, or "".
std::string check(Cell& cell, const Access& now, const Running& me, bool shared, bool write) {
  // A block finds in shared memory what is left of others, of which nobody may make use.
  if (shared && cell.write.code && cluster_of(me, cell.write.block) != cluster_of(me, now.block))
    cell = Cell();
  const char* memory = shared ? "shared memory: " : "memory: ";
  auto race = [&](const Access& other, const char* what) {
    return std::string("race for ") + memory + describe(other, what) + ", " +
           describe(now, write ? "written" : "read") + ", and nothing orders the two";
  };
  if (cell.write.code && !before(cell.write, me)) return race(cell.write, "written");
  if (!write) {
    if (shared && !cell.write.code)
      return std::string("nobody has written the shared memory ") + describe(now, "read");
    for (Access& read : cell.reads)
      if (!read.code || before(read, me)) {
        read = now;
        break;
      }
    return "";
  }
  for (const Access& read : cell.reads)
    if (read.code && !before(read, me)) return race(read, "read");
  cell = Cell();
  cell.write = now;
  return "";
}

void access(const void* pointer, uintptr_t size, bool write, const void* code) {
  const Running* me = running();
  if (me == nullptr) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  // What is on its stack is the thread's own.
  const auto stack = reinterpret_cast<uintptr_t>(me->fiber->stack.get());
  if (address - stack < Fiber::kStack) return;
  const Place& place = me->place;
  const Past& past = me->past;
  const Access now = {code, place.block, place.thread, past.barriers,
                      past.waits + me->fiber->arrived_at_cluster,
                      past.threads[place.thread].fence.fences};
  std::string wrong;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const Cluster::Member* owner = owner_of(*me, address);
    if (owner && owner->ended)
      wrong = describe(now, "shared memory of a block that has ended is used");
    for (uintptr_t at = address / kBytes; at * kBytes < address + size && wrong.empty(); ++at) {
      std::unique_ptr<Cell[]>& page = pages[at * kBytes / kPage];
      if (!page) page = std::make_unique<Cell[]>(kPage / kBytes);
      wrong = check(page[at % (kPage / kBytes)], now, *me, owner != nullptr, write);
    }
  }
  if (!wrong.empty()) fail(wrong);
}

}  // namespace

void Past::barrier() {
  ++barriers;
  for (Thread& each : threads) {
    known.insert(known.end(), each.known.begin(), each.known.end());
    each.known.clear();
  }
}

void Past::fence(const Place& place) {
  Thread& me = threads[place.thread];
  me.fence = {place.block, place.thread, barriers, me.fence.fences + 1};
  me.known.insert(me.known.end(), me.seen.begin(), me.seen.end());
  me.seen.clear();
}

void Past::atomic(const Place& place, const void* address) {
  if (!machine.races) return;
  const std::lock_guard<std::mutex> lock(mutex);
  Thread& me = threads[place.thread];
  std::vector<Release>& others = released[address];
  me.seen.insert(me.seen.end(), others.begin(), others.end());
  if (me.fence.fences > 0) others.push_back(me.fence);
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
    for (const Access& a : {cell.write, cell.reads[0], cell.reads[1]})
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

// What GCC and Clang call for -fsanitize=thread.
#define EMULATOR_HOOK(name, size, write, ...)                                  \
  extern "C" void __tsan_##name(void* pointer __VA_ARGS__) {                   \
    if (!emulator::machine.races) return;                                      \
    emulator::access(pointer, size, write, __builtin_return_address(0));       \
  }
#define EMULATOR_HOOKS(size)                          \
  EMULATOR_HOOK(read##size, size, false)              \
  EMULATOR_HOOK(write##size, size, true)              \
  EMULATOR_HOOK(unaligned_read##size, size, false)    \
  EMULATOR_HOOK(unaligned_write##size, size, true)
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
EMULATOR_HOOK(read_range, size, false, , uintptr_t size)
EMULATOR_HOOK(write_range, size, true, , uintptr_t size)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
