// Warp and block primitives: conversions, 16-byte loads and stores, reductions, dynamic shared memory.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime.cuh"

namespace signal_reid {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// As many elements of T as one memory transaction moves: 16 bytes unless a width is given.
template <class T, int Width = 16 / sizeof(T)>
struct alignas(Width * sizeof(T)) Vector {
  static constexpr int size = Width;
  T at[size];
};

// Element i as fp32. A pair of bf16 is taken apart here, by a shift and a mask: left to itself, the compiler takes a whole
// vector apart at once, which costs registers.
template <class T, int Width>
__device__ inline float element(const Vector<T, Width>& vector, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && Width % 2 == 0) {
    unsigned pairs[Width / 2];
    memcpy(pairs, vector.at, sizeof pairs);
    return __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
  } else {
    return to_float(vector.at[i]);
  }
}

template <class T>
__device__ inline Vector<T> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <int Width, class T>
__device__ inline Vector<T, Width> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, Width>*>(address);
}

template <class T, int Width>
__device__ inline void store_vector(T* address, const Vector<T, Width>& value) {
  *reinterpret_cast<Vector<T, Width>*>(address) = value;
}

// Whether rows of C elements of T that start at `address` and at multiples of the strides can be moved 16 bytes at a time.
template <class T, class... Strides>
__host__ inline bool vectorizable(const void* address, int64_t C, Strides... strides) {
  const bool aligned = reinterpret_cast<uintptr_t>(address) % 16 == 0;
  return aligned && C % Vector<T>::size == 0 && ((strides % Vector<T>::size == 0) && ...);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ inline int warp_sum(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
#else
  return __reduce_add_sync(kFullWarp, x);  // one instruction
#endif
}

__device__ inline int warp_max(int x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// The block's dynamic shared memory, 16-byte aligned.
#ifndef SIGNAL_REID_SIMT_EMULATOR
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ uint4 signal_reid_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(signal_reid_dynamic_shared);
}
#endif

}  // namespace signal_reid
