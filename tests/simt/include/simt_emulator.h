// The part of the host SIMT emulator that fake CUDA headers and kernels compiled by g++ see.
//
// One fiber per thread of a block, one block at a time, all on one host thread. A fiber runs until it waits at a barrier
// or a warp collective; which fiber then runs, and which block comes next, is drawn from a seeded generator.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

namespace simt {

struct Index {
  unsigned x, y, z;
};

enum class Collective : int {
  syncwarp, shfl_idx, shfl_up, shfl_down, shfl_xor, ballot, any, all, match_any, together,
  reduce_add, reduce_and, reduce_or, reduce_xor, reduce_min_unsigned, reduce_max_unsigned, reduce_min_signed, reduce_max_signed,
};

enum class Vote : int { none, count, all, any };

// Waits until every thread of the block is at the same barrier; returns the vote over `predicate`.
int block_barrier(Vote vote, bool predicate, std::source_location where);

// Waits until every living lane of `mask` is at the same collective with the same mask; returns this lane's result.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int argument, int width);

// Something that a warp computes as one, each lane from what all of them bring: all 32 lanes must call it.
struct Together {
  void (*compute)(Together* const* warp, int lane);
};
void compute_together(Together& mine);

[[noreturn]] void fail_in_kernel(const char* message);

// Tells the race detector of an atomic access; a no-op in builds without it.
void note_atomic(const void* address, size_t size);

unsigned char* dynamic_shared();
uint64_t blocks_started();

struct Launch {
  Index grid, block;
  size_t shared_bytes;
  const void* kernel;
  std::function<void()> thread;
};

// Runs a whole grid; returns 0 or the cudaError_t that a device would have reported.
int run(const Launch& launch);
int allow_dynamic_shared(const void* kernel, int bytes);
const char* last_message();

// Two devices with the same memory, the first of them current; what is wrong with the current one is planted.
int current_device();
int set_device(int device);
int trouble_of_device();

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt
