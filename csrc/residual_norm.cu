// Residual addition and layer normalisation, and their gradients; the maths is in signal_reid/ops/reference.
//
// Every tensor has a dtype of its own, looked up where it is read or written: all threads agree on it, and the kernels wait
// for memory. Arithmetic is in fp32. A thread owns 8 neighbouring channels, a block as many threads as a row needs. No
// atomics: every result has one writer and a fixed order of additions.
#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kOwned = 8;  // 16 bytes in 16-bit precision, twice that in fp32
constexpr int kMostThreads = 640;  // more would leave too few registers
constexpr int kMostWarps = kMostThreads / kWarpSize;

using Channels = float[kOwned];

template <class Body>
__device__ void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float());
    case DType::float16:
      return body(__half());
    case DType::bfloat16:
      return body(__nv_bfloat16());
  }
}

// `count` channels from element `at` on, zero behind them; Width 4: all 8 and 16 bytes at a time, 1: one at a time.
template <int Width>
__device__ void load(const void* from, DType dtype, int64_t at, int count, Channels& to) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* address = static_cast<const T*>(from) + at;
    if constexpr (Width > 1) {
#pragma unroll
      for (int i = 0; i < kOwned; i += Vector<T>::size) {
        const auto part = load_vector(address + i);
#pragma unroll
        for (int j = 0; j < Vector<T>::size; ++j) to[i + j] = to_float(part.at[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kOwned; ++i) to[i] = i < count ? to_float(address[i]) : 0.0f;
    }
  });
}

// The reverse; the channels are left as they were rounded.
template <int Width>
__device__ void store(void* to, DType dtype, int64_t at, int count, Channels& from) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* address = static_cast<T*>(to) + at;
    T rounded[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      rounded[i] = from_float<T>(from[i]);
      from[i] = to_float(rounded[i]);
    }
    if constexpr (Width > 1) {
#pragma unroll
      for (int i = 0; i < kOwned; i += Vector<T>::size) {
        Vector<T> part;
#pragma unroll
        for (int j = 0; j < Vector<T>::size; ++j) part.at[j] = rounded[i + j];
        store_vector(address + i, part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        if (i < count) address[i] = rounded[i];
      }
    }
  });
}

// The sum over a block, alike in all its threads. Between two uses of the same numbers the block meets elsewhere.
__device__ float block_sum(float x, float (&of_warps)[kMostWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) sum += of_warps[warp];
  return sum;
}

struct Sums {
  float first[kMostWarps], second[kMostWarps], third[kMostWarps], fourth[kMostWarps];
};

// Subtracts the row's mean and divides by its deviation, whose inverse it returns; channels behind the row stay zero.
__device__ float normalise(Channels& row, int count, int C, float eps, Sums& sums) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwned; ++i) sum += row[i];
  const float mean = block_sum(sum, sums.first) / static_cast<float>(C);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    row[i] = i < count ? row[i] - mean : 0.0f;
    squares += row[i] * row[i];
  }
  const float inverse = 1.0f / sqrtf(block_sum(squares, sums.second) / static_cast<float>(C) + eps);
#pragma unroll
  for (int i = 0; i < kOwned; ++i) row[i] *= inverse;
  return inverse;
}

// One block: one row, of which every input is read once and both results are written once.
template <int Width>
__global__ void __launch_bounds__(kMostThreads) add_layer_norm_kernel(AddLayerNorm p) {
  __shared__ Sums sums;
  const int C = static_cast<int>(p.C), first = static_cast<int>(threadIdx.x) * kOwned;
  const int count = C - first;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * C + first;
  Channels row = {}, weight, bias;
  if (count > 0) {
    load<Width>(p.x, p.x_dtype, at, count, row);
    if (p.branch != nullptr) {
      Channels branch;
      load<Width>(p.branch, p.branch_dtype, at, count, branch);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) row[i] += branch[i];
      store<Width>(p.total, p.total_dtype, at, count, row);  // rounds to what the backward will read
    }
  }
  normalise(row, count, C, p.eps, sums);
  if (count > 0) {
    load<Width>(p.weight, p.weight_dtype, first, count, weight);
    load<Width>(p.bias, p.weight_dtype, first, count, bias);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) row[i] = row[i] * weight[i] + bias[i];
    store<Width>(p.normed, p.normed_dtype, at, count, row);
  }
}

// One block: one row at a time, as many apart as there are blocks. The sum and both gradients are read once, the gradient
// of the sum is written once or twice. Mean and deviation are computed again, which costs no bytes. The block's share of
// the gradients of weight and bias stays in registers and is written at the end.
template <int Width>
__global__ void __launch_bounds__(kMostThreads) add_layer_norm_backward_kernel(AddLayerNormBackward p) {
  __shared__ Sums sums;
  const int C = static_cast<int>(p.C), first = static_cast<int>(threadIdx.x) * kOwned;
  const int count = C - first;
  Channels weight = {}, grad_weight = {}, grad_bias = {};
  if (count > 0) load<Width>(p.weight, p.weight_dtype, first, count, weight);
  for (int64_t index = blockIdx.x; index < p.rows; index += gridDim.x) {
    const int64_t at = index * C + first;
    Channels row = {}, grad = {}, along_stream = {};
    if (count > 0) {
      load<Width>(p.total, p.total_dtype, at, count, row);
      load<Width>(p.grad_normed, p.normed_dtype, at, count, grad);
      if (p.grad_total != nullptr) load<Width>(p.grad_total, p.total_dtype, at, count, along_stream);
    }
    const float inverse = normalise(row, count, C, p.eps, sums);
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      grad_weight[i] += grad[i] * row[i];
      grad_bias[i] += grad[i];
      grad[i] *= weight[i];
      sum += grad[i];
      product += grad[i] * row[i];
    }
    const float mean = block_sum(sum, sums.third) / static_cast<float>(C);
    const float along_row = block_sum(product, sums.fourth) / static_cast<float>(C);
    if (count <= 0) continue;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) along_stream[i] += (grad[i] - mean - row[i] * along_row) * inverse;
    if (p.grad_branch != nullptr) {
      Channels copy;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) copy[i] = along_stream[i];
      store<Width>(p.grad_branch, p.branch_dtype, at, count, copy);
    }
    store<Width>(p.grad_x, p.total_dtype, at, count, along_stream);
  }
  if (count <= 0) return;
  const int64_t share = static_cast<int64_t>(blockIdx.x) * C + first;
  store<Width>(p.shares, DType::float32, share, count, grad_weight);
  store<Width>(p.shares, DType::float32, share + static_cast<int64_t>(gridDim.x) * C, count, grad_bias);
}

// Whether every one of these rows of C elements can be moved 16 bytes at a time; an absent one can.
template <class... Addresses>
bool wide(int64_t C, Addresses... addresses) {
  return C % kOwned == 0 && ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

int threads(int64_t C) { return static_cast<int>(ceil_div(ceil_div(C, kOwned), kWarpSize)) * kWarpSize; }

bool fits(int64_t rows, int64_t C) { return C <= kMostThreads * kOwned && rows <= kMostBlocks; }

}  // namespace

cudaError_t add_layer_norm(const AddLayerNorm& p, cudaStream_t stream) {
  if (p.rows * p.C == 0) return cudaSuccess;
  if (!fits(p.rows, p.C)) return cudaErrorInvalidValue;
  const auto kernel = wide(p.C, p.x, p.branch, p.weight, p.bias, p.total, p.normed) ? add_layer_norm_kernel<4>
                                                                                   : add_layer_norm_kernel<1>;
  return launch(kernel, grid_of(p.rows), threads(p.C), 0, stream, p);
}

cudaError_t add_layer_norm_backward(const AddLayerNormBackward& p, cudaStream_t stream) {
  if (p.rows * p.C == 0) return cudaSuccess;
  if (!fits(p.rows, p.C)) return cudaErrorInvalidValue;
  const auto kernel =
      wide(p.C, p.grad_normed, p.grad_total, p.total, p.weight, p.grad_x, p.grad_branch, p.shares)
          ? add_layer_norm_backward_kernel<4>
          : add_layer_norm_backward_kernel<1>;
  return launch(kernel, grid_of(p.blocks), threads(p.C), 0, stream, p);
}

}  // namespace signal_reid
