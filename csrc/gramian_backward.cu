// Gradients of the pairwise gramian volume in fp32; signal_reid/ops/reference/gramian.py derives the maths.
//
// Two launches: the pairs, as in the forward, leave what belongs to a pair or a column in the workspace; the gradients,
// here, are what follows from it. No atomics: every result has one writer and a fixed order of additions.
#include <algorithm>

#include "gramian.cuh"

namespace signal_reid {
namespace {

constexpr int kThreads = 128;
constexpr int kStaged = 64;  // pairs along the summed dimension held in shared memory at a time

template <int K>
struct Gradients {
  const float* anchor;
  const float* others[K];
  Workspace workspace;
  float* grad_anchor;
  float* grad_others[K];
  int64_t P, Q, C, stride, grad_stride;
  int64_t channel_blocks, anchor_blocks;
  bool unit;
};

// Whether a vector was divided by its length, and not by the least that it is taken for.
__device__ __forceinline__ bool has_length(float scale) { return scale < 1.0f / kShortest; }

// grad a_i = (sum_j w_ij) a_i - sum_jl w_ij t_lij q_lj, w = area * quotient.
// Where a_i is a vector x_i at length 1, dL/dx is the part of grad a across a, over |x|: as a . dV/da = V, the first sum
// loses sum_j g_ij V_ij, which leaves sum_jl w_ij t_lij^2 of it.
// One block: a few anchor rows times up to 128 packs of channels. One thread: those rows of one pack, over all columns.
// The basis is read once per block, the pair coefficients once per channel block, the gradient written once.
template <int Rows, int Width, int K>
__device__ void anchor_gradient(const Gradients<K>& p, int64_t block) {
  constexpr int kCoefficients = (K + 1) * Rows;
  float* staged = reinterpret_cast<float*>(dynamic_shared());  // [column][weight, projections][row]
  const int64_t first_row = block / p.channel_blocks * Rows;
  const int64_t c = (block % p.channel_blocks * blockDim.x + threadIdx.x) * Width;
  const bool real = c < p.C;

  float weight[Rows] = {}, sum[Rows][Width] = {};
  for (int64_t from = 0; from < p.Q; from += kStaged) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kStaged), p.Q - from));
    __syncthreads();
    for (int e = threadIdx.x; e < kStaged * Rows; e += blockDim.x) {
      const int r = e / kStaged, n = e % kStaged;
      const int64_t row = first_row + r, column = from + n;
      const bool valid = row < p.P && column < p.Q;
      const int64_t pair = row * p.Q + column;
      const float w = valid ? p.workspace.quotient[pair] * p.workspace.area[column] : 0.0f;
      float squares = 0.0f;
#pragma unroll
      for (int l = 0; l < K; ++l) {
        const float t = valid ? p.workspace.projections[l * p.P * p.Q + pair] : 0.0f;
        staged[n * kCoefficients + (l + 1) * Rows + r] = w * t;
        squares += t * t;
      }
      const bool across = p.unit && valid && has_length(p.workspace.anchor_scale[row]);
      staged[n * kCoefficients + r] = across ? w * squares : w;
    }
    __syncthreads();
    if (!real) continue;
#pragma unroll 4
    for (int n = 0; n < count; ++n) {
      const float* coefficient = staged + n * kCoefficients;
#pragma unroll
      for (int r = 0; r < Rows; ++r) weight[r] += coefficient[r];
#pragma unroll
      for (int l = 0; l < K; ++l) {
        const auto q = load_vector<Width>(p.workspace.basis + (l * p.Q + from + n) * p.C + c);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
#pragma unroll
          for (int i = 0; i < Width; ++i) sum[r][i] += coefficient[(l + 1) * Rows + r] * q.at[i];
        }
      }
    }
  }
  if (!real) return;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = first_row + r;
    if (row >= p.P) break;
    const auto a = load_vector<Width>(p.anchor + row * p.stride + c);
    const float scale = p.unit ? p.workspace.anchor_scale[row] : 1.0f;
    Vector<float, Width> result;
#pragma unroll
    for (int i = 0; i < Width; ++i) result.at[i] = scale * (weight[r] * scale * a.at[i] - sum[r][i]);
    store_global(p.grad_anchor + row * p.grad_stride + c, result);
  }
}

// Place of (row, column <= row) in a triangle stored row by row.
__host__ __device__ constexpr int triangular(int row, int column) { return row * (row + 1) / 2 + column; }

// From the gradient of a unit vector b = scale x to that of x, given b . grad.
template <int Width, int K>
__device__ __forceinline__ void make_tangent(const Gradients<K>& p, int m, int64_t row, int64_t c, float along,
                                             Vector<float, Width>& grad) {
  const float scale = p.workspace.others_scale[m * p.Q + row];
  const float removed = has_length(scale) ? along * scale : 0.0f;
  const auto x = load_vector<Width>(p.others[m] + row * p.stride + c);
#pragma unroll
  for (int i = 0; i < Width; ++i) grad.at[i] = scale * (grad.at[i] - removed * x.at[i]);
}

// With y_l = (sum_i rise_ij) q_l - sum_i w_li a_i + sum_m (sum_i w_li t_mi) q_m and w_li = quotient_ij t_lij:
// grad b_m = sum_l adjugate_ml y_l. With unit vectors, a_i = scale_i x_i, and each b_m loses sum_i g_ij V_ij of itself,
// as grad a does.
// One block: a few columns times up to 128 packs of channels. One thread: those columns of one pack, over all anchor
// rows; besides, while it stages the pairs of one column, the sums that do not depend on the channel.
// The anchor is read once per block, the pair coefficients once per channel block, the gradients written once.
template <int Columns, int Width, int K>
__device__ void others_gradient(const Gradients<K>& p, int64_t block) {
  constexpr int kCoefficients = K * Columns;
  constexpr int kSums = 1 + K * (K + 1) / 2;  // of rise; of w_l t_m for m <= l, row by row of that triangle
  float* staged = reinterpret_cast<float*>(dynamic_shared());  // [row][column][direction]
  __shared__ float partial[kThreads / kWarpSize][kSums][Columns];
  __shared__ float total[kSums][Columns];
  const int64_t first_column = block / p.channel_blocks * Columns;
  const int64_t c = (block % p.channel_blocks * blockDim.x + threadIdx.x) * Width;
  const bool real = c < p.C;

  float of_column[kSums] = {};  // of column threadIdx.x % Columns
  float sum[Columns][K][Width] = {};
  for (int64_t from = 0; from < p.P; from += kStaged) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kStaged), p.P - from));
    __syncthreads();
    for (int e = threadIdx.x; e < kStaged * Columns; e += blockDim.x) {
      const int n = e / Columns, column = e % Columns;
      const bool valid = n < count && first_column + column < p.Q;
      const int64_t pair = (from + n) * p.Q + first_column + column;
      const float quotient = valid ? p.workspace.quotient[pair] : 0.0f;
      const float scale = p.unit && valid ? p.workspace.anchor_scale[from + n] : 1.0f;
      float t[K];
#pragma unroll
      for (int l = 0; l < K; ++l) {
        t[l] = valid ? p.workspace.projections[l * p.P * p.Q + pair] : 0.0f;
        staged[n * kCoefficients + column * K + l] = quotient * t[l] * scale;
      }
      of_column[0] += valid ? p.workspace.rise[pair] : 0.0f;
#pragma unroll
      for (int l = 0; l < K; ++l) {
#pragma unroll
        for (int m = 0; m <= l; ++m) of_column[1 + triangular(l, m)] += quotient * t[l] * t[m];
      }
    }
    __syncthreads();
    if (!real) continue;
#pragma unroll 4
    for (int n = 0; n < count; ++n) {
      const auto a = load_vector<Width>(p.anchor + (from + n) * p.stride + c);
#pragma unroll
      for (int column = 0; column < Columns; ++column) {
#pragma unroll
        for (int l = 0; l < K; ++l) {
          const float w = staged[n * kCoefficients + column * K + l];
#pragma unroll
          for (int i = 0; i < Width; ++i) sum[column][l][i] += w * a.at[i];
        }
      }
    }
  }

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset >= Columns; offset /= 2) {
      of_column[s] += __shfl_xor_sync(kFullWarp, of_column[s], offset);
    }
    if (lane < Columns) partial[warp][s][lane] = of_column[s];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kSums * Columns; e += blockDim.x) {
    const int s = e / Columns, column = e % Columns;
    total[s][column] = 0.0f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) total[s][column] += partial[w][s][column];
  }
  __syncthreads();
  if (!real) return;

#pragma unroll
  for (int column = 0; column < Columns; ++column) {
    const int64_t row = first_column + column;
    if (row >= p.Q) break;
    Vector<float, Width> q[K], result[K] = {};
#pragma unroll
    for (int l = 0; l < K; ++l) q[l] = load_vector<Width>(p.workspace.basis + (l * p.Q + row) * p.C + c);
    const float* adjugate = p.workspace.adjugate + row * K * K;
#pragma unroll
    for (int l = 0; l < K; ++l) {
      float y[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) y[i] = total[0][column] * q[l].at[i] - sum[column][l][i];
#pragma unroll
      for (int m = 0; m < K; ++m) {
        const float overlap = total[1 + triangular(max(l, m), min(l, m))][column];
#pragma unroll
        for (int i = 0; i < Width; ++i) y[i] += overlap * q[m].at[i];
      }
#pragma unroll
      for (int m = 0; m <= l; ++m) {
#pragma unroll
        for (int i = 0; i < Width; ++i) result[m].at[i] += adjugate[m * K + l] * y[i];
      }
    }
#pragma unroll
    for (int m = 0; m < K; ++m) {
      if (p.unit) make_tangent(p, m, row, c, p.workspace.area[row] * total[0][column], result[m]);
      store_global(p.grad_others[m] + row * p.grad_stride + c, result[m]);
    }
  }
}

// The first blocks take the anchor's gradient, the others the other vectors'.
template <int K, int Rows, int Columns, int Width>
__global__ void __launch_bounds__(kThreads) gradients_kernel(Gradients<K> p) {
  const int64_t block = blockIdx.x;
  if (block < p.anchor_blocks) {
    anchor_gradient<Rows, Width>(p, block);
  } else {
    others_gradient<Columns, Width>(p, block - p.anchor_blocks);
  }
}

template <int K, int Rows, int Columns, int Width>
cudaError_t launch_gradients(Gradients<K> p, cudaStream_t stream) {
  const int64_t packs = p.C / Width;
  const int threads = static_cast<int>(std::min(ceil_div(packs, kWarpSize) * kWarpSize, int64_t{kThreads}));
  p.channel_blocks = ceil_div(packs, threads);
  p.anchor_blocks = ceil_div(p.P, Rows) * p.channel_blocks;
  const int64_t blocks = p.anchor_blocks + ceil_div(p.Q, Columns) * p.channel_blocks;
  const size_t staged = kStaged * std::max((K + 1) * Rows, K * Columns) * sizeof(float);
  return launch(gradients_kernel<K, Rows, Columns, Width>, grid_of(blocks), threads, staged, stream, p);
}

template <int K>
cudaError_t launch_gradients(const Gradients<K>& p, bool wide, cudaStream_t stream) {
  constexpr int kRows = 8, kColumns = K == 1 ? 8 : K == 2 ? 4 : 2;
  if (!wide) return launch_gradients<K, 1, 1, 1>(p, stream);
  const int64_t channel_blocks = ceil_div(p.C / 4, kThreads);
  const bool many = (ceil_div(p.P, kRows) + ceil_div(p.Q, kColumns)) * channel_blocks >= kFewBlocks;
  return many ? launch_gradients<K, kRows, kColumns, 4>(p, stream) : launch_gradients<K, 1, 1, 4>(p, stream);
}

struct Launch {
  const GramianGradients& p;
  cudaStream_t stream;

  template <int K>
  cudaError_t operator()() const {
    Gradients<K> gradients = {};
    gradients.anchor = p.anchor;
    gradients.workspace = p.workspace;
    gradients.grad_anchor = p.grad_anchor;
    gradients.P = p.P, gradients.Q = p.Q, gradients.C = p.C;
    gradients.stride = p.stride, gradients.grad_stride = p.grad_stride;
    gradients.unit = p.unit;
    bool wide = vectorizable<float>(p.anchor, p.C, p.stride) && vectorizable<float>(p.grad_anchor, p.C, p.grad_stride) &&
                vectorizable<float>(p.workspace.basis, p.C);
    for (int l = 0; l < K; ++l) {
      gradients.grad_others[l] = p.grad_others[l];
      wide = wide && vectorizable<float>(p.grad_others[l], p.C, p.grad_stride);
      if (!p.unit) continue;
      gradients.others[l] = p.others[l];
      wide = wide && vectorizable<float>(p.others[l], p.C, p.stride);
    }
    return launch_gradients<K>(gradients, wide, stream);
  }
};

// The gradients over no pairs.
cudaError_t zero_gradients(const GramianVolumeBackward& p, cudaStream_t stream) {
  if (p.P > 0) return cudaMemsetAsync(p.grad_anchor, 0, p.P * p.C * sizeof(float), stream);
  for (int l = 0; l < p.grad_others.k && p.Q > 0; ++l) {
    const cudaError_t status = cudaMemsetAsync(p.grad_others.at[l], 0, p.Q * p.C * sizeof(float), stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

int64_t gramian_volume_workspace(int64_t P, int64_t Q, int64_t C, int k) {
  return k * Q * C + (k + 2) * P * Q + Q * (k * k + k + 1) + P;
}

Workspace partition(float* start, int64_t P, int64_t Q, int64_t C, int k) {
  Workspace w;
  w.basis = start;
  w.quotient = w.basis + k * Q * C;
  w.rise = w.quotient + P * Q;
  w.projections = w.rise + P * Q;
  w.area = w.projections + k * P * Q;
  w.adjugate = w.area + Q;
  w.others_scale = w.adjugate + Q * k * k;
  w.anchor_scale = w.others_scale + k * Q;
  return w;
}

cudaError_t gramian_gradients(const GramianGradients& p, cudaStream_t stream) {
  return dispatch_others(p.k, Launch{p, stream});
}

cudaError_t gramian_volume_backward(const GramianVolumeBackward& p, cudaStream_t stream) {
  if (p.grad_others.k != p.others.k) return cudaErrorInvalidValue;
  if (p.C == 0) return cudaSuccess;
  if (p.P == 0 || p.Q == 0) return zero_gradients(p, stream);
  const Workspace workspace = partition(p.workspace, p.P, p.Q, p.C, p.others.k);
  GramianPairs pairs = {};
  pairs.anchor = p.anchor, pairs.others = p.others.at, pairs.grad = p.grad, pairs.workspace = workspace;
  pairs.P = p.P, pairs.Q = p.Q, pairs.C = pairs.stride = p.C, pairs.k = p.others.k;
  GramianGradients gradients = {};
  gradients.anchor = p.anchor, gradients.workspace = workspace;
  gradients.grad_anchor = p.grad_anchor, gradients.grad_others = p.grad_others.at;
  gradients.P = p.P, gradients.Q = p.Q, gradients.C = gradients.stride = gradients.grad_stride = p.C;
  gradients.k = p.others.k;
  const cudaError_t status = gramian_pairs(pairs, stream);
  return status == cudaSuccess ? gramian_gradients(gradients, stream) : status;
}

}  // namespace signal_reid
