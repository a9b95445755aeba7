// Pairwise gramian volume and its gradients in fp32; signal_reid/ops/reference/gramian_volume.py derives the maths.
//
// V = area_j * height_ij, height^2 = |a|^2 - sum_l (a . q_l)^2, q the orthonormal basis of column j's vectors. Where
// that difference cancels, the height is taken from the residual a - sum_l (a . q_l) q_l, which keeps its digits.
// No atomics: every result has one writer and a fixed order of additions.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 4;                        // anchor rows that a warp holds at a time
constexpr int kTileRows = kWarps * kWarpRows;       // and a block
constexpr int kBasisFloats = 8192;                  // of shared memory, for the basis of a block's columns
constexpr int kGradientThreads = 128;
constexpr int kStaged = 64;                         // pairs along the summed dimension held in shared memory at a time
constexpr float kCancelled = 1.0f / 128;            // below this share of |a|^2 the height is taken from the residual
constexpr float kEpsilon = 1.1920929e-7f;           // of fp32
constexpr int64_t kFewBlocks = 128, kManyBlocks = 2048;

// How far loops over the others' channels are unrolled: more than two others are rare and not worth the code.
template <int K>
constexpr int kUnroll = K <= 2 ? 4 : 1;

template <int K>
using Pointers = const float* const (&)[K];

// How the basis of one column follows from its vectors: each is projected twice on those before it ("twice is enough"),
// then scaled. A direction of length 0 stays 0.
template <int K>
struct Triangle {
  float overlap[2][K][K];  // [round][vector][earlier direction]
  float length[K];
  float inverse[K];
};

// Elements c .. c + Width of the directions before `vector`, and of `vector` itself after `rounds` projections.
template <int Width, int K>
__device__ __forceinline__ void partial_basis(Pointers<K> vectors, const Triangle<K>& triangle, int vector, int rounds,
                                              int64_t c, float (&q)[K][Width]) {
#pragma unroll
  for (int l = 0; l < K; ++l) {
    if (l > vector) break;
    const auto loaded = load_vector<Width>(vectors[l] + c);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      float residual = loaded.at[i];
#pragma unroll
      for (int round = 0; round < 2; ++round) {
        if (l == vector && round >= rounds) break;
#pragma unroll
        for (int m = 0; m < l; ++m) residual -= triangle.overlap[round][l][m] * q[m][i];
      }
      q[l][i] = l < vector ? residual * triangle.inverse[l] : residual;
    }
  }
}

template <int Width, int K>
__device__ __forceinline__ void basis_at(Pointers<K> vectors, const Triangle<K>& triangle, int64_t c,
                                         float (&q)[K][Width]) {
  partial_basis<Width, K>(vectors, triangle, K - 1, 2, c, q);
#pragma unroll
  for (int i = 0; i < Width; ++i) q[K - 1][i] *= triangle.inverse[K - 1];
}

// One warp orthonormalises the vectors of one column; every lane has the result. Reads them 3 k - 2 times.
template <int Width, int K>
__device__ Triangle<K> orthonormalise(Pointers<K> vectors, int64_t C, int lane) {
  Triangle<K> triangle = {};
#pragma unroll
  for (int l = 0; l < K; ++l) {
#pragma unroll
    for (int round = 0; round < (l == 0 ? 0 : 2); ++round) {
      float overlap[K] = {};
#pragma unroll(kUnroll<K>)
      for (int64_t c = lane * Width; c < C; c += kWarpSize * Width) {
        float q[K][Width];
        partial_basis<Width, K>(vectors, triangle, l, round, c, q);
#pragma unroll
        for (int m = 0; m < l; ++m) {
#pragma unroll
          for (int i = 0; i < Width; ++i) overlap[m] += q[l][i] * q[m][i];
        }
      }
#pragma unroll
      for (int m = 0; m < l; ++m) triangle.overlap[round][l][m] = warp_sum(overlap[m]);
    }
    float squared = 0.0f;
#pragma unroll(kUnroll<K>)
    for (int64_t c = lane * Width; c < C; c += kWarpSize * Width) {
      float q[K][Width];
      partial_basis<Width, K>(vectors, triangle, l, 2, c, q);
#pragma unroll
      for (int i = 0; i < Width; ++i) squared += q[l][i] * q[l][i];
    }
    triangle.length[l] = sqrtf(warp_sum(squared));
    triangle.inverse[l] = triangle.length[l] == 0.0f ? 0.0f : 1.0f / triangle.length[l];
  }
  return triangle;
}

template <int K>
__device__ float area(const Triangle<K>& triangle) {
  float product = 1.0f;
#pragma unroll
  for (int l = 0; l < K; ++l) product *= triangle.length[l];
  return product;
}

// Adjugate of the triangle R (upper triangular, K x K): the inverse's back substitution multiplied through by det R, so
// without a division. result_ij = g_ij * diagonal outside i..j, g_ij = -sum_m g_im R_mj * diagonal m + 1 .. j - 1.
template <int K>
__device__ void adjugate(const Triangle<K>& triangle, float* result) {
  const auto diagonal = [&](int from, int to) {
    float product = 1.0f;
#pragma unroll
    for (int n = from; n < to; ++n) product *= triangle.length[n];
    return product;
  };
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float g[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      g[j] = i == j ? 1.0f : 0.0f;
#pragma unroll
      for (int m = i; m < j; ++m) {
        const float above = triangle.overlap[0][j][m] + triangle.overlap[1][j][m];
        g[j] -= g[m] * above * diagonal(m + 1, j);
      }
      result[i * K + j] = j < i ? 0.0f : g[j] * diagonal(0, i) * diagonal(j + 1, K);
    }
  }
}

// A vector to global memory in one instruction; assigned as a struct, nvcc stores some of them element by element.
template <int Width>
__device__ __forceinline__ void store_global(float* address, const Vector<float, Width>& value) {
  if constexpr (Width == 4) {
    __stwb(reinterpret_cast<float4*>(address), make_float4(value.at[0], value.at[1], value.at[2], value.at[3]));
  } else {
    store_vector(address, value);
  }
}

// Halves the values that a lane holds by exchanging the other half with the lane that differs in bit Half.
template <int Half, int Count>
__device__ __forceinline__ void exchange(float (&value)[Count], int lane) {
  if constexpr (Half > 0) {
    const bool upper = (lane & Half) != 0;
#pragma unroll
    for (int n = 0; n < Half; ++n) {
      const float kept = upper ? value[n + Half] : value[n];
      const float sent = upper ? value[n] : value[n + Half];
      value[n] = kept + __shfl_xor_sync(kFullWarp, sent, Half);
    }
    exchange<Half / 2>(value, lane);
  }
}

// Sums each of Count values over the warp; lane n gets the sum of value n % Count. Count is a power of two up to 32.
template <int Count>
__device__ __forceinline__ float warp_sum_scatter(float (&value)[Count], int lane) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset >= Count; offset /= 2) {
#pragma unroll
    for (int n = 0; n < Count; ++n) value[n] += __shfl_xor_sync(kFullWarp, value[n], offset);
  }
  exchange<Count / 2>(value, lane);
  return value[0];
}

// Where the two launches of the backward meet. All of it is written by the first and read by the second.
struct Workspace {
  float* basis;        // (K, Q, C)
  float* quotient;     // (P, Q), grad / height
  float* rise;         // (P, Q), grad * height
  float* projections;  // (K, P, Q), a . q_l
  float* area;         // (Q,)
  float* adjugate;     // (Q, K, K)
};

// As many floats as gramian_volume_workspace says.
Workspace partition(float* start, int64_t P, int64_t Q, int64_t C, int k) {
  Workspace w;
  w.basis = start;
  w.quotient = w.basis + k * Q * C;
  w.rise = w.quotient + P * Q;
  w.projections = w.rise + P * Q;
  w.area = w.projections + k * P * Q;
  w.adjugate = w.area + Q;
  return w;
}

template <int K>
struct Pairs {
  const float* anchor;
  const float* others[K];
  float* volume;      // forward
  const float* grad;  // backward, else null
  Workspace workspace;
  int64_t P, Q, C;
  int64_t column_blocks;
  int tiles;  // of kTileRows anchor rows, per block
  int chunk;  // channels of the basis held in shared memory at a time
};

template <int K, int Columns>
struct Shared {
  Triangle<K> triangle[Columns];
};

// Fills shared memory with channels from .. from + count of the basis of the block's columns, as
// [column][direction][chunk]; the workspace too if `keep`.
template <int Width, int K, int Columns>
__device__ void fill_basis(const Pairs<K>& p, const Shared<K, Columns>& shared, int64_t first_column, int64_t from,
                           int count, bool keep, float* basis) {
  const int packs = count / Width;
#pragma unroll(kUnroll<K>)
  for (int e = threadIdx.x; e < packs * Columns; e += kThreads) {
    const int column = e / packs, c = e % packs * Width;
    const bool real = first_column + column < p.Q;
    const int64_t row = real ? first_column + column : p.Q - 1;
    const float* vectors[K];
#pragma unroll
    for (int l = 0; l < K; ++l) vectors[l] = p.others[l] + row * p.C + from;
    float q[K][Width];
    basis_at<Width, K>(vectors, shared.triangle[column], c, q);
#pragma unroll
    for (int l = 0; l < K; ++l) {
      Vector<float, Width> direction;
#pragma unroll
      for (int i = 0; i < Width; ++i) direction.at[i] = q[l][i];
      store_vector(basis + (column * K + l) * p.chunk + c, direction);
      if (keep && real) store_global(p.workspace.basis + (l * p.Q + row) * p.C + from + c, direction);
    }
  }
}

// |a - sum_l t_l q_l|^2, by one warp.
template <int Width, int K>
__device__ float squared_residual(const float* anchor, Pointers<K> vectors, const Triangle<K>& triangle,
                                  const float (&t)[K], int64_t C, int lane) {
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t c = lane * Width; c < C; c += kWarpSize * Width) {
    const auto a = load_vector<Width>(anchor + c);
    float q[K][Width];
    basis_at<Width, K>(vectors, triangle, c, q);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      float residual = a.at[i];
#pragma unroll
      for (int l = 0; l < K; ++l) residual -= t[l] * q[l][i];
      sum += residual * residual;
    }
  }
  return warp_sum(sum);
}

// One block: a few columns (1 to 8) times one or more tiles of 32 anchor rows. Its warps orthonormalise a column
// each, then the block keeps the basis in shared memory, all channels or a chunk of them at a time.
// One warp: 4 rows times the block's columns; its lanes share the channels. One lane: after the sums, one pair.
// The anchor is read once per block of columns, the others a few times per block (from the L1 cache), V written once.
// The backward's first launch is the same, but writes what its second needs instead of V.
template <int K, int Columns, int Width>
__global__ void __launch_bounds__(kThreads, 2) pairs_kernel(Pairs<K> p) {
  constexpr int kPairs = kWarpRows * Columns;
  static_assert(kPairs <= kWarpSize && Columns <= kWarps);
  __shared__ Shared<K, Columns> shared;
  float* basis = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first_column = blockIdx.x % p.column_blocks * Columns;
  const int64_t row_block = blockIdx.x / p.column_blocks;
  const bool backward = p.grad != nullptr;

  if (warp < Columns) {
    const int64_t row = min(first_column + warp, p.Q - 1);
    const float* vectors[K];
#pragma unroll
    for (int l = 0; l < K; ++l) vectors[l] = p.others[l] + row * p.C;
    const Triangle<K> triangle = orthonormalise<Width, K>(vectors, p.C, lane);
    if (lane == 0) shared.triangle[warp] = triangle;
  }
  __syncthreads();
  if (backward && row_block == 0 && threadIdx.x < Columns && first_column + threadIdx.x < p.Q) {
    const int64_t column = first_column + threadIdx.x;
    p.workspace.area[column] = area(shared.triangle[threadIdx.x]);
    adjugate(shared.triangle[threadIdx.x], p.workspace.adjugate + column * K * K);
  }

  for (int tile = 0; tile < p.tiles; ++tile) {
    const int64_t first_row = (row_block * p.tiles + tile) * kTileRows + warp * kWarpRows;
    const float* rows[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) rows[r] = p.anchor + min(first_row + r, p.P - 1) * p.C;

    float sums[K][kPairs] = {}, squares[kWarpRows] = {};
    for (int64_t from = 0; from < p.C; from += p.chunk) {
      const int count = static_cast<int>(min(static_cast<int64_t>(p.chunk), p.C - from));
      if (tile == 0 || p.chunk < p.C) {
        __syncthreads();
        fill_basis<Width>(p, shared, first_column, from, count, backward && row_block + tile == 0, basis);
        __syncthreads();
      }
      for (int c = lane * Width; c < count && first_row < p.P; c += kWarpSize * Width) {
        Vector<float, Width> a[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          a[r] = load_vector<Width>(rows[r] + from + c);
#pragma unroll
          for (int i = 0; i < Width; ++i) squares[r] += a[r].at[i] * a[r].at[i];
        }
#pragma unroll
        for (int column = 0; column < Columns; ++column) {
#pragma unroll
          for (int l = 0; l < K; ++l) {
            const auto q = load_vector<Width>(basis + (column * K + l) * p.chunk + c);
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
              for (int i = 0; i < Width; ++i) sums[l][r * Columns + column] += a[r].at[i] * q.at[i];
            }
          }
        }
      }
    }

    if (first_row >= p.P) continue;
    const int pair_row = lane % kPairs / Columns, pair_column = lane % Columns;
    const int64_t row = first_row + pair_row, column = first_column + pair_column;
    const bool real = lane < kPairs && row < p.P && column < p.Q;
    float t[K], square = 0.0f;
#pragma unroll
    for (int l = 0; l < K; ++l) t[l] = warp_sum_scatter(sums[l], lane);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float of_row = warp_sum(squares[r]);
      square = r == pair_row ? of_row : square;
    }
    float squared_height = square;
#pragma unroll
    for (int l = 0; l < K; ++l) squared_height -= t[l] * t[l];

    unsigned cancelled = __ballot_sync(kFullWarp, real && squared_height < kCancelled * square);
    for (; cancelled != 0; cancelled &= cancelled - 1) {
      const int source = __ffs(cancelled) - 1;
      const int64_t other_row = first_column + source % Columns;
      const float* vectors[K];
      float of_source[K];
#pragma unroll
      for (int l = 0; l < K; ++l) {
        vectors[l] = p.others[l] + other_row * p.C;
        of_source[l] = __shfl_sync(kFullWarp, t[l], source);
      }
      const float residual =
          squared_residual<Width, K>(p.anchor + (first_row + source / Columns) * p.C, vectors,
                                     shared.triangle[source % Columns], of_source, p.C, lane);
      if (lane == source) squared_height = residual;
    }

    if (!real) continue;
    const float height = sqrtf(squared_height < 0.0f ? 0.0f : squared_height);  // a NaN stays
    const int64_t pair = row * p.Q + column;
    if (backward) {
      // Below the rounding of |a| the direction of the residual is noise; the floor keeps its gradient bounded.
      const float floor = kEpsilon * sqrtf(square);
      const float grad = p.grad[pair];
      p.workspace.quotient[pair] = height == 0.0f ? 0.0f : grad / (height < floor ? floor : height);
      p.workspace.rise[pair] = grad * height;
#pragma unroll
      for (int l = 0; l < K; ++l) p.workspace.projections[l * p.P * p.Q + pair] = t[l];
    } else {
      p.volume[pair] = area(shared.triangle[pair_column]) * height;
    }
  }
}

template <int K>
struct Gradients {
  const float* anchor;
  Workspace workspace;
  float* grad_anchor;
  float* grad_others[K];
  int64_t P, Q, C;
  int64_t channel_blocks, anchor_blocks;
};

// grad a_i = (sum_j w_ij) a_i - sum_jl w_ij t_lij q_lj, w = area * quotient.
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
      staged[n * kCoefficients + r] = w;
#pragma unroll
      for (int l = 0; l < K; ++l) {
        const float t = valid ? p.workspace.projections[l * p.P * p.Q + pair] : 0.0f;
        staged[n * kCoefficients + (l + 1) * Rows + r] = w * t;
      }
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
    const auto a = load_vector<Width>(p.anchor + row * p.C + c);
    Vector<float, Width> result;
#pragma unroll
    for (int i = 0; i < Width; ++i) result.at[i] = weight[r] * a.at[i] - sum[r][i];
    store_global(p.grad_anchor + row * p.C + c, result);
  }
}

// Place of (row, column <= row) in a triangle stored row by row.
__host__ __device__ constexpr int triangular(int row, int column) { return row * (row + 1) / 2 + column; }

// With y_l = (sum_i rise_ij) q_l - sum_i w_li a_i + sum_m (sum_i w_li t_mi) q_m and w_li = quotient_ij t_lij:
// grad b_m = sum_l adjugate_ml y_l.
// One block: a few columns times up to 128 packs of channels. One thread: those columns of one pack, over all anchor
// rows; besides, while it stages the pairs of one column, the sums that do not depend on the channel.
// The anchor is read once per block, the pair coefficients once per channel block, the gradients written once.
template <int Columns, int Width, int K>
__device__ void others_gradient(const Gradients<K>& p, int64_t block) {
  constexpr int kCoefficients = K * Columns;
  constexpr int kSums = 1 + K * (K + 1) / 2;  // of rise; of w_l t_m for m <= l, row by row of that triangle
  float* staged = reinterpret_cast<float*>(dynamic_shared());  // [row][column][direction]
  __shared__ float partial[kGradientThreads / kWarpSize][kSums][Columns];
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
      float t[K];
#pragma unroll
      for (int l = 0; l < K; ++l) {
        t[l] = valid ? p.workspace.projections[l * p.P * p.Q + pair] : 0.0f;
        staged[n * kCoefficients + column * K + l] = quotient * t[l];
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
      const auto a = load_vector<Width>(p.anchor + (from + n) * p.C + c);
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
    for (int m = 0; m < K; ++m) store_global(p.grad_others[m] + row * p.C + c, result[m]);
  }
}

// The first blocks take the anchor's gradient, the others the other vectors'.
template <int K, int Rows, int Columns, int Width>
__global__ void __launch_bounds__(kGradientThreads) gradients_kernel(Gradients<K> p) {
  const int64_t block = blockIdx.x;
  if (block < p.anchor_blocks) {
    anchor_gradient<Rows, Width>(p, block);
  } else {
    others_gradient<Columns, Width>(p, block - p.anchor_blocks);
  }
}

template <int K, int Columns, int Width>
cudaError_t launch_pairs(Pairs<K> p, cudaStream_t stream) {
  const int64_t row_tiles = ceil_div(p.P, kTileRows);
  p.column_blocks = ceil_div(p.Q, Columns);
  // Blocks that walk over several tiles orthonormalise less often, if enough blocks are left.
  p.tiles = 1;
  while (p.column_blocks * ceil_div(row_tiles, p.tiles) >= kManyBlocks && p.tiles < 8) p.tiles *= 2;
  constexpr int64_t most = kBasisFloats / (Columns * K) / (kWarpSize * 4) * (kWarpSize * 4);
  p.chunk = static_cast<int>(std::clamp(p.C, int64_t{1}, most));
  const dim3 grid(static_cast<unsigned>(p.column_blocks * ceil_div(row_tiles, p.tiles)));
  return launch(pairs_kernel<K, Columns, Width>, grid, kThreads, Columns * K * p.chunk * sizeof(float), stream, p);
}

// Narrow tiles where wide ones would leave the card idle, and where rows cannot be moved 16 bytes at a time.
template <int K>
cudaError_t launch_pairs(const Pairs<K>& p, bool wide, cudaStream_t stream) {
  constexpr int kColumns = K <= 2 ? 8 : K == 3 ? 4 : 2;
  if (!wide) return launch_pairs<K, 1, 1>(p, stream);
  const bool many = ceil_div(p.P, kTileRows) * ceil_div(p.Q, kColumns) >= kFewBlocks;
  return many ? launch_pairs<K, kColumns, 4>(p, stream) : launch_pairs<K, 1, 4>(p, stream);
}

template <int K, int Rows, int Columns, int Width>
cudaError_t launch_gradients(Gradients<K> p, cudaStream_t stream) {
  const int64_t packs = p.C / Width;
  const int threads = static_cast<int>(std::min(ceil_div(packs, kWarpSize) * kWarpSize, int64_t{kGradientThreads}));
  p.channel_blocks = ceil_div(packs, threads);
  p.anchor_blocks = ceil_div(p.P, Rows) * p.channel_blocks;
  const int64_t blocks = p.anchor_blocks + ceil_div(p.Q, Columns) * p.channel_blocks;
  const size_t staged = kStaged * std::max((K + 1) * Rows, K * Columns) * sizeof(float);
  return launch(gradients_kernel<K, Rows, Columns, Width>, dim3(static_cast<unsigned>(blocks)), threads, staged, stream,
                p);
}

template <int K>
cudaError_t launch_gradients(const Gradients<K>& p, bool wide, cudaStream_t stream) {
  constexpr int kRows = 8, kColumns = K == 1 ? 8 : K == 2 ? 4 : 2;
  if (!wide) return launch_gradients<K, 1, 1, 1>(p, stream);
  const int64_t channel_blocks = ceil_div(p.C / 4, kGradientThreads);
  const bool many = (ceil_div(p.P, kRows) + ceil_div(p.Q, kColumns)) * channel_blocks >= kFewBlocks;
  return many ? launch_gradients<K, kRows, kColumns, 4>(p, stream) : launch_gradients<K, 1, 1, 4>(p, stream);
}

// Calls body.template operator()<K>() with the number of other vectors.
template <class Body>
cudaError_t dispatch_others(int k, Body body) {
  switch (k) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
  }
  return cudaErrorInvalidValue;
}

struct Volume {
  const GramianVolume& p;
  cudaStream_t stream;

  template <int K>
  cudaError_t operator()() const {
    Pairs<K> pairs = {};
    pairs.anchor = p.anchor;
    pairs.volume = p.volume;
    pairs.P = p.P, pairs.Q = p.Q, pairs.C = p.C;
    bool wide = vectorizable<float>(p.anchor, p.C);
    for (int l = 0; l < K; ++l) {
      pairs.others[l] = p.others[l];
      wide = wide && vectorizable<float>(p.others[l], p.C);
    }
    return launch_pairs<K>(pairs, wide, stream);
  }
};

struct VolumeBackward {
  const GramianVolumeBackward& p;
  cudaStream_t stream;

  template <int K>
  cudaError_t operator()() const {
    Pairs<K> pairs = {};
    pairs.anchor = p.anchor;
    pairs.grad = p.grad;
    pairs.workspace = partition(p.workspace, p.P, p.Q, p.C, K);
    pairs.P = p.P, pairs.Q = p.Q, pairs.C = p.C;
    Gradients<K> gradients = {};
    gradients.anchor = p.anchor;
    gradients.workspace = pairs.workspace;
    gradients.grad_anchor = p.grad_anchor;
    gradients.P = p.P, gradients.Q = p.Q, gradients.C = p.C;
    bool wide = vectorizable<float>(p.anchor, p.C) && vectorizable<float>(p.grad_anchor, p.C) &&
                vectorizable<float>(p.workspace, p.C);
    for (int l = 0; l < K; ++l) {
      pairs.others[l] = p.others[l];
      gradients.grad_others[l] = p.grad_others[l];
      wide = wide && vectorizable<float>(p.others[l], p.C) && vectorizable<float>(p.grad_others[l], p.C);
    }
    const cudaError_t status = launch_pairs<K>(pairs, wide, stream);
    return status == cudaSuccess ? launch_gradients<K>(gradients, wide, stream) : status;
  }
};

// The gradients over no pairs.
cudaError_t zero_gradients(const GramianVolumeBackward& p, cudaStream_t stream) {
  if (p.P > 0) return cudaMemsetAsync(p.grad_anchor, 0, p.P * p.C * sizeof(float), stream);
  for (int l = 0; l < p.k && p.Q > 0; ++l) {
    const cudaError_t status = cudaMemsetAsync(p.grad_others[l], 0, p.Q * p.C * sizeof(float), stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t gramian_volume(const GramianVolume& p, cudaStream_t stream) {
  if (p.P == 0 || p.Q == 0) return cudaSuccess;
  return dispatch_others(p.k, Volume{p, stream});
}

int64_t gramian_volume_workspace(int64_t P, int64_t Q, int64_t C, int k) {
  return k * Q * C + (k + 2) * P * Q + Q * (k * k + 1);
}

cudaError_t gramian_volume_backward(const GramianVolumeBackward& p, cudaStream_t stream) {
  if (p.C == 0) return cudaSuccess;
  if (p.P == 0 || p.Q == 0) return zero_gradients(p, stream);
  return dispatch_others(p.k, VolumeBackward{p, stream});
}

}  // namespace signal_reid
