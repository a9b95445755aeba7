// Mean over all pairs of maps of their mean squared difference, and its gradient; the maths is in signal_reid/ops/reference.
//
// Maps are compared by their differences from the first, d: for maps that are alike, squares of the maps themselves would
// cancel. The sum over pairs is then M sum d^2 - (sum d)^2, in one pass for any number of maps M. Arithmetic is in fp32. No
// atomics: every result has one writer and a fixed order of additions.
#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kThreads = 256;

// `Width` numbers of a map, in fp32.
template <class T, int Width>
__device__ void load(const void* maps, int64_t at, float (&numbers)[Width]) {
  const auto vector = load_vector<Width>(static_cast<const T*>(maps) + at);
#pragma unroll
  for (int i = 0; i < Width; ++i) numbers[i] = to_float(vector.at[i]);
}

// One thread: 16 bytes of every map at a time, as many apart as the grid takes at once. Every map is read once, a share of
// the loss is written per block.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads) pairwise_error_kernel(PairwiseError p) {
  __shared__ float of_warps[kThreads / kWarpSize];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * Width;
  const float maps = static_cast<float>(p.M);
  float share = 0.0f;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * Width; at < p.size; at += step) {
    float first[Width], other[Width], sum[Width] = {}, squares[Width] = {};
    load<T, Width>(p.maps, at, first);
#pragma unroll 1
    for (int64_t m = 1; m < p.M; ++m) {
      load<T, Width>(p.maps, m * p.size + at, other);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const float difference = other[i] - first[i];
        sum[i] += difference;
        squares[i] += difference * difference;
      }
    }
#pragma unroll
    for (int i = 0; i < Width; ++i) share += maps * squares[i] - sum[i] * sum[i];
  }
  share = warp_sum(share);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = share;
  __syncthreads();
  if (threadIdx.x != 0) return;
  share = 0.0f;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) share += of_warps[warp];
  p.shares[blockIdx.x] = share * p.scale;
}

// One thread: 16 bytes of every map. Maps are read twice, the second time from the cache; each gradient is written once.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads) pairwise_error_backward_kernel(PairwiseErrorBackward p) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * Width;
  if (at >= p.size) return;
  const float scale = 2.0f * p.scale * *p.grad, maps = static_cast<float>(p.M);
  float first[Width], other[Width], sum[Width] = {};
  load<T, Width>(p.maps, at, first);
#pragma unroll 1
  for (int64_t m = 1; m < p.M; ++m) {
    load<T, Width>(p.maps, m * p.size + at, other);
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[i] += other[i] - first[i];
  }
#pragma unroll 1
  for (int64_t m = 0; m < p.M; ++m) {
    load<T, Width>(p.maps, m * p.size + at, other);
    Vector<T, Width> gradient;
#pragma unroll
    for (int i = 0; i < Width; ++i) gradient.at[i] = from_float<T>(scale * (maps * (other[i] - first[i]) - sum[i]));
    store_vector(static_cast<T*>(p.grad_maps) + m * p.size + at, gradient);
  }
}

struct Forward {
  const PairwiseError& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const auto kernel = vectorizable<T>(p.maps, p.size) ? pairwise_error_kernel<T, Vector<T>::size>
                                                        : pairwise_error_kernel<T, 1>;
    return launch(kernel, grid_of(p.blocks), kThreads, 0, stream, p);
  }
};

struct Backward {
  const PairwiseErrorBackward& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const bool wide = vectorizable<T>(p.maps, p.size) && vectorizable<T>(p.grad_maps, p.size);
    constexpr int width = Vector<T>::size;
    const auto kernel = wide ? pairwise_error_backward_kernel<T, width> : pairwise_error_backward_kernel<T, 1>;
    const int64_t blocks = ceil_div(p.size, int64_t{kThreads} * (wide ? width : 1));
    return launch(kernel, grid_of(blocks), kThreads, 0, stream, p);
  }
};

constexpr int64_t kLargest = int64_t{1} << 38;  // within what a grid may have, and more than any memory holds

template <class P>
bool fits(const P& p) {
  return p.M >= 2 && p.size <= kLargest / p.M;
}

}  // namespace

cudaError_t pairwise_error(const PairwiseError& p, cudaStream_t stream) {
  if (p.size * p.blocks == 0) return cudaSuccess;
  return fits(p) ? dispatch_dtype(p.dtype, Forward{p, stream}) : cudaErrorInvalidValue;
}

cudaError_t pairwise_error_backward(const PairwiseErrorBackward& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  return fits(p) ? dispatch_dtype(p.dtype, Backward{p, stream}) : cudaErrorInvalidValue;
}

}  // namespace signal_reid
