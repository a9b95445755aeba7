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

// Of each warp of a block: the sum of a row, and up to three that are taken together.
struct Sums {
  float of_row[kMostWarps], together[kMostWarps][3];
};

// The sum over a block, alike in all its threads. Between two uses of the same numbers the block meets elsewhere.
__device__ float block_sum(float x, float (&of_warps)[kMostWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) sum += of_warps[warp];
  return sum;
}

// The same of several numbers, for which the block meets once.
template <int Count>
__device__ void block_sums(float (&x)[Count], Sums& sums) {
  float* of_warp = sums.together[threadIdx.x / kWarpSize];
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const float sum = warp_sum(x[i]);
    if (threadIdx.x % kWarpSize == 0) of_warp[i] = sum;
    x[i] = 0.0f;
  }
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
#pragma unroll
    for (int i = 0; i < Count; ++i) x[i] += sums.together[warp][i];
  }
}

// Subtracts the row's mean; channels behind the row become zero.
__device__ void centre(Channels& row, int count, int C, Sums& sums) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwned; ++i) sum += row[i];
  const float mean = block_sum(sum, sums.of_row) / static_cast<float>(C);
#pragma unroll
  for (int i = 0; i < kOwned; ++i) row[i] = i < count ? row[i] - mean : 0.0f;
}

__device__ inline float inverse_deviation(float squares, int C, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(C) + eps);
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
  centre(row, count, C, sums);
  float squares[1] = {};
#pragma unroll
  for (int i = 0; i < kOwned; ++i) squares[0] += row[i] * row[i];
  block_sums(squares, sums);
  const float inverse = inverse_deviation(squares[0], C, p.eps);
  if (count > 0) {
    load<Width>(p.weight, p.weight_dtype, first, count, weight);
    load<Width>(p.bias, p.weight_dtype, first, count, bias);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) row[i] = row[i] * inverse * weight[i] + bias[i];
    store<Width>(p.normed, p.normed_dtype, at, count, row);
  }
}

// 8 channels as they lie in memory: 16 bytes in 16-bit precision, twice that in fp32. What is loaded so is not looked at, so
// that the loads of several tensors are under way together.
struct Packed {
  Vector<float> first, second;
};

__device__ inline Packed load_packed(const void* from, DType dtype, int64_t at) {
  const bool wide = dtype == DType::float32;
  const auto* address = reinterpret_cast<const float*>(static_cast<const char*>(from) + at * (wide ? 4 : 2));
  Packed packed;
  packed.first = load_vector<Vector<float>::size>(address);
  if (wide) packed.second = load_vector<Vector<float>::size>(address + Vector<float>::size);
  return packed;
}

__device__ inline void unpack(const Packed& packed, DType dtype, Channels& to) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Vector<T> parts[kOwned / Vector<T>::size];
    memcpy(parts, &packed, sizeof(parts));
#pragma unroll
    for (int i = 0; i < kOwned; ++i) to[i] = to_float(parts[i / Vector<T>::size].at[i % Vector<T>::size]);
  });
}

// What a row's gradient is computed from: the sum, the gradient of its normalisation, and the sum's own or zeros.
template <int Width>
__device__ void load_row(const AddLayerNormBackward& p, int64_t at, int count, Channels& row, Channels& grad, Channels& own) {
  if constexpr (Width > 1) {
    const Packed of_row = load_packed(p.total, p.total_dtype, at), of_grad = load_packed(p.grad_normed, p.normed_dtype, at);
    if (p.grad_total != nullptr) unpack(load_packed(p.grad_total, p.total_dtype, at), p.total_dtype, own);
    unpack(of_row, p.total_dtype, row);
    unpack(of_grad, p.normed_dtype, grad);
  } else {
    load<Width>(p.total, p.total_dtype, at, count, row);
    load<Width>(p.grad_normed, p.normed_dtype, at, count, grad);
    if (p.grad_total != nullptr) load<Width>(p.grad_total, p.total_dtype, at, count, own);
  }
}

// One block: one row at a time, as many apart as there are blocks. The sum and both gradients are read once, the gradient
// of the sum is written once or twice. Mean and deviation are computed again, which costs no bytes; the block meets twice
// for a row. The block's share of the gradients of weight and bias stays in registers and is written at the end.
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
    if (count > 0) load_row<Width>(p, at, count, row, grad, along_stream);
    centre(row, count, C, sums);
    float squares = 0.0f, sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      squares += row[i] * row[i];
      sum += grad[i] * weight[i];
      product += grad[i] * weight[i] * row[i];
    }
    float all[] = {squares, sum, product};
    block_sums(all, sums);
    const float inverse = inverse_deviation(all[0], C, p.eps), mean = all[1] / static_cast<float>(C);
    const float along_row = all[2] * inverse / static_cast<float>(C);
    if (count <= 0) continue;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      row[i] *= inverse;
      grad_weight[i] += grad[i] * row[i];
      grad_bias[i] += grad[i];
      along_stream[i] += (grad[i] * weight[i] - mean - row[i] * along_row) * inverse;
    }
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
