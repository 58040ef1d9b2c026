// The simulator's runtime: fibres, their scheduler, barriers, shared memory, and the report when something goes wrong.
// Compiled once into a library of its own (seqops/core/launch.py); every simulated kernel is linked to it.
#include "common/simulator.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {

Thread* current = nullptr;
dim3 block_size, grid_size;

namespace {

// ------------------------------------------------------------------------------------------------ state of a launch

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Meeting {  // of the lanes of one mask: a warp-wide instruction
  uint32_t mask = 0, arrived = 0;
  unsigned generation = 0;
  const char* what = nullptr;
  Where where = {"", 0};
};

struct Warp {
  uint32_t lanes = 0, exited = 0;
  unsigned speed = 100;  // percent of the rounds in which it gets a turn
  bool turn = true;
  Meeting meetings[32];  // one per lowest lane of a mask, so that disjoint groups may meet at the same time
  Slot slots[32];
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, present;
};

struct Cluster {
  Barrier barrier;
  unsigned alive = 0;
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  unsigned alive = 0;
  unsigned speed = 100;
  bool turn = true;
  Cluster* cluster = nullptr;
  std::vector<Block*> peers;  // all blocks of its cluster, by rank
  Barrier named[16];          // 0 is __syncthreads
  unsigned named_threads[16] = {};
  Where block_barrier_at = {"", 0};
  unsigned votes = 0;  // of __syncthreads_or, _and and _count
  std::vector<Warp> warps;
  char* shared = nullptr;       // the static arrays, then the dynamic one
  uint64_t arrays_present = 0;  // static arrays filled and guarded
};

struct Fibre : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  bool done = false;
  const char* waits_for = nullptr;  // null: can run
  Where where = {"", 0};
  unsigned cluster_generation = 0;
  bool cluster_arrived = false;
  std::deque<std::vector<Copy>> copies{1};  // cp.async groups; the last one is still open
  void* fake_stack = nullptr;               // AddressSanitizer's

  Warp& warp() { return block->warps[linear / 32]; }
};

constexpr size_t STACK = 1 << 17;  // bytes a fibre, touched lazily
constexpr size_t PAGE = 4096;
constexpr size_t STATIC_LIMIT = 48 << 10;
constexpr size_t SHARED_LIMIT = 227 << 10;  // what sm_90 and later leave of 228 KB; sm_120 has 99 KB
// Address space for the static arrays of a block: 64 arrays, each with up to a page of padding and a protected page.
constexpr size_t STATIC_SPACE = STATIC_LIMIT + 64 * 2 * PAGE;
constexpr uint64_t CANARY = 0x5EA0B5C0FFEE0001;

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;  // blocks in a cluster, along x
  size_t shared = 0;     // dynamic shared memory in bytes
  bool cooperative = false;
  unsigned seed = 0;
};

struct Array {  // a static shared array: the same place in every block
  unsigned number;
  size_t first, bytes;  // offset in the block's shared memory; bytes as rounded up to 16
};

struct State {
  Launch launch;
  void (*body)(void**) = nullptr;
  void** values = nullptr;
  void* scheduler = nullptr;  // its saved stack pointer
  uint64_t progress = 0;      // changes whenever some thread got further
  std::string error;
  std::map<const void*, Array> arrays;
  size_t static_bytes = 0, static_end = 0;
  const void* scheduler_stack = nullptr;  // for AddressSanitizer
  size_t scheduler_stack_size = 0;
};
State now;

Fibre& self() { return *static_cast<Fibre*>(current); }
size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }
unsigned volume(dim3 d) { return d.x * d.y * d.z; }

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

std::string text(const Fibre& fibre) { return "thread " + text(fibre.index) + " of block " + text(fibre.block->index); }

std::string text(Where where) {
  const std::string file = where.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line);
}

// ------------------------------------------------------------------------------------------------ fibres

}  // namespace

extern "C" void simulator_switch(void** save, void* to) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
asm(R"(
.text
.globl simulator_switch
.hidden simulator_switch
.type simulator_switch,@function
simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simulator_switch,.-simulator_switch
)");
#else
#error "the simulator runs on x86-64: write simulator_switch, run_thread's first frame and on_fault for this processor"
#endif

namespace {

void enter(Fibre& fibre) {
  current = &fibre;
#if defined(__SANITIZE_ADDRESS__)
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, fibre.stack, STACK);
#endif
  simulator_switch(&now.scheduler, fibre.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  current = nullptr;
}

void yield() {
  Fibre& fibre = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fibre.done ? nullptr : &fibre.fake_stack, now.scheduler_stack,
                                 now.scheduler_stack_size);
#endif
  simulator_switch(&fibre.stack_pointer, now.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &now.scheduler_stack, &now.scheduler_stack_size);
#endif
}

// Ends the launch: the scheduler throws; the other fibres are dropped where they stand.
[[noreturn]] void stop(const std::string& message) {
  now.error = text(self()) + ": " + message;
  for (;;) yield();
}

[[noreturn]] void stop(const std::string& what, Where where, const std::string& message) {
  stop(what + " at " + text(where) + ": " + message);
}

template <class Ready>
void wait_until(const char* what, Where where, Ready ready) {
  Fibre& fibre = self();
  while (!ready()) {
    fibre.waits_for = what;
    fibre.where = where;
    yield();
  }
  fibre.waits_for = nullptr;
  ++now.progress;
}

void complete(Barrier& barrier, unsigned count) {
  if (barrier.arrived && barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++now.progress;
  }
}

void run_thread() {  // bottom of every fibre's stack
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &now.scheduler_stack, &now.scheduler_stack_size);
#endif
  now.body(now.values);
  Fibre& fibre = self();
  for (const Meeting& meeting : fibre.warp().meetings) {
    if (meeting.arrived && meeting.mask >> fibre.lane() & 1) {
      stop(meeting.what, meeting.where, "this lane exits, and others of its warp wait for it");
    }
  }
  fibre.done = true;
  fibre.warp().exited |= 1u << fibre.lane();
  --fibre.block->alive;
  --fibre.block->cluster->alive;
  complete(fibre.block->named[0], fibre.block->alive);  // those who wait no longer wait for this thread
  complete(fibre.block->cluster->barrier, fibre.block->cluster->alive);
  ++now.progress;
  yield();
  abort();
}

// ------------------------------------------------------------------------------------------------ shared memory

// Shared memory of one block. Every array ends exactly at a protected page (up to 15 bytes of padding).
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic)
      : dynamic_(round_up(dynamic, 16)), size_(STATIC_SPACE + round_up(dynamic_, PAGE) + PAGE) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + size_ - PAGE, PAGE, PROT_NONE);
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { munmap(base_, size_); }

  char* base() const { return base_; }
  char* dynamic() const { return base_ + size_ - PAGE - dynamic_; }
  void fill() { memset(dynamic(), 0xFF, dynamic_); }
  bool contains(const char* address) const { return address >= base_ && address < base_ + size_; }

 private:
  size_t dynamic_, size_;
  char* base_;
};

std::deque<SharedMemory> memories;  // of the live blocks

size_t dynamic_offset() { return memories.front().dynamic() - memories.front().base(); }

// What an address in a block's shared memory is, for a message: the array before it, or the dynamic one.
std::string describe(const SharedMemory& memory, const char* address) {
  const size_t offset = address - memory.base();
  if (offset >= STATIC_SPACE) {
    return "touches byte " + std::to_string(int64_t(offset) - int64_t(dynamic_offset())) + " of " +
           std::to_string(now.launch.shared) + " bytes of dynamic shared memory";
  }
  const Array* nearest = nullptr;
  for (const auto& [key, array] : now.arrays) {
    if (array.first <= offset && (!nearest || array.first > nearest->first)) nearest = &array;
  }
  if (!nearest) return "touches shared memory before its first array";
  return "touches byte " + std::to_string(offset - nearest->first) + " of a static shared array of " +
         std::to_string(nearest->bytes) + " bytes";
}

std::string fault;

[[noreturn]] void after_fault() { stop(fault); }

struct sigaction previous_handler;
thread_local bool simulating = false;  // other threads of the process have faults of their own

// Runs on a fault: a fibre that touched memory it may not touch continues in after_fault.
void on_fault(int signal_number, siginfo_t* info, void* context) {
  const char* address = static_cast<const char*>(info->si_addr);
  const SharedMemory* in = nullptr;
  for (const SharedMemory& memory : memories) {
    if (memory.contains(address)) in = &memory;
  }
#if defined(__SANITIZE_ADDRESS__)
  const bool ours = simulating && current && in;  // the sanitizer reports the others better
#else
  const bool ours = simulating && current;
#endif
  if (!ours) {
    sigaction(signal_number, &previous_handler, nullptr);  // returning meets the same fault again, under that handler
    return;
  }
  char number[32];
  snprintf(number, sizeof number, "0x%llx", reinterpret_cast<unsigned long long>(address));
  if (in) {
    fault = describe(*in, address);
  } else if (info->si_code == SI_KERNEL) {  // the processor does not say where
    fault = "touches an address that is not aligned to its type, or that no memory can have";
  } else {
    fault = std::string("touches address ") + number + ", which is not its memory";
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15ll) - 8;  // past the red zone, aligned as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&after_fault);
}

// Faults go to on_fault while this lives.
class FaultHandler {
 public:
  FaultHandler() : stack_(1 << 16) {
    stack_t alternate = {};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &previous_stack_);
    struct sigaction handler = {};
    handler.sa_sigaction = on_fault;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &handler, &previous_handler);
    simulating = true;
  }
  FaultHandler(const FaultHandler&) = delete;
  ~FaultHandler() {
    simulating = false;
    sigaction(SIGSEGV, &previous_handler, nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  std::vector<char> stack_;
  stack_t previous_stack_ = {};
};

// ------------------------------------------------------------------------------------------------ scheduler

std::string who_waits(const std::vector<Fibre>& fibres) {
  std::map<std::tuple<std::string, std::string>, std::vector<const Fibre*>> groups;
  for (const Fibre& fibre : fibres) {
    if (fibre.done) continue;
    const std::string what = fibre.waits_for ? fibre.waits_for : "its turn";
    groups[{"block " + text(fibre.block->index), what + " at " + text(fibre.where)}].push_back(&fibre);
  }
  std::string report = "no thread can go on:";
  int reported = 0;
  for (const auto& [key, members] : groups) {
    if (++reported > 8) return report + "\n  ... and " + std::to_string(groups.size() - 8) + " more groups";
    const std::string first = std::to_string(members[0]->linear), last = std::to_string(members.back()->linear);
    report += "\n  " + std::get<0>(key) + ": ";
    report += members.size() == 1 ? "thread " + first + " waits"
                                  : std::to_string(members.size()) + " threads, " + first + " to " + last + ", wait";
    report += " for " + std::get<1>(key);
  }
  return report;
}

void run(std::vector<Fibre>& fibres, std::mt19937& random) {
  std::vector<unsigned> order(fibres.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  const auto percent = [&](unsigned chance) { return random() % 100 < chance; };
  if (now.launch.seed) {
    for (Fibre& fibre : fibres) {
      if (fibre.linear == 0) fibre.block->speed = percent(50) ? 100 : 10;
      if (fibre.lane() == 0) fibre.warp().speed = percent(50) ? 100 : 50;
    }
  }
  size_t alive = fibres.size();
  for (int idle = 0; alive;) {
    const uint64_t before = now.progress;
    if (now.launch.seed) {
      std::shuffle(order.begin(), order.end(), random);
      for (Fibre& fibre : fibres) {
        if (fibre.linear == 0) fibre.block->turn = idle > 50 || percent(fibre.block->speed);
        if (fibre.lane() == 0) fibre.warp().turn = idle > 50 || percent(fibre.warp().speed);
      }
    }
    for (unsigned i : order) {
      if (fibres[i].done || !fibres[i].block->turn || !fibres[i].warp().turn) continue;
      enter(fibres[i]);
      if (!now.error.empty()) throw std::runtime_error(now.error);
      alive -= fibres[i].done;
    }
    idle = now.progress == before ? idle + 1 : 0;
    if (alive && idle > 100) throw std::runtime_error(who_waits(fibres));  // spin loops get 100 rounds
  }
}

void check_launch(const Launch& launch, unsigned threads, unsigned cluster) {
  const auto refuse = [](const std::string& message) { throw std::runtime_error(message); };
  const unsigned asked = volume(launch.block);
  if (!volume(launch.grid) || !asked) refuse("a grid or block without threads");
  if (asked > 1024 || asked > threads) {
    refuse("a block of " + std::to_string(asked) + " threads, compiled for " + std::to_string(threads) + " at most");
  }
  if (launch.grid.y > 65535 || launch.grid.z > 65535) refuse("a grid above 65535 blocks along y or z");
  if (!launch.cluster || launch.cluster > 16) refuse("clusters have 1 to 16 blocks");
  if (cluster && cluster != launch.cluster) {
    refuse("clusters of " + std::to_string(launch.cluster) + ", compiled for " + std::to_string(cluster));
  }
  if (!cluster && launch.cluster != 1) refuse("a cluster launch of a kernel that is no CLUSTER_KERNEL");
  if (launch.grid.x % launch.cluster) refuse("grid.x is not a multiple of the cluster size");
  if (launch.shared > SHARED_LIMIT) {
    refuse(std::to_string(launch.shared) + " bytes of dynamic shared memory, of at most 227 KB");
  }
}

// Stacks are kept: a process that simulates one launch simulates many.
char* stack_of(size_t fibre) {
  static std::vector<char*> stacks;
  while (stacks.size() <= fibre) {
    constexpr size_t TOGETHER = 256;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK * TOGETHER, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < TOGETHER; ++i) stacks.push_back(static_cast<char*>(memory) + i * STACK);
  }
  return stacks[fibre];
}

void prepare(Fibre& fibre, Block& block, unsigned linear, char* stack) {
  const dim3 size = now.launch.block;
  fibre.linear = linear;
  fibre.index = dim3(linear % size.x, linear / size.x % size.y, linear / size.x / size.y);
  fibre.block = &block;
  fibre.block_index = block.index;
  fibre.warp().lanes |= 1u << fibre.lane();
  fibre.slots = fibre.warp().slots;
  fibre.stack = stack;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, STACK);  // of the frames that a dropped fibre left there
#endif
  memcpy(stack, &CANARY, sizeof CANARY);
  void** top = reinterpret_cast<void**>(stack + STACK - 64);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fibre.stack_pointer = top;
}

// Runs the clusters `members` together, to the end.
void run_together(const unsigned* members, size_t count, std::mt19937& random) {
  const Launch& launch = now.launch;
  const unsigned threads = volume(launch.block);
  std::deque<Cluster> clusters(count);
  std::deque<Block> blocks(count * launch.cluster);
  std::vector<Fibre> fibres(blocks.size() * threads);
  for (unsigned b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    const unsigned linear = members[b / launch.cluster] * launch.cluster + b % launch.cluster;
    block.index =
        dim3(linear % launch.grid.x, linear / launch.grid.x % launch.grid.y, linear / launch.grid.x / launch.grid.y);
    block.rank = b % launch.cluster;
    block.alive = threads;
    block.cluster = &clusters[b / launch.cluster];
    block.cluster->alive += threads;
    for (unsigned r = 0; r < launch.cluster; ++r) block.peers.push_back(&blocks[b - block.rank + r]);
    block.warps.resize((threads + 31) / 32);
    memories[b].fill();
    block.shared = memories[b].base();
    for (unsigned t = 0; t < threads; ++t) {
      prepare(fibres[b * threads + t], block, t, stack_of(size_t(b) * threads + t));
    }
  }
  run(fibres, random);
  for (const Fibre& fibre : fibres) {
    if (memcmp(fibre.stack, &CANARY, sizeof CANARY)) throw std::runtime_error(text(fibre) + ": its stack overflowed");
  }
}

void run_launch() {
  const Launch& launch = now.launch;
  std::mt19937 random(launch.seed);
  std::vector<unsigned> clusters(volume(launch.grid) / launch.cluster);
  for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
  if (launch.seed) std::shuffle(clusters.begin(), clusters.end(), random);
  size_t wave = 1;  // clusters alive together
  if (launch.seed) wave += random() % 4;
  if (launch.cooperative) wave = clusters.size();
  wave = std::min(wave, clusters.size());
  memories.clear();
  for (size_t b = 0; b < wave * launch.cluster; ++b) memories.emplace_back(launch.shared);
  const FaultHandler handler;
  for (size_t first = 0; first < clusters.size(); first += wave) {
    run_together(&clusters[first], std::min(wave, clusters.size() - first), random);
  }
}

}  // namespace

const char* run_exported(void (*body)(void**), void** values, unsigned threads, unsigned cluster, const unsigned* shape,
                         size_t shared, bool cooperative, unsigned seed) {
  static std::mutex one_launch;
  const std::lock_guard lock(one_launch);
  thread_local std::string error;
  error.clear();
  now = State();
  now.launch.grid = grid_size = dim3(shape[0], shape[1], shape[2]);
  now.launch.block = block_size = dim3(shape[3], shape[4], shape[5]);
  now.launch.cluster = shape[6];
  now.launch.shared = shared;
  now.launch.cooperative = cooperative;
  now.launch.seed = seed;
  now.body = body;
  now.values = values;
  try {
    check_launch(now.launch, threads, cluster);
    run_launch();
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  memories.clear();
  current = nullptr;
  return error.empty() ? nullptr : error.c_str();
}

void fail(const char* what, Where where, const char* message) { stop(what, where, message); }

// ------------------------------------------------------------------------------------------------ memory

void* dynamic_shared() { return self().block->shared + dynamic_offset(); }

void* static_shared(const void* key, size_t bytes) {
  const auto [slot, added] = now.arrays.try_emplace(key);
  Array& array = slot->second;
  if (added) {
    array.number = now.arrays.size() - 1;
    array.bytes = round_up(bytes, 16);
    now.static_bytes += array.bytes;
    if (now.static_bytes > STATIC_LIMIT) stop("more than 48 KB of static shared memory");
    if (now.static_bytes + now.launch.shared > SHARED_LIMIT) stop("more than 227 KB of shared memory");
    if (array.number >= 64) stop("more than 64 static shared arrays");
    now.static_end += round_up(array.bytes, PAGE) + PAGE;
    array.first = now.static_end - PAGE - array.bytes;
  }
  Block& block = *self().block;
  char* address = block.shared + array.first;
  if (!(block.arrays_present >> array.number & 1)) {
    block.arrays_present |= uint64_t(1) << array.number;
    memset(address, 0xFF, array.bytes);
    mprotect(address + array.bytes, PAGE, PROT_NONE);
  }
  return address;
}

void* cluster_address(const void* own, unsigned rank, const char* what, Where where) {
  Block& block = *self().block;
  if (rank >= block.peers.size()) stop(what, where, "no block " + std::to_string(rank) + " in this cluster");
  check_shared(own, 1, what, where);
  return block.peers[rank]->shared + (static_cast<const char*>(own) - block.shared);
}

void check_shared(const void* address, size_t bytes, const char* what, Where where) {
  const char* base = self().block->shared;
  const size_t end = dynamic_offset() + round_up(now.launch.shared, 16),
               offset = static_cast<const char*>(address) - base;
  if (static_cast<const char*>(address) < base || offset + bytes > end) {
    stop(what, where, "not in this block's shared memory");
  }
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    stop(what, where, "address not aligned to " + std::to_string(bytes));
  }
}

void copy_async(void* shared, const void* global, size_t bytes, size_t present, Where where) {
  check_shared(shared, bytes, "cp.async", where);
  if (reinterpret_cast<uintptr_t>(global) % bytes) {
    stop("cp.async", where, "global address not aligned to " + std::to_string(bytes));
  }
  if (present > bytes) stop("cp.async", where, "more bytes present than copied");
  self().copies.back().push_back({shared, global, bytes, present});
}

void copy_async_commit() { self().copies.emplace_back(); }

void copy_async_wait(unsigned newer) {  // nothing arrives earlier than here
  auto& groups = self().copies;
  while (groups.size() > newer + 1) {
    for (const Copy& copy : groups.front()) {
      memcpy(copy.to, copy.from, copy.present);
      memset(static_cast<char*>(copy.to) + copy.present, 0, copy.bytes - copy.present);
    }
    groups.pop_front();
  }
}

// ------------------------------------------------------------------------------------------------ waiting

namespace {

// Every thread of a block comes to the same __syncthreads: another line is a barrier in a branch.
void arrive_at_block_barrier(Where where) {
  Block& block = *self().block;
  Barrier& barrier = block.named[0];
  const Where first = block.block_barrier_at;
  if (!barrier.arrived) {
    block.block_barrier_at = where;
  } else if (first.line != where.line || strcmp(first.file, where.file)) {
    stop("__syncthreads", where, "other threads of this block are in the one at " + text(first));
  }
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  complete(barrier, block.alive);
  wait_until("__syncthreads", where, [&] { return barrier.generation != generation; });
}

}  // namespace

void block_barrier(Where where) { arrive_at_block_barrier(where); }

unsigned block_barrier_count(bool predicate, Where where) {
  Block& block = *self().block;
  block.votes += predicate;
  arrive_at_block_barrier(where);
  const unsigned count = block.votes;
  if (block.named[0].arrived + 1 == block.alive) block.votes = 0;  // the last one has read
  arrive_at_block_barrier(where);                                  // nobody votes anew before
  return count;
}

bool block_barrier_any(bool predicate, Where where) { return block_barrier_count(predicate, where) != 0; }

void named_barrier(int id, unsigned threads, bool wait, Where where) {
  const char* what = wait ? "named_barrier_sync" : "named_barrier_arrive";
  if (id < 1 || id > 15) stop(what, where, "its number is not 1 to 15");
  if (!threads || threads % 32) stop(what, where, "threads not a multiple of 32");
  Block& block = *self().block;
  Barrier& barrier = block.named[id];
  if (barrier.arrived && block.named_threads[id] != threads) stop(what, where, "other threads gave another count");
  block.named_threads[id] = threads;
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  complete(barrier, threads);
  if (wait) wait_until("named barrier", where, [&] { return barrier.generation != generation; });
}

unsigned cluster_rank() { return self().block->rank; }
unsigned cluster_size() { return now.launch.cluster; }

void cluster_arrive(Where where) {
  Fibre& fibre = self();
  Cluster& cluster = *fibre.block->cluster;
  if (fibre.cluster_arrived) stop("cluster_arrive", where, "twice without cluster_wait");
  fibre.cluster_arrived = true;
  fibre.cluster_generation = cluster.barrier.generation;
  ++cluster.barrier.arrived;
  complete(cluster.barrier, cluster.alive);
}

void cluster_wait(Where where) {
  Fibre& fibre = self();
  if (!fibre.cluster_arrived) stop("cluster_wait", where, "without cluster_arrive");
  Cluster& cluster = *fibre.block->cluster;
  wait_until("cluster barrier", where, [&] { return cluster.barrier.generation != fibre.cluster_generation; });
  fibre.cluster_arrived = false;
}

namespace {

struct MBarrier {  // what the 8 bytes hold here; a GPU's format is its own
  uint16_t count, pending;
  int32_t bytes : 31;  // announced and not yet come; negative while bytes come before their announcement
  uint32_t phase : 1;
};
static_assert(sizeof(MBarrier) == sizeof(uint64_t));

// A barrier never initialised reads as NaN, all bits one.
MBarrier read(const uint64_t* barrier, const char* what, Where where) {
  MBarrier state;
  memcpy(&state, barrier, sizeof state);
  if (!state.count || state.count == 0xFFFF) stop(what, where, "the mbarrier is not initialised");
  return state;
}

void write(uint64_t* barrier, MBarrier state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.pending = state.count;
    state.phase ^= 1;
  }
  memcpy(barrier, &state, sizeof state);
  ++now.progress;
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned count, Where where) {
  check_shared(barrier, sizeof *barrier, "mbarrier_init", where);
  if (!count || count >= 0xFFFF) stop("mbarrier_init", where, "a count of " + std::to_string(count));
  write(barrier, {uint16_t(count), uint16_t(count), 0, 0});
}

void mbarrier_arrive(uint64_t* barrier, unsigned bytes, Where where) {
  MBarrier state = read(barrier, "mbarrier_arrive", where);
  if (!state.pending) stop("mbarrier_arrive", where, "more arrivals than the mbarrier counts");
  --state.pending;
  state.bytes += int(bytes);
  write(barrier, state);
}

void mbarrier_complete(uint64_t* barrier, unsigned bytes, Where where) {
  MBarrier state = read(barrier, "mbarrier", where);
  state.bytes -= int(bytes);
  write(barrier, state);
}

bool mbarrier_test(const uint64_t* barrier, unsigned parity, Where where) {
  if (read(barrier, "mbarrier_test", where).phase != (parity & 1)) return true;
  spin("mbarrier", where);
  return false;
}

void mbarrier_wait(const uint64_t* barrier, unsigned parity, Where where) {
  wait_until("mbarrier", where, [&] { return read(barrier, "mbarrier_wait", where).phase != (parity & 1); });
}

void spin(const char* what, Where where) {
  self().waits_for = what;
  self().where = where;
  yield();
  self().waits_for = nullptr;
}

void made_progress() { ++now.progress; }

// ------------------------------------------------------------------------------------------------ warps

uint32_t meet(uint32_t mask, const char* what, Where where) {
  Fibre& fibre = self();
  Warp& warp = fibre.warp();
  mask &= warp.lanes;
  if (!(mask >> fibre.lane() & 1)) stop(what, where, "the mask leaves out the calling lane");
  if (mask & warp.exited) stop(what, where, "the mask names a lane that has exited");
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (!meeting.arrived) {
    meeting.mask = mask;
    meeting.what = what;
    meeting.where = where;
  } else if (meeting.mask != mask || strcmp(meeting.what, what)) {
    stop(what, where, std::string("other lanes of this warp are in ") + meeting.what + " at " + text(meeting.where));
  }
  const unsigned generation = meeting.generation;
  meeting.arrived |= 1u << fibre.lane();
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++now.progress;
  } else {
    wait_until(what, where, [&] { return meeting.generation != generation; });
  }
  return mask;
}

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, const char* what, Where where) {
  const unsigned lane = current->lane();
  if (int(lane) < count * 8) check_shared(row, 16, what, where);
  exchange(~0u, what, where, row, [&](uint32_t present) {
    if (present != ~0u) stop(what, where, "needs all 32 lanes");
    for (int m = 0; m < count; ++m) {
      uint16_t pair[2];
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
        memcpy(&pair[i], static_cast<const char*>(shown<const void*>(m * 8 + r)) + c * 2, 2);
      }
      memcpy(&registers[m], pair, 4);
    }
    return 0;
  });
}

namespace {

float element(uint32_t bits, int part, Format format) {
  if (format == Format::tf32) return __uint_as_float(bits & 0xFFFFE000u);
  const uint32_t half = bits >> 16 * part & 0xFFFF;
  if (format == Format::bf16) return __uint_as_float(half << 16);
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24));
}

}  // namespace

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Format format, Where where) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  const unsigned lane = current->lane();
  const int half = format == Format::tf32 ? 4 : 8, per = half / 4;  // elements of k a register column; in a register
  exchange(~0u, "mma", where, mine, [&](uint32_t present) {
    if (present != ~0u) stop("mma", where, "needs all 32 lanes");
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 2 * half; ++k) {
        const int within = k % half, part = within % per, thread = within / per;
        const Fragments &fa = shown<Fragments>(row % 8 * 4 + thread), &fb = shown<Fragments>(column * 4 + thread);
        d[i] += element(fa.a[row / 8 + k / half * 2], part, format) * element(fb.b[k / half], part, format);
      }
    }
    return 0;
  });
}

}  // namespace simulator
