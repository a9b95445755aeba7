// QuickGELU and its gradient; the maths is in signal_reid/ops/reference.
//
// One thread: 16 bytes of neighbouring elements, or a single one where the tensors are not aligned. Every element is read
// once and written once; arithmetic is in fp32.
#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kThreads = 256;

// sigmoid(x). The fast functions keep 5 digits and more, and the kernels bound by memory: 0 and 1 far out, NaN stays.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ inline float value(float x) { return x * sigmoid(1.702f * x); }

__device__ inline float slope(float x) {
  const float scaled = 1.702f * x, gate = sigmoid(scaled);
  return gate * (1.0f + scaled * (1.0f - gate));
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads) quick_gelu_kernel(const T* x, T* y, int64_t size) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * Width;
  if (first + Width <= size) {
    auto piece = load_vector<Width>(x + first);
#pragma unroll
    for (int i = 0; i < Width; ++i) piece.at[i] = from_float<T>(value(to_float(piece.at[i])));
    store_vector(y + first, piece);
  } else {
    for (int64_t i = first; i < size; ++i) y[i] = from_float<T>(value(to_float(x[i])));
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads)
    quick_gelu_backward_kernel(const T* grad, const T* x, T* grad_x, int64_t size) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * Width;
  if (first + Width <= size) {
    const auto flow = load_vector<Width>(grad + first);
    auto piece = load_vector<Width>(x + first);
#pragma unroll
    for (int i = 0; i < Width; ++i) piece.at[i] = from_float<T>(to_float(flow.at[i]) * slope(to_float(piece.at[i])));
    store_vector(grad_x + first, piece);
  } else {
    for (int64_t i = first; i < size; ++i) grad_x[i] = from_float<T>(to_float(grad[i]) * slope(to_float(x[i])));
  }
}

dim3 blocks_of(int64_t size, int width) { return grid_of(ceil_div(size, int64_t{kThreads} * width)); }

struct Forward {
  const QuickGELU& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const auto* x = static_cast<const T*>(p.x);
    auto* y = static_cast<T*>(p.y);
    constexpr int width = Vector<T>::size;
    const bool wide = vectorizable<T>(x, 0) && vectorizable<T>(y, 0);
    const auto kernel = wide ? quick_gelu_kernel<T, width> : quick_gelu_kernel<T, 1>;
    return launch(kernel, blocks_of(p.size, wide ? width : 1), dim3(kThreads), 0, stream, x, y, p.size);
  }
};

struct Backward {
  const QuickGELUBackward& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const auto *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
    auto* grad_x = static_cast<T*>(p.grad_x);
    const bool wide = vectorizable<T>(grad, 0) && vectorizable<T>(x, 0) && vectorizable<T>(grad_x, 0);
    constexpr int width = Vector<T>::size;
    const auto kernel = wide ? quick_gelu_backward_kernel<T, width> : quick_gelu_backward_kernel<T, 1>;
    return launch(kernel, blocks_of(p.size, wide ? width : 1), dim3(kThreads), 0, stream, grad, x, grad_x, p.size);
  }
};

constexpr int64_t kLargest = int64_t{1} << 38;  // within what a grid may have, and more than any memory holds

}  // namespace

cudaError_t quick_gelu(const QuickGELU& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  if (p.size < 0 || p.size > kLargest) return cudaErrorInvalidValue;
  return dispatch_dtype(p.dtype, Forward{p, stream});
}

cudaError_t quick_gelu_backward(const QuickGELUBackward& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  if (p.size < 0 || p.size > kLargest) return cudaErrorInvalidValue;
  return dispatch_dtype(p.dtype, Backward{p, stream});
}

}  // namespace signal_reid
