// The offset head from its product on: GELU, depthwise 4 x 4 windows side by side, GELU, projection to one channel; and its
// gradients. The maths is in signal_reid/ops/reference.
//
// Activations are computed again in the backward instead of being stored: they cost no bytes. Arithmetic and sums are in
// fp32, parameters and their gradients are fp32. No atomics: every result has one writer and a fixed order of additions.
//
// A lane takes one or two channels, so that the 16 entries of each window's channels and their sums fit into registers and
// serve many windows. Its accesses are therefore narrow, of whole sectors still: 16 of them are in flight at a time, and the
// two GELUs, not the accesses, are what bounds the kernels.
#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kSide = 4, kTaps = kSide * kSide;
constexpr int kThreads = 256;          // of the forward
constexpr int kWindows = 4;            // per block of the forward, which share what is read of the parameters
constexpr int kBackwardThreads = 128;  // of the backward, a channel each
constexpr int kEntries = kTaps + 3;    // gradients per channel: of bias, window bias, projection, window

struct Gelu {
  float value, slope;
};

// x Phi(x) and its derivative. 1 - Phi by Abramowitz and Stegun, 7.1.26, to 1e-7: one exponential serves it and the
// density. Infinities and NaN give what PyTorch's GELU gives.
__device__ inline Gelu gelu(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = __fdividef(1.0f, 1.0f + 0.3275911f * z);
  const float bell = __expf(-z * z);
  const float series =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * series * bell;
  const float below = x < 0.0f ? tail : 1.0f - tail;
  return {x * below, below + x * (0.39894228f * bell)};
}

// A window of one map of one modality.
struct Place {
  int64_t b;
  int row, column;  // of the window
};

__device__ Place place_of(int64_t index, int rows, int columns) {
  const int cell = static_cast<int>(index % (rows * columns));
  return {index / (rows * columns), cell / columns, cell % columns};
}

// The 16 entries of one channel's window, which lie one behind another.
__device__ inline void load_entries(const float* from, bool aligned, float (&entries)[kTaps]) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kTaps; i += 4) {
      const auto part = load_vector<4>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) entries[i + j] = part.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) entries[i] = from[i];
  }
}

__device__ inline bool aligned_16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// One block: 4 windows of one modality, all channels. A thread: `Width` channels at a time, of all 4 windows. Hidden tokens
// are read once, the parameters once per block, one number per window is written.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2) offset_head_kernel(OffsetHead p, int64_t blocks_per_modality) {
  __shared__ float of_warps[kWindows][kThreads / kWarpSize];
  const int C = static_cast<int>(p.C), W = static_cast<int>(p.W);
  const int Hk = static_cast<int>(p.H) / kSide, Wk = W / kSide;
  const int64_t m = blockIdx.x / blocks_per_modality;
  const int64_t first = blockIdx.x % blocks_per_modality * kWindows;
  const int64_t windows = p.B * Hk * Wk;
  const T* modality = static_cast<const T*>(p.hidden) + m * p.stride_m;
  const bool aligned = aligned_16(p.window);

  float sums[kWindows] = {};
  for (int c = static_cast<int>(threadIdx.x) * Width; c < C; c += kThreads * Width) {
    float entries[Width][kTaps], bias[Width], window_bias[Width], out[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const int64_t channel = m * C + c + i;
      load_entries(p.window + channel * kTaps, aligned, entries[i]);
      bias[i] = p.bias[channel], window_bias[i] = p.window_bias[channel], out[i] = p.out[channel];
    }
    const int count = static_cast<int>(first + kWindows < windows ? kWindows : windows - first);
#pragma unroll 1  // the loads of one window's tokens are enough in flight, those of more would spill
    for (int g = 0; g < count; ++g) {
      const Place place = place_of(first + g, Hk, Wk);
      const T* corner = modality + place.b * p.stride_b + c +
                        (static_cast<int64_t>(place.row) * kSide * W + place.column * kSide) * p.stride_n;
      Vector<T, Width> tokens[kTaps];
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        tokens[tap] = load_vector<Width>(corner + (tap / kSide * W + tap % kSide) * p.stride_n);
      }
      float projected = 0.0f;
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        float sum = window_bias[i];
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          sum += entries[i][tap] * gelu(to_float(tokens[tap].at[i]) + bias[i]).value;
        }
        projected += gelu(sum).value * out[i];
      }
#pragma unroll
      for (int other = 0; other < kWindows; ++other) sums[other] += other == g ? projected : 0.0f;
    }
  }
#pragma unroll
  for (int g = 0; g < kWindows; ++g) {
    const float sum = warp_sum(sums[g]);
    if (threadIdx.x % kWarpSize == 0) of_warps[g][threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  const int g = static_cast<int>(threadIdx.x);
  if (g >= kWindows || first + g >= windows) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) sum += of_warps[g][warp];
  static_cast<T*>(p.offsets)[m * windows + first + g] = from_float<T>(sum);
}

// What one channel's thread gathers over the windows of its part.
struct Share {
  float bias = 0.0f, window_bias = 0.0f, out = 0.0f, entries[kTaps] = {};
};

// One window and channel: its share of the parameters' gradients, and the gradient of its 16 hidden tokens.
template <class T>
__device__ void differentiate(const T* corner, T* grad_corner, int W, int64_t stride_n, int64_t C, float grad,
                              const float (&entries)[kTaps], float bias, float window_bias, float out, Share& share) {
  float tokens[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) tokens[tap] = to_float(corner[(tap / kSide * W + tap % kSide) * stride_n]) + bias;
  float slopes[kTaps], sum = window_bias;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const Gelu active = gelu(tokens[tap]);
    tokens[tap] = active.value, slopes[tap] = active.slope;
    sum += entries[tap] * active.value;
  }
  const Gelu active = gelu(sum);
  const float of_sum = grad * out * active.slope;
  share.out += grad * active.value;
  share.window_bias += of_sum;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    share.entries[tap] += of_sum * tokens[tap];
    const float of_token = of_sum * entries[tap] * slopes[tap];
    share.bias += of_token;
    grad_corner[(tap / kSide * W + tap % kSide) * C] = from_float<T>(of_token);
  }
}

// One block: one part of one modality's cells, 128 channels; one thread: one channel. A cell is a window, or what is left of
// one at the right and at the bottom, whose tokens have no gradient. Hidden tokens are read once, their gradient is written
// once, the parameters are read once per part and the part's share of their gradients is written.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 3) offset_head_backward_kernel(OffsetHeadBackward p, int channel_blocks) {
  const int C = static_cast<int>(p.C), H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  const int Hk = H / kSide, Wk = W / kSide;
  const int rows = static_cast<int>(ceil_div(H, kSide)), columns = static_cast<int>(ceil_div(W, kSide));
  const int c = static_cast<int>(blockIdx.x % channel_blocks) * kBackwardThreads + static_cast<int>(threadIdx.x);
  const int64_t m = blockIdx.x / channel_blocks % p.M, part = blockIdx.x / channel_blocks / p.M;
  if (c >= C) return;
  const int64_t channel = m * C + c;
  float entries[kTaps];
  load_entries(p.window + channel * kTaps, aligned_16(p.window), entries);
  const float bias = p.bias[channel], window_bias = p.window_bias[channel], out = p.out[channel];

  Share share;
  const int64_t cells = p.B * rows * columns;
  const int64_t end = (part + 1) * cells / p.parts;
  for (int64_t index = part * cells / p.parts; index < end; ++index) {
    const Place place = place_of(index, rows, columns);
    const int64_t token = static_cast<int64_t>(place.row) * kSide * W + place.column * kSide;
    T* grad_corner = static_cast<T*>(p.grad_hidden) + ((m * p.B + place.b) * H * W + token) * C + c;
    if (place.row < Hk && place.column < Wk) {
      const T* corner =
          static_cast<const T*>(p.hidden) + m * p.stride_m + place.b * p.stride_b + token * p.stride_n + c;
      const int64_t window = ((m * p.B + place.b) * Hk + place.row) * Wk + place.column;
      differentiate(corner, grad_corner, W, p.stride_n, p.C, to_float(static_cast<const T*>(p.grad)[window]), entries, bias,
                    window_bias, out, share);
    } else {
      for (int tap = 0; tap < kTaps; ++tap) {
        const int y = tap / kSide, x = tap % kSide;
        if (place.row * kSide + y < H && place.column * kSide + x < W) {
          grad_corner[(static_cast<int64_t>(y) * W + x) * C] = from_float<T>(0.0f);
        }
      }
    }
  }
  float* shares = p.shares + (part * p.M + m) * kEntries * C + c;
  shares[0] = share.bias;
  shares[C] = share.window_bias;
  shares[2 * static_cast<int64_t>(C)] = share.out;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) shares[static_cast<int64_t>(3 + tap) * C] = share.entries[tap];
}

// One thread: one number of the parameters' gradients, the sum of all parts' shares, which are read once.
__global__ void __launch_bounds__(kThreads) offset_head_parameters_kernel(OffsetHeadBackward p) {
  const int64_t size = p.M * kEntries * p.C;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < p.parts; ++part) sum += p.shares[part * size + index];
  const int64_t c = index % p.C, m = index / p.C / kEntries, channel = m * p.C + c;
  const int entry = static_cast<int>(index / p.C % kEntries);
  if (entry == 0) {
    p.grad_bias[channel] = sum;
  } else if (entry == 1) {
    p.grad_window_bias[channel] = sum;
  } else if (entry == 2) {
    p.grad_out[channel] = sum;
  } else {
    p.grad_window[channel * kTaps + entry - 3] = sum;
  }
}

constexpr int64_t kMostOfAMap = int64_t{1} << 28;  // tokens and channels, which are counted in 32 bits

template <class P>
bool fits(const P& p, int64_t blocks) {
  return p.H * p.W <= kMostOfAMap && p.C <= kMostOfAMap && blocks <= kMostBlocks;
}

int64_t blocks_per_modality(const OffsetHead& p) { return ceil_div(p.B * (p.H / kSide) * (p.W / kSide), kWindows); }

struct Forward {
  const OffsetHead& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const auto even = [&](auto... numbers) { return ((numbers % 2 == 0) && ...); };
    const bool wide = even(p.C, p.stride_m, p.stride_b, p.stride_n) &&
                      reinterpret_cast<uintptr_t>(p.hidden) % (2 * sizeof(T)) == 0;
    const auto kernel = wide ? offset_head_kernel<T, 2> : offset_head_kernel<T, 1>;
    const int64_t blocks = blocks_per_modality(p);
    return launch(kernel, grid_of(p.M * blocks), kThreads, 0, stream, p, blocks);
  }
};

struct Backward {
  const OffsetHeadBackward& p;
  int channel_blocks;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    return launch(offset_head_backward_kernel<T>, grid_of(p.parts * p.M * channel_blocks), kBackwardThreads, 0, stream, p,
                  channel_blocks);
  }
};

}  // namespace

cudaError_t offset_head(const OffsetHead& p, cudaStream_t stream) {
  const int64_t blocks = p.M * blocks_per_modality(p);
  if (blocks == 0) return cudaSuccess;
  return fits(p, blocks) ? dispatch_dtype(p.dtype, Forward{p, stream}) : cudaErrorInvalidValue;
}

cudaError_t offset_head_backward(const OffsetHeadBackward& p, cudaStream_t stream) {
  if (p.M * p.C * p.parts == 0) return cudaSuccess;
  const int64_t channel_blocks = ceil_div(p.C, kBackwardThreads);
  if (!fits(p, p.parts * p.M * channel_blocks)) return cudaErrorInvalidValue;
  const cudaError_t status = dispatch_dtype(p.dtype, Backward{p, static_cast<int>(channel_blocks), stream});
  if (status != cudaSuccess) return status;
  return launch(offset_head_parameters_kernel, grid_of(ceil_div(p.M * kEntries * p.C, kThreads)), kThreads, 0, stream, p);
}

}  // namespace signal_reid
