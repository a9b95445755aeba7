// The CUDA runtime and device functions that the kernels use, for g++ and the host emulator.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdio>
#include <tuple>

#include "simt_emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Thread-local storage of the one host thread: the emulator knows where it lies and fills it with garbage before each block.
#define __shared__ static thread_local

// ---- types

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SIMT_VECTORS(scalar, name, align2, align4)                       \
  struct alignas(align2) name##2 { scalar x, y; };                       \
  struct name##3 { scalar x, y, z; };                                    \
  struct alignas(align4) name##4 { scalar x, y, z, w; };                 \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }   \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
#undef SIMT_VECTORS

extern simt::Index threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ---- runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
};

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure: return simt::last_message();
  }
  return "unrecognized error code";
}

struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
constexpr int kEmulatedSharedLimit = 99 * 1024;  // sm_86
#ifndef __CUDA_ARCH_LIST__
#define __CUDA_ARCH_LIST__ 860  // of nvcc
#endif

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return static_cast<cudaError_t>(simt::allow_dynamic_shared(kernel, value));
}
#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = simt::current_device(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return static_cast<cudaError_t>(simt::set_device(device)); }
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return static_cast<cudaError_t>(simt::trouble_of_device());
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return *value = 82, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = 8, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = 6, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = kEmulatedSharedLimit, cudaSuccess;
  }
  return static_cast<cudaError_t>(1);
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t = nullptr) {
  return std::memset(address, value, bytes), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const dim3 grid = config->gridDim, block = config->blockDim;
  return static_cast<cudaError_t>(simt::run({{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes,
                                             reinterpret_cast<const void*>(kernel),
                                             [&] { std::apply(kernel, parameters); }}));
}

namespace signal_reid {
inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }
}  // namespace signal_reid

// ---- barriers and warp collectives

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  simt::block_barrier(simt::Vote::none, false, where);
}
inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return simt::block_barrier(simt::Vote::count, predicate != 0, where);
}
inline int __syncthreads_and(int predicate, std::source_location where = std::source_location::current()) {
  return simt::block_barrier(simt::Vote::all, predicate != 0, where);
}
inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return simt::block_barrier(simt::Vote::any, predicate != 0, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_collective(simt::Collective::syncwarp, mask, 0, 0, 32); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt::from_bits<T>(simt::warp_collective(simt::Collective::shfl_idx, mask, simt::to_bits(value), lane, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::from_bits<T>(
      simt::warp_collective(simt::Collective::shfl_up, mask, simt::to_bits(value), static_cast<int>(delta), width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::from_bits<T>(
      simt::warp_collective(simt::Collective::shfl_down, mask, simt::to_bits(value), static_cast<int>(delta), width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::from_bits<T>(simt::warp_collective(simt::Collective::shfl_xor, mask, simt::to_bits(value), lane_mask, width));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::warp_collective(simt::Collective::ballot, mask, predicate != 0, 0, 32));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::warp_collective(simt::Collective::any, mask, predicate != 0, 0, 32));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::warp_collective(simt::Collective::all, mask, predicate != 0, 0, 32));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(simt::warp_collective(simt::Collective::match_any, mask, simt::to_bits(value), 0, 32));
}

#define SIMT_REDUCE(name, type, kind)                                                                           \
  inline type name(unsigned mask, type value) {                                                                 \
    return simt::from_bits<type>(                                                                               \
        simt::warp_collective(simt::Collective::kind, mask, simt::to_bits(value), 0, 32));                      \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, reduce_add)
SIMT_REDUCE(__reduce_add_sync, int, reduce_add)
SIMT_REDUCE(__reduce_min_sync, unsigned, reduce_min_unsigned)
SIMT_REDUCE(__reduce_max_sync, unsigned, reduce_max_unsigned)
SIMT_REDUCE(__reduce_min_sync, int, reduce_min_signed)
SIMT_REDUCE(__reduce_max_sync, int, reduce_max_signed)
SIMT_REDUCE(__reduce_and_sync, unsigned, reduce_and)
SIMT_REDUCE(__reduce_or_sync, unsigned, reduce_or)
SIMT_REDUCE(__reduce_xor_sync, unsigned, reduce_xor)
#undef SIMT_REDUCE

// ---- memory

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> void __stcs(T* address, T value) { *address = value; }
template <class T> void __stcg(T* address, T value) { *address = value; }
template <class T> void __stwb(T* address, T value) { *address = value; }

// No fiber is preempted inside these, so plain reads and writes are atomic.
#define SIMT_ATOMIC(name, expression)                                                    \
  template <class T>                                                                     \
  __attribute__((no_sanitize("thread"))) T name(T* address, std::type_identity_t<T> value) { \
    simt::note_atomic(address, sizeof(T));                                               \
    const T old = *address;                                                              \
    *address = expression;                                                               \
    return old;                                                                          \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicAnd, old & value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, value)
#undef SIMT_ATOMIC
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  simt::note_atomic(address, sizeof(T));
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// ---- arithmetic

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= ((x >> bit) & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

#define SIMT_MIN_MAX(type)                                      \
  inline type min(type a, type b) { return b < a ? b : a; }     \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline void __trap() { simt::fail_in_kernel("__trap"); }
