// The scheduler of the host SIMT emulator: blocks, fibers, barriers and warp collectives.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"
#include "include/cuda_runtime.h"
#include "race_detector.h"

simt::Index threadIdx, blockIdx, blockDim, gridDim;

// The linker keeps the order of the objects: every __shared__ variable of the kernels lies between these two.
extern thread_local unsigned char simt_shared_begin, simt_shared_end;

namespace simt {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kPage = 4096;
constexpr int kDevices = 2;
constexpr unsigned char kGarbage = 0xff;  // NaN in every floating type, -1 in every integer

enum class State { runnable, at_barrier, in_collective, exited };

struct Fiber {
  Context context;
  Index index;
  State state;
  std::source_location where;  // of the barrier
  Vote vote;
  bool predicate;
  Collective kind;
  unsigned mask;
  uint64_t value, result;
  int argument, width;
};

struct Machine {
  Fiber fibers[kMaxThreads];
  Context host;
  const Launch* launch = nullptr;
  int threads = 0, living = 0, at_barrier = 0;
  int current = -1;
  bool entered_from_host = false;
  std::vector<int> runnable;
  int barrier_result = 0;
  unsigned char* dynamic = nullptr;
  bool failed = false;
  std::string message;
  unsigned blocked[kMaxThreads / 32] = {};  // per warp: lanes in a collective, gone, or beyond the block's end
  uint64_t random = 1, blocks_started = 0;
  std::map<const void*, size_t> allowed_shared;
  int device = 0, device_of_last_kernel = -1;
  int trouble[kDevices] = {};  // the cudaError_t that loading a kernel there gives
};

Machine the_machine;
Machine& machine() { return the_machine; }

uint64_t next_random() {
  uint64_t& x = machine().random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x * 0x2545f4914f6cdd1dull >> 16;
}

std::string in_block() {
  return " in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string describe(const std::source_location& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void leave_to_host() {
  Machine& m = machine();
  Fiber& self = m.fibers[m.current];
  m.current = -1;
  races::running(-1);
  switch_context(self.context, m.host);
}

[[noreturn]] void fail(const std::string& message) {
  Machine& m = machine();
  m.failed = true;
  m.message = message + in_block();
  leave_to_host();
  std::abort();
}

void resume(int thread) {
  Machine& m = machine();
  m.current = thread;
  threadIdx = m.fibers[thread].index;
  races::running(thread);
}

int pick_runnable() {
  std::vector<int>& runnable = machine().runnable;
  const size_t i = next_random() % runnable.size();
  const int thread = runnable[i];
  runnable[i] = runnable.back();
  runnable.pop_back();
  return thread;
}

// Leaves the running fiber for a random runnable one, which may be itself; for the host when there is none.
void reschedule() {
  Machine& m = machine();
  if (m.runnable.empty()) return leave_to_host();
  const int self = m.current, next = pick_runnable();
  if (next == self) return;
  resume(next);
  m.entered_from_host = false;
  switch_context(m.fibers[self].context, m.fibers[next].context);
}

void make_runnable(int thread) {
  Machine& m = machine();
  m.fibers[thread].state = State::runnable;
  m.blocked[thread / 32] &= ~(1u << thread % 32);
  m.runnable.push_back(thread);
}

void release_barrier_if_complete() {
  Machine& m = machine();
  if (m.at_barrier == 0 || m.at_barrier < m.living) return;
  const Fiber* first = nullptr;
  int votes = 0;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& fiber = m.fibers[t];
    if (fiber.state == State::exited) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.where.line() != first->where.line() || fiber.where.column() != first->where.column() ||
        std::strcmp(fiber.where.file_name(), first->where.file_name()) != 0) {
      fail("divergent barrier: some threads wait at " + describe(first->where) + ", others at " + describe(fiber.where));
    }
    votes += fiber.predicate;
  }
  if (m.living < m.threads) {
    fail("divergent barrier: " + std::to_string(m.at_barrier) + " threads wait at " + describe(first->where) + ", " +
         std::to_string(m.threads - m.living) + " have left the kernel");
  }
  m.barrier_result = first->vote == Vote::all ? votes == m.threads : first->vote == Vote::any ? votes > 0 : votes;
  m.at_barrier = 0;
  races::block_synchronized();
  for (int t = 0; t < m.threads; ++t) make_runnable(t);
}

bool takes_part(const Fiber* warp, int lane, unsigned mask, int lanes) {
  return (mask >> lane & 1u) != 0 && lane < lanes && warp[lane].state != State::exited;
}

uint64_t shuffled(const Fiber* warp, int lane, unsigned mask, int lanes) {
  const Fiber& self = warp[lane];
  const int first = lane & ~(self.width - 1), last = first + self.width - 1;
  int source = lane;
  switch (self.kind) {
    case Collective::shfl_idx: source = first + (self.argument & (self.width - 1)); break;
    case Collective::shfl_up: source = lane - self.argument < first ? lane : lane - self.argument; break;
    case Collective::shfl_down: source = lane + self.argument > last ? lane : lane + self.argument; break;
    default: source = (lane ^ self.argument) > last ? lane : lane ^ self.argument; break;
  }
  return takes_part(warp, source, mask, lanes) ? warp[source].value : ~uint64_t{0};  // reading an absent lane is undefined
}

uint64_t reduced(Collective kind, uint64_t a, uint64_t b) {
  const auto x = static_cast<unsigned>(a), y = static_cast<unsigned>(b);
  const auto signed_x = static_cast<int>(x), signed_y = static_cast<int>(y);
  switch (kind) {
    case Collective::reduce_add: return x + y;
    case Collective::reduce_and: return x & y;
    case Collective::reduce_or: return x | y;
    case Collective::reduce_xor: return x ^ y;
    case Collective::reduce_min_unsigned: return std::min(x, y);
    case Collective::reduce_max_unsigned: return std::max(x, y);
    case Collective::reduce_min_signed: return static_cast<unsigned>(std::min(signed_x, signed_y));
    default: return static_cast<unsigned>(std::max(signed_x, signed_y));
  }
}

// Each lane's value is the address of what it brings.
void compute_lane(const Fiber* warp, int lane) {
  Together* brought[32];
  for (int other = 0; other < 32; ++other) brought[other] = reinterpret_cast<Together*>(warp[other].value);
  brought[lane]->compute(brought, lane);
}

uint64_t collective_result(const Fiber* warp, int lane, unsigned mask, int lanes) {
  const Collective kind = warp[lane].kind;
  if (kind >= Collective::shfl_idx && kind <= Collective::shfl_xor) return shuffled(warp, lane, mask, lanes);
  if (kind == Collective::together) return compute_lane(warp, lane), 0;
  uint64_t ballot = 0, matching = 0, present = 0, folded = warp[lane].value;
  for (int other = 0; other < lanes; ++other) {
    if (!takes_part(warp, other, mask, lanes)) continue;
    present |= uint64_t{1} << other;
    if (warp[other].value != 0) ballot |= uint64_t{1} << other;
    if (warp[other].value == warp[lane].value) matching |= uint64_t{1} << other;
    if (kind >= Collective::reduce_add && other != lane) folded = reduced(kind, folded, warp[other].value);
  }
  switch (kind) {
    case Collective::syncwarp: return 0;
    case Collective::ballot: return ballot;
    case Collective::any: return ballot != 0;
    case Collective::all: return ballot == present;
    case Collective::match_any: return matching;
    default: return folded;
  }
}

int lanes_of(int warp) { return std::min(32, machine().threads - 32 * warp); }

void release_collective_if_complete(int warp_index, unsigned mask, Collective kind) {
  Machine& m = machine();
  Fiber* warp = m.fibers + 32 * warp_index;
  const int lanes = lanes_of(warp_index);
  if ((m.blocked[warp_index] & mask) != mask) return;
  bool whole_warp = true;
  for (int lane = 0; lane < lanes; ++lane) {
    const bool named = (mask >> lane & 1u) != 0;
    if (warp[lane].state == State::exited) {
      if (named) fail("lane " + std::to_string(lane) + " has left the kernel but a warp collective's mask names it");
      continue;
    }
    if (!named) {
      whole_warp = false;
      continue;
    }
    if (warp[lane].state != State::in_collective || warp[lane].mask != mask || warp[lane].kind != kind) return;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (takes_part(warp, lane, mask, lanes)) warp[lane].result = collective_result(warp, lane, mask, lanes);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (takes_part(warp, lane, mask, lanes)) make_runnable(32 * warp_index + lane);
  }
  if (kind == Collective::syncwarp && whole_warp) races::warp_synchronized(warp_index);
}

void fiber_entry() {
  Machine& m = machine();
  entered(m.entered_from_host ? &m.host : nullptr);
  m.launch->thread();
  const int self = m.current, warp = self / 32;
  m.fibers[self].state = State::exited;
  m.blocked[warp] |= 1u << self % 32;
  --m.living;
  for (int lane = 0; lane < lanes_of(warp); ++lane) {
    const Fiber& fiber = m.fibers[32 * warp + lane];
    if (fiber.state == State::in_collective) release_collective_if_complete(warp, fiber.mask, fiber.kind);
  }
  release_barrier_if_complete();
  reschedule();
  std::abort();
}

std::string describe_deadlock() {
  Machine& m = machine();
  std::map<std::string, int> waiting;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& fiber = m.fibers[t];
    char text[160];
    if (fiber.state == State::at_barrier) {
      ++waiting["at the barrier " + describe(fiber.where)];
    } else if (fiber.state == State::in_collective) {
      std::snprintf(text, sizeof text, "in a collective of warp %d with mask 0x%08x", t / 32, fiber.mask);
      ++waiting[text];
    }
  }
  std::string message = "divergent barrier or warp collective, nothing can run:";
  for (const auto& [where, count] : waiting) message += " " + std::to_string(count) + " threads wait " + where + ";";
  return message + " " + std::to_string(m.threads - m.living) + " have left the kernel";
}

void allocate_stacks() {
  Machine& m = machine();
  if (m.fibers[0].context.stack_bottom != nullptr) return;
  auto* stacks = static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) std::abort();
  for (int t = 0; t < kMaxThreads; ++t) {
    unsigned char* stack = stacks + t * kStackBytes;
    mprotect(stack, kPage, PROT_NONE);
    m.fibers[t].context.stack_bottom = stack + kPage;
    // Tops at different places of a page: at the same one they would all compete for the same lines of the cache.
    m.fibers[t].context.stack_size = kStackBytes - kPage - 64 * (t % 64);
  }
}

void fill_with_garbage(unsigned char* start, size_t bytes) {
  volatile unsigned char* at = start;
  for (size_t i = 0; i < bytes; ++i) at[i] = kGarbage;
}

// Kernels that were left in the middle have poisoned parts of their stacks.
void unpoison_stacks() {
#ifdef SIMT_SANITIZED
  for (const Fiber& fiber : machine().fibers) {
    __asan_unpoison_memory_region(fiber.context.stack_bottom, fiber.context.stack_size);
  }
#endif
}

void start_block(const Index& block) {
  Machine& m = machine();
  blockIdx = block;
  ++m.blocks_started;
  fill_with_garbage(&simt_shared_begin + 1, &simt_shared_end - &simt_shared_begin - 1);
  if (m.dynamic != nullptr) fill_with_garbage(m.dynamic, m.launch->shared_bytes);
  races::watch(&simt_shared_begin + 1, &simt_shared_end - &simt_shared_begin - 1, m.dynamic, m.launch->shared_bytes);
  m.living = m.threads;
  m.at_barrier = 0;
  m.runnable.clear();
  std::fill(std::begin(m.blocked), std::end(m.blocked), ~0u);
  for (int t = 0; t < m.threads; ++t) {
    const unsigned u = static_cast<unsigned>(t);
    m.fibers[t].index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
    prepare(m.fibers[t].context, fiber_entry);
    make_runnable(t);
  }
}

void run_block(const Index& block) {
  Machine& m = machine();
  start_block(block);
  const int first = pick_runnable();
  resume(first);
  m.entered_from_host = true;
  switch_context(m.host, m.fibers[first].context);
  if (!m.failed && m.living > 0) {
    m.failed = true;
    m.message = describe_deadlock() + in_block();
  }
  if (m.failed) unpoison_stacks();
}

cudaError_t check(const Launch& launch) {
  const Index &grid = launch.grid, &block = launch.block;
  const bool grid_fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535u && grid.z - 1 < 65535u;
  const bool block_fits = block.x - 1 < 1024u && block.y - 1 < 1024u && block.z - 1 < 64u;
  if (!grid_fits || !block_fits || uint64_t{block.x} * block.y * block.z > kMaxThreads) return cudaErrorInvalidConfiguration;
  const auto& allowed = machine().allowed_shared;
  const auto found = allowed.find(launch.kernel);
  const size_t limit = found == allowed.end() ? 48 * 1024 : std::max<size_t>(48 * 1024, found->second);
  return launch.shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

int run(const Launch& launch) {
  const cudaError_t status = check(launch);
  if (status != cudaSuccess) return status;
  allocate_stacks();
  Machine& m = machine();
  m.launch = &launch;
  m.device_of_last_kernel = m.device;
  m.failed = false;
  gridDim = launch.grid;
  blockDim = launch.block;
  m.threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  // Exactly as many bytes as were asked for, so that the address sanitizer sees one too many.
  void* dynamic = nullptr;
  if (launch.shared_bytes > 0 && posix_memalign(&dynamic, 16, launch.shared_bytes) != 0) return cudaErrorMemoryAllocation;
  m.dynamic = static_cast<unsigned char*>(dynamic);

  std::vector<uint64_t> order(uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  for (const uint64_t b : order) {
    run_block({static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
               static_cast<unsigned>(b / gridDim.x / gridDim.y)});
    if (m.failed) break;
  }
  std::free(dynamic);
  m.dynamic = nullptr;
  return m.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int allow_dynamic_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > kEmulatedSharedLimit) return cudaErrorInvalidValue;
  machine().allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

int current_device() { return machine().device; }

int set_device(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  machine().device = device;
  return cudaSuccess;
}

int trouble_of_device() { return machine().trouble[machine().device]; }

const char* last_message() { return machine().message.c_str(); }
unsigned char* dynamic_shared() { return machine().dynamic; }
uint64_t blocks_started() { return machine().blocks_started; }
void fail_in_kernel(const char* message) { fail(message); }

int block_barrier(Vote vote, bool predicate, std::source_location where) {
  Machine& m = machine();
  Fiber& self = m.fibers[m.current];
  self.state = State::at_barrier;
  self.where = where;
  self.vote = vote;
  self.predicate = predicate;
  ++m.at_barrier;
  release_barrier_if_complete();
  reschedule();
  return m.barrier_result;
}

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int argument, int width) {
  Machine& m = machine();
  Fiber& self = m.fibers[m.current];
  if ((mask >> (m.current % 32) & 1u) == 0) {
    fail("thread " + std::to_string(m.current) + " calls a warp collective whose mask leaves it out");
  }
  self.state = State::in_collective;
  m.blocked[m.current / 32] |= 1u << m.current % 32;
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.width = width;
  release_collective_if_complete(m.current / 32, mask, kind);
  reschedule();
  return self.result;
}

void compute_together(Together& mine) {
  if (lanes_of(machine().current / 32) < 32) fail("a warp of fewer than 32 threads computes together");
  warp_collective(Collective::together, ~0u, reinterpret_cast<uintptr_t>(&mine), 0, 32);
}

}  // namespace simt

// Draws every later schedule from this seed.
extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) {
  simt::machine().random = seed * 0x9e3779b97f4a7c15ull + 0x1234567ull;
  if (simt::machine().random == 0) simt::machine().random = 1;
}

// From now on kernels do not load on a device, with this cudaError_t; 0 for none.
extern "C" __attribute__((visibility("default"))) void simt_plant_trouble(int device, int error) {
  simt::machine().trouble[device] = error;
}

extern "C" __attribute__((visibility("default"))) int simt_device_of_last_kernel() {
  return simt::machine().device_of_last_kernel;
}
