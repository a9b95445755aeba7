// Kernels are compiled with -fsanitize=thread but linked against this file instead of libtsan: the compiler then calls
// the functions at the end for every memory access. Shuffles and votes order nothing, as on the device.
#include "race_detector.h"

#include <cstdint>
#include <cstdio>
#include <vector>

#include "include/simt_emulator.h"

namespace simt::races {
namespace {

constexpr int kNobody = -1;
constexpr int kSeveral = -2;  // several threads, all atomically

struct Byte {
  uint32_t epoch = 0;  // what is below belongs to this block-wide epoch, else it is void
  int writer = kNobody;
  uint32_t writer_warp_epoch = 0;
  bool written_atomically = false;
  uint32_t reading_warps = 0;
  uint32_t reading_lanes = 0;  // of the last reading warp, in its epoch
  uint32_t reader_warp_epoch = 0;
  int last_reader = kNobody;
};

struct Region {
  const unsigned char* start = nullptr;
  size_t bytes = 0;
  const char* name = "";
  std::vector<Byte> shadow;
};

enum class Access { read, write, atomic };

Region fixed, dynamic;
int thread = kNobody;
uint32_t epoch = 1;
uint32_t warp_epoch[32] = {};

[[noreturn]] void report(const Region& region, size_t offset, const char* what, int other) {
  char message[200];
  std::snprintf(message, sizeof message, "race: thread %d %s byte %zu of %s shared memory with no barrier since thread %d %s",
                thread, what, offset, region.name, other, other == kSeveral ? "and others touched it" : "touched it");
  fail_in_kernel(message);
}

// Whether what `other` did in its warp epoch is known to the running thread.
bool ordered(int other, uint32_t other_warp_epoch) {
  if (other == thread) return true;
  if (other == kSeveral) return false;
  return other / 32 == thread / 32 && other_warp_epoch < warp_epoch[thread / 32];
}

void touch(Region& region, size_t offset, Access access) {
  Byte& byte = region.shadow[offset];
  if (byte.epoch != epoch) byte = Byte{.epoch = epoch};
  const int warp = thread / 32, lane = thread % 32;
  const bool both_atomic = access == Access::atomic && byte.written_atomically;

  if (byte.writer != kNobody && !both_atomic && !ordered(byte.writer, byte.writer_warp_epoch)) {
    report(region, offset, access == Access::read ? "reads" : "writes", byte.writer);
  }
  if (access == Access::read) {
    if (byte.reader_warp_epoch != warp_epoch[warp] || byte.last_reader / 32 != warp) byte.reading_lanes = 0;
    byte.reading_warps |= 1u << warp;
    byte.reading_lanes |= 1u << lane;
    byte.reader_warp_epoch = warp_epoch[warp];
    byte.last_reader = thread;
    return;
  }
  const bool other_warps_read = (byte.reading_warps & ~(1u << warp)) != 0;
  const bool other_lanes_read = (byte.reading_warps >> warp & 1u) != 0 && byte.reader_warp_epoch == warp_epoch[warp] &&
                                (byte.reading_lanes & ~(1u << lane)) != 0;
  if (other_warps_read || other_lanes_read) report(region, offset, "writes", byte.last_reader);
  const bool joins_others = both_atomic && byte.writer != thread && !ordered(byte.writer, byte.writer_warp_epoch);
  byte.writer = joins_others ? kSeveral : thread;
  byte.writer_warp_epoch = warp_epoch[warp];
  byte.written_atomically = access == Access::atomic;
}

void on_access(const void* address, size_t size, Access access) {
  if (thread == kNobody) return;
  for (Region* region : {&dynamic, &fixed}) {
    const size_t offset = static_cast<const unsigned char*>(address) - region->start;
    if (offset >= region->bytes) continue;
    for (size_t i = 0; i < size && offset + i < region->bytes; ++i) touch(*region, offset + i, access);
    return;
  }
}

void watch(Region& region, const char* name, const unsigned char* start, size_t bytes) {
  region.start = start;
  region.bytes = bytes;
  region.name = name;
  if (region.shadow.size() < bytes) region.shadow.resize(bytes);
}

}  // namespace

void watch(const unsigned char* fixed_start, size_t fixed_bytes, const unsigned char* dynamic_start, size_t dynamic_bytes) {
  watch(fixed, "static", fixed_start, fixed_bytes);
  watch(dynamic, "dynamic", dynamic_start, dynamic_bytes);
  block_synchronized();
}

void block_synchronized() { ++epoch; }
void warp_synchronized(int warp) { ++warp_epoch[warp]; }
void running(int now) { thread = now; }

}  // namespace simt::races

void simt::note_atomic(const void* address, size_t size) {
  races::on_access(address, size, races::Access::atomic);
}

using simt::races::Access;
using simt::races::on_access;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* p, size_t size) { on_access(p, size, Access::read); }
void __tsan_write_range(void* p, size_t size) { on_access(p, size, Access::write); }
#define SIMT_HOOKS(size)                                                             \
  void __tsan_read##size(void* p) { on_access(p, size, Access::read); }              \
  void __tsan_write##size(void* p) { on_access(p, size, Access::write); }            \
  void __tsan_unaligned_read##size(void* p) { on_access(p, size, Access::read); }    \
  void __tsan_unaligned_write##size(void* p) { on_access(p, size, Access::write); }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
}
