// Matrix products of a warp on tensor cores, and copies to shared memory that do not wait, of sm_80 and newer. On an older
// GPU a kernel that calls them must not run: see `has_tensor_cores`.
//
// Lane 4 g + t of a warp holds, two elements of 16 bits in a register, the first in its lower half:
//   a, 16 by 16:    (row g, columns 2 t and 2 t + 1), (row g + 8, the same), (row g, columns + 8), (row g + 8, columns + 8);
//   b, 16 by 8:     (rows 2 t and 2 t + 1, column g), (rows + 8, column g);
//   sum, 16 by 8:   fp32 at (row g, columns 2 t and 2 t + 1), (row g + 8, the same).
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", and "ldmatrix".) The emulator has these functions
// from tests/simt.
#pragma once

#include "simt.cuh"

#ifdef SIGNAL_REID_SIMT_EMULATOR
#include "tensor_cores.h"
#else

namespace signal_reid {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SIGNAL_REID_SM80(...) __trap()
#else
#define SIGNAL_REID_SM80(...) asm volatile(__VA_ARGS__)
#endif

__device__ inline unsigned shared_address(const void* address) {
  return static_cast<unsigned>(__cvta_generic_to_shared(address));
}

// sum += a b.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, __half>) {
    SIGNAL_REID_SM80("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    SIGNAL_REID_SM80("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four matrices of 8 by 8 elements of 16 bits: lane 8 i + r names row r of matrix i, 16 bytes of shared memory. Lane
// 4 g + t gets elements 2 t and 2 t + 1 of row g of each.
__device__ inline void load_matrices(unsigned (&matrix)[4], const void* row) {
  SIGNAL_REID_SM80("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                   : "r"(shared_address(row))
                   : "memory");
}

// The same, but lane 4 g + t gets elements g of rows 2 t and 2 t + 1.
__device__ inline void load_matrices_transposed(unsigned (&matrix)[4], const void* row) {
  SIGNAL_REID_SM80("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                   : "r"(shared_address(row))
                   : "memory");
}

// Starts to copy 16 bytes to shared memory; where `real` is false, zeros, and nothing is read.
__device__ inline void copy_async(void* to, const void* from, bool real) {
  SIGNAL_REID_SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :
                   : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(real ? 16 : 0)
                   : "memory");
}

// Makes a group of the copies that this thread has started since the last one.
__device__ inline void commit_copies() { SIGNAL_REID_SM80("cp.async.commit_group;" : : : "memory"); }

// Waits until all but the `Groups` last groups of this thread are there. Others of the warp see them after __syncwarp.
template <int Groups>
__device__ inline void wait_for_copies() {
  SIGNAL_REID_SM80("cp.async.wait_group %0;" : : "n"(Groups) : "memory");
}

#undef SIGNAL_REID_SM80

}  // namespace signal_reid

#endif

namespace signal_reid {

// Whether a device of this architecture, such as 860, runs code that was compiled with what is above. It runs that of the
// newest PTX which is not newer than itself, or machine code that was made of it; PTX of before sm_80 traps.
constexpr bool runs_on_tensor_cores(int architecture) {
  for (const int compiled : {__CUDA_ARCH_LIST__}) {  // nvcc's: those that there is PTX of
    if (compiled >= 800 && compiled <= architecture) return true;
  }
  return false;
}

// Whether the current device does.
inline bool has_tensor_cores() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return runs_on_tensor_cores(100 * major + 10 * minor);
}

}  // namespace signal_reid
