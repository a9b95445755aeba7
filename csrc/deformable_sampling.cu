// Shift-aware deformable bilinear sampling and its gradients; the maths is in signal_reid/ops/reference.
//
// tanh, range, reference points, clamp and bilinear weights are computed in fp32 where they are used, never written.
// Sums are kept in fp32 and rounded once. No atomics: every result has one writer and a fixed order of additions.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBackwardBlocks = 4;  // on a multiprocessor: where nothing is asked, ptxas spills for a fifth or sixth on sm_120
constexpr int kTokens = 32;   // tokens per block of the tokens' gradient
constexpr int kPoints = 256;  // sample points held in shared memory at a time

// Where a sample point reads along one axis.
struct Axis {
  int low;
  float fraction;
  float slope;  // d pixel / d shift; 0 where the position is clamped
};

struct Point {
  Axis y, x;
  float slope;  // d shift / d offset
};

// A NaN shift keeps its NaN in the fraction and reads index 0.
__device__ Axis locate(int index, int count, int size, float shift) {
  const float windows = static_cast<float>(count - 1);
  const float extent = static_cast<float>(size - 1);
  const float position = 2.0f * (static_cast<float>(index) + 0.5f) / windows - 1.0f + shift / windows;
  const float clamped = position < -1.0f ? -1.0f : (position > 1.0f ? 1.0f : position);
  const float pixel = (clamped + 1.0f) / 2.0f * extent;
  const float low = floorf(pixel);
  const bool inside = position >= -1.0f && position <= 1.0f;
  return {low >= 0.0f ? static_cast<int>(fminf(low, extent)) : 0, pixel - low,
          inside ? 0.5f * extent / windows : 0.0f};
}

// Point s of map b. Sizes of one map fit in 32 bits, the launchers see to it.
template <class T, class Parameters>
__device__ Point locate(const Parameters& p, int64_t b, int s) {
  const int Hk = static_cast<int>(p.Hk), Wk = static_cast<int>(p.Wk);
  const float bent = tanhf(to_float(static_cast<const T*>(p.offsets)[b * Hk * Wk + s]));
  const float shift = bent * p.offset_range;
  return {locate(s / Wk, Hk, static_cast<int>(p.H), shift), locate(s % Wk, Wk, static_cast<int>(p.W), shift),
          (1.0f - bent * bent) * p.offset_range};
}

// The rows of the four tokens around a point; beyond the last index the last one is read again.
template <class T>
struct Corners {
  const T* at[2][2];
};

template <class T, class Parameters>
__device__ Corners<T> corners(const Parameters& p, int64_t b, const Point& point) {
  const T* map = static_cast<const T*>(p.tokens) + b * p.tokens_stride_b;
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  Corners<T> result;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int y = point.y.low + (v != 0 && point.y.low + 1 < H);
      const int x = point.x.low + (u != 0 && point.x.low + 1 < W);
      result.at[v][u] = map + (y * W + x) * p.tokens_stride_n;
    }
  }
  return result;
}

// One block: 8 sample points. One warp: one point; its lanes share the channels, 16 bytes each at a time.
// Each point's offset is read once, its four tokens once, its sample written once.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads) sample_kernel(DeformableSampling p) {
  const int points = static_cast<int>(p.Hk * p.Wk), C = static_cast<int>(p.C);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (index >= p.B * points) return;
  const Point point = locate<T>(p, index / points, static_cast<int>(index % points));
  const Corners<T> from = corners<T>(p, index / points, point);
  const float bottom = point.y.fraction, right = point.x.fraction;
  const float top = 1.0f - bottom, left = 1.0f - right;
  // Restricted, so that the next tokens are loaded before these samples are stored.
  T* __restrict__ sampled = static_cast<T*>(p.sampled) + index * C;

#pragma unroll 2
  for (int c = threadIdx.x % kWarpSize * Width; c < C; c += kWarpSize * Width) {
    const auto top_left = load_vector<Width>(from.at[0][0] + c);
    const auto top_right = load_vector<Width>(from.at[0][1] + c);
    const auto bottom_left = load_vector<Width>(from.at[1][0] + c);
    const auto bottom_right = load_vector<Width>(from.at[1][1] + c);
    Vector<T, Width> result;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      result.at[i] = from_float<T>(to_float(top_left.at[i]) * (top * left) + to_float(top_right.at[i]) * (top * right) +
                                   to_float(bottom_left.at[i]) * (bottom * left) +
                                   to_float(bottom_right.at[i]) * (bottom * right));
    }
    store_vector(sampled + c, result);
  }
}

// One block: 8 sample points. One warp: one point, grad . (difference of its corners) over the channels.
// Reads the gradient once and four tokens per point, writes one number per point.
template <class T, int Width>
__device__ void offsets_gradient(const DeformableSamplingBackward& p, int64_t block) {
  const int points = static_cast<int>(p.Hk * p.Wk), C = static_cast<int>(p.C);
  const int64_t index = block * kWarps + threadIdx.x / kWarpSize;
  if (index >= p.B * points) return;
  const Point point = locate<T>(p, index / points, static_cast<int>(index % points));
  const Corners<T> from = corners<T>(p, index / points, point);
  const T* grad = static_cast<const T*>(p.grad) + index * C;
  const float bottom = point.y.fraction, right = point.x.fraction;

  const int lane = threadIdx.x % kWarpSize;
  float along_y = 0.0f, along_x = 0.0f;
#pragma unroll 1
  for (int c = lane * Width; c < C; c += kWarpSize * Width) {
    const auto flow = load_vector<Width>(grad + c);
    const auto top_left = load_vector<Width>(from.at[0][0] + c);
    const auto top_right = load_vector<Width>(from.at[0][1] + c);
    const auto bottom_left = load_vector<Width>(from.at[1][0] + c);
    const auto bottom_right = load_vector<Width>(from.at[1][1] + c);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const float g = to_float(flow.at[i]);
      const float v00 = to_float(top_left.at[i]), v01 = to_float(top_right.at[i]);
      const float v10 = to_float(bottom_left.at[i]), v11 = to_float(bottom_right.at[i]);
      along_y += g * ((1.0f - right) * (v10 - v00) + right * (v11 - v01));
      along_x += g * ((1.0f - bottom) * (v01 - v00) + bottom * (v11 - v10));
    }
  }
  along_y = warp_sum(along_y);
  along_x = warp_sum(along_x);
  if (lane == 0) {
    const float moved = along_y * point.y.slope + along_x * point.x.slope;
    static_cast<T*>(p.grad_offsets)[index] = from_float<T>(moved * point.slope);
  }
}

// How much of a point's low and high corner along one axis lies on token `at`; touched says whether either does.
__device__ float share(const Axis& axis, int at, int size, bool& touched) {
  const int high = axis.low + (axis.low + 1 < size);
  touched = touched && (at == axis.low || at == high);
  return (at == axis.low ? 1.0f - axis.fraction : 0.0f) + (at == high ? axis.fraction : 0.0f);
}

// One block: 32 tokens of one map; the map's sample points are located once per block, in shared memory.
// One warp: one token at a time. Each lane tests one of 32 points; the few that touch the token are summed by the whole
// warp over the channels. Reads the gradient of a point once per token it touches, writes every token once, zeros too.
template <class T, int Width>
__device__ void tokens_gradient(const DeformableSamplingBackward& p, int64_t block) {
  constexpr int kVectors = Width == 1 ? 4 : 16 / Width;  // per lane in flight: 512 channels a pass
  __shared__ Point points[kPoints];
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W), C = static_cast<int>(p.C);
  const int N = H * W, S = static_cast<int>(p.Hk * p.Wk);
  const int blocks_per_map = static_cast<int>(ceil_div(N, kTokens));
  const int64_t b = block / blocks_per_map;
  const int first = static_cast<int>(block % blocks_per_map) * kTokens;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const T* grad = static_cast<const T*>(p.grad) + b * S * C;
  T* grad_tokens = static_cast<T*>(p.grad_tokens) + b * N * C;

  int loaded = -1;
  for (int n = first + warp; n < first + kTokens; n += kWarps) {
    for (int pass = 0; pass < C; pass += kVectors * kWarpSize * Width) {
      float sum[kVectors][Width] = {};
      for (int chunk = 0; chunk < S; chunk += kPoints) {
        if (chunk != loaded) {
          __syncthreads();
          const int s = chunk + static_cast<int>(threadIdx.x);
          if (s < S) points[threadIdx.x] = locate<T>(p, b, s);
          __syncthreads();
          loaded = chunk;
        }
        for (int s = chunk; s < S && s < chunk + kPoints; s += kWarpSize) {
          bool touched = n < N && s + lane < S;
          float weight = 0.0f;
          if (touched) {
            const Point& point = points[s - chunk + lane];
            weight = share(point.y, n / W, H, touched) * share(point.x, n % W, W, touched);
          }
          for (unsigned left = __ballot_sync(kFullWarp, touched); left != 0; left &= left - 1) {
            const int source = __ffs(left) - 1;
            const float w = __shfl_sync(kFullWarp, weight, source);
            const T* row = grad + static_cast<int64_t>(s + source) * C;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              const int c = pass + (v * kWarpSize + lane) * Width;
              if (c >= C) continue;
              const auto flow = load_vector<Width>(row + c);
#pragma unroll
              for (int i = 0; i < Width; ++i) sum[v][i] += w * to_float(flow.at[i]);
            }
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = pass + (v * kWarpSize + lane) * Width;
        if (n >= N || c >= C) continue;
        Vector<T, Width> result;
#pragma unroll
        for (int i = 0; i < Width; ++i) result.at[i] = from_float<T>(sum[v][i]);
        store_vector(grad_tokens + static_cast<int64_t>(n) * C + c, result);
      }
    }
  }
}

// The first blocks take the offsets' gradient, the others the tokens'.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    sample_backward_kernel(DeformableSamplingBackward p, int64_t offset_blocks) {
  const int64_t block = blockIdx.x;
  if (block < offset_blocks) {
    offsets_gradient<T, Width>(p, block);
  } else {
    tokens_gradient<T, Width>(p, block - offset_blocks);
  }
}

// Tokens, points and channels of a map are counted in 32 bits, with room for what the last block goes beyond them.
constexpr int64_t kMostOfAMap = (int64_t{1} << 31) - 4096;

template <class Parameters>
bool fits(const Parameters& p, int64_t blocks) {
  return std::max({p.H * p.W, p.Hk * p.Wk, p.C}) <= kMostOfAMap && blocks <= kMostBlocks;
}

template <class Parameters>
int64_t point_blocks(const Parameters& p) {
  return ceil_div(p.B * p.Hk * p.Wk, kWarps);
}

struct Sample {
  const DeformableSampling& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const bool wide =
        vectorizable<T>(p.tokens, p.C, p.tokens_stride_b, p.tokens_stride_n) && vectorizable<T>(p.sampled, p.C);
    const auto kernel = wide ? sample_kernel<T, Vector<T>::size> : sample_kernel<T, 1>;
    return launch(kernel, grid_of(point_blocks(p)), kThreads, 0, stream, p);
  }
};

struct SampleBackward {
  const DeformableSamplingBackward& p;
  int64_t offset_blocks, token_blocks;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const bool wide = vectorizable<T>(p.tokens, p.C, p.tokens_stride_b, p.tokens_stride_n) &&
                      vectorizable<T>(p.grad, p.C) && vectorizable<T>(p.grad_tokens, p.C);
    const auto kernel = wide ? sample_backward_kernel<T, Vector<T>::size> : sample_backward_kernel<T, 1>;
    return launch(kernel, grid_of(offset_blocks + token_blocks), kThreads, 0, stream, p, offset_blocks);
  }
};

}  // namespace

cudaError_t deformable_sample(const DeformableSampling& p, cudaStream_t stream) {
  if (p.B * p.Hk * p.Wk * p.C == 0) return cudaSuccess;
  return fits(p, point_blocks(p)) ? dispatch_dtype(p.dtype, Sample{p, stream}) : cudaErrorInvalidValue;
}

cudaError_t deformable_sample_backward(const DeformableSamplingBackward& p, cudaStream_t stream) {
  const int64_t offset_blocks = point_blocks(p);
  const int64_t token_blocks = p.C == 0 ? 0 : p.B * ceil_div(p.H * p.W, kTokens);
  if (offset_blocks + token_blocks == 0) return cudaSuccess;
  if (!fits(p, offset_blocks + token_blocks)) return cudaErrorInvalidValue;
  return dispatch_dtype(p.dtype, SampleBackward{p, offset_blocks, token_blocks, stream});
}

}  // namespace signal_reid
