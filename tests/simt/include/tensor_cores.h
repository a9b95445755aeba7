// What csrc/tensor_cores.cuh declares, for the host emulator: each lane's part of a warp's matrices as the PTX ISA lays it
// out. A copy that was started fills its place with NaN until the thread waits for it, so that nothing can rely on the old
// bytes or on the new ones too early.
#pragma once

#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace simt {

// What a lane brings to a product or a load of its warp's matrices, and what it takes away.
struct Fragments : Together {
  unsigned a[4], b[2];
  float sum[4];
  float (*widen)(unsigned short);

  static float element(const unsigned* registers, int i, float (*widen)(unsigned short)) {
    return widen(static_cast<unsigned short>(registers[i / 2] >> 16 * (i % 2)));
  }
  // Element (row, column) of the 16 by 16 matrix a, and of the 16 by 8 matrix b.
  static float of_a(Together* const* warp, int row, int column) {
    const auto* owner = static_cast<const Fragments*>(warp[row % 8 * 4 + column % 8 / 2]);
    return element(owner->a, column / 8 * 4 + row / 8 * 2 + column % 2, owner->widen);
  }
  static float of_b(Together* const* warp, int row, int column) {
    const auto* owner = static_cast<const Fragments*>(warp[column * 4 + row % 8 / 2]);
    return element(owner->b, row / 8 * 2 + row % 2, owner->widen);
  }
  static void multiply(Together* const* warp, int lane) {
    auto* self = static_cast<Fragments*>(warp[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) self->sum[i] += of_a(warp, row, k) * of_b(warp, k, column);
    }
  }
};

// A row of one of four matrices of 8 by 8, and two elements of each in the end.
struct Rows : Together {
  unsigned short row[8];
  unsigned matrix[4];
  bool transposed;

  static void load(Together* const* warp, int lane) {
    auto* self = static_cast<Rows*>(warp[lane]);
    for (int i = 0; i < 4; ++i) {
      self->matrix[i] = 0;
      for (int e = 0; e < 2; ++e) {
        const int outer = lane / 4, inner = lane % 4 * 2 + e;
        const auto* owner = static_cast<const Rows*>(warp[8 * i + (self->transposed ? inner : outer)]);
        self->matrix[i] |= static_cast<unsigned>(owner->row[self->transposed ? outer : inner]) << 16 * e;
      }
    }
  }
};

struct Copy {
  void* to;
  const void* from;
  bool real;
};

// The groups of copies that a thread has started, the last one not yet closed.
struct Copies {
  uint64_t block = 0;
  std::vector<std::vector<Copy>> groups{1};
};
inline Copies copies[1024];

inline std::vector<std::vector<Copy>>& copies_of_this_thread() {
  Copies& mine = copies[threadIdx.x];
  if (mine.block != blocks_started()) mine = {blocks_started(), std::vector<std::vector<Copy>>(1)};
  return mine.groups;
}

}  // namespace simt

namespace signal_reid {

template <class T>
void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  simt::Fragments mine;
  mine.compute = simt::Fragments::multiply;
  mine.widen = [](unsigned short bits) {
    if constexpr (std::is_same_v<T, __half>) return __half2float({bits});
    else return __bfloat162float({bits});
  };
  std::memcpy(mine.a, a, sizeof a);
  mine.b[0] = b0, mine.b[1] = b1;
  std::memcpy(mine.sum, sum, sizeof sum);
  simt::compute_together(mine);
  std::memcpy(sum, mine.sum, sizeof sum);
}

inline void load_rows(unsigned (&matrix)[4], const void* row, bool transposed) {
  simt::Rows mine;
  mine.compute = simt::Rows::load;
  mine.transposed = transposed;
  const uint4 bytes = *static_cast<const uint4*>(row);  // one access, which is watched
  std::memcpy(mine.row, &bytes, sizeof bytes);
  simt::compute_together(mine);
  std::memcpy(matrix, mine.matrix, sizeof matrix);
}
inline void load_matrices(unsigned (&matrix)[4], const void* row) { load_rows(matrix, row, false); }
inline void load_matrices_transposed(unsigned (&matrix)[4], const void* row) { load_rows(matrix, row, true); }

inline void copy_async(void* to, const void* from, bool real) {
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
  simt::copies_of_this_thread().back().push_back({to, from, real});
}
inline void commit_copies() { simt::copies_of_this_thread().emplace_back(); }

template <int Groups>
void wait_for_copies() {
  auto& groups = simt::copies_of_this_thread();
  while (groups.size() > Groups + 1) {
    for (const simt::Copy& copy : groups.front()) {
      *static_cast<uint4*>(copy.to) = copy.real ? *static_cast<const uint4*>(copy.from) : uint4{};
    }
    groups.erase(groups.begin());
  }
}

}  // namespace signal_reid
