// Pairwise gramian volume in fp32; signal_reid/ops/reference/gramian.py derives the maths.
//
// V = area_j * height_ij, height^2 = |a|^2 - sum_l (a . q_l)^2, q the orthonormal basis of column j's vectors. Where
// that difference cancels, the height is taken from the residual a - sum_l (a . q_l) q_l, which keeps its digits.
// No atomics: every result has one writer and a fixed order of additions.
#include <algorithm>
#include <cmath>

#include "gramian.cuh"

namespace signal_reid {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 4;                   // anchor rows that a warp holds at a time
constexpr int kTileRows = kWarps * kWarpRows;  // and a block
constexpr int kBasisFloats = 8192;             // of shared memory, for the basis of a block's columns
constexpr float kCancelled = 1.0f / 128;       // below this share of |a|^2 the height is taken from the residual
constexpr float kEpsilon = 1.1920929e-7f;      // of fp32
constexpr int64_t kManyBlocks = 2048;

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

// What a vector of this squared length is multiplied by.
__device__ __forceinline__ float to_unit_length(float squared) { return 1.0f / fmaxf(sqrtf(squared), kShortest); }

// The triangle of the same vectors at length 1; their directions are the same. What the vectors are multiplied by.
template <int K>
__device__ void scale_to_unit_length(Triangle<K>& triangle, float (&scale)[K]) {
#pragma unroll
  for (int l = 0; l < K; ++l) {
    float squared = triangle.length[l] * triangle.length[l];
#pragma unroll
    for (int m = 0; m < l; ++m) {
      const float above = triangle.overlap[0][l][m] + triangle.overlap[1][l][m];
      squared += above * above;
    }
    scale[l] = to_unit_length(squared);
    triangle.length[l] *= scale[l];
#pragma unroll
    for (int m = 0; m < l; ++m) {
      triangle.overlap[0][l][m] *= scale[l];
      triangle.overlap[1][l][m] *= scale[l];
    }
  }
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

template <int K>
struct Pairs {
  const float* anchor;
  const float* others[K];
  float* volume;      // forward
  const float* grad;  // backward, else null
  Workspace workspace;
  Contrast contrast;
  int64_t P, Q, C, stride;
  int64_t column_blocks;
  int tiles;  // of kTileRows anchor rows, per block
  int chunk;  // channels of the basis held in shared memory at a time
  bool unit;
};

template <int K, int Columns>
struct Shared {
  Triangle<K> triangle[Columns];
  float area[Columns];
};

// What the block's columns are to the backward and to the volumes; one thread each, before the block meets.
template <int K, int Columns>
__device__ void describe_column(const Pairs<K>& p, Shared<K, Columns>& shared, int index, int64_t column, bool keep) {
  Triangle<K> triangle = shared.triangle[index];
  if (p.unit) {
    float scale[K];
    scale_to_unit_length(triangle, scale);
#pragma unroll
    for (int l = 0; l < K; ++l) {
      if (keep) p.workspace.others_scale[l * p.Q + column] = scale[l];
    }
  }
  shared.area[index] = area(triangle);
  if (!keep) return;
  p.workspace.area[column] = shared.area[index];
  adjugate(triangle, p.workspace.adjugate + column * K * K);
}

// dL/dV_ij = (2 target_ij - p_ij - p'_ij) / (2 B temperature), p the softmax of its row and p' of its column.
__device__ float contrast_gradient(const Contrast& p, float grad, float volume, int64_t i, int64_t j, int64_t B) {
  const float temperature = *p.temperature, size = static_cast<float>(B);
  const float of_row = expf((p.statistics[i] - volume) / temperature) * p.statistics[B + i];
  const float of_column = expf((p.statistics[2 * B + j] - volume) / temperature) * p.statistics[3 * B + j];
  const float target = p.smoothing / size + (i == j ? 1.0f - p.smoothing : 0.0f);
  return grad * (2.0f * target - of_row - of_column) / (2.0f * size * temperature);
}

// Fills shared memory with channels from .. from + count of the basis of the block's columns, as
// [column][direction][chunk]; the workspace too if `keep`.
template <int Width, int K, int Columns>
__device__ void fill_basis(const Pairs<K>& p, const Shared<K, Columns>& shared, int64_t first_column, int64_t from,
                           int count, bool keep, float* basis) {
  const int packs = count / Width;
#pragma unroll(K <= 2 ? 2 : 1)  // four at once would spill on sm_120, beside the sums of the pairs
  for (int e = threadIdx.x; e < packs * Columns; e += kThreads) {
    const int column = e / packs, c = e % packs * Width;
    const bool real = first_column + column < p.Q;
    const int64_t row = real ? first_column + column : p.Q - 1;
    const float* vectors[K];
#pragma unroll
    for (int l = 0; l < K; ++l) vectors[l] = p.others[l] + row * p.stride + from;
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
// Vectors that are to have length 1 are read as they are: their directions are the same, areas and heights are scaled.
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
    for (int l = 0; l < K; ++l) vectors[l] = p.others[l] + row * p.stride;
    const Triangle<K> triangle = orthonormalise<Width, K>(vectors, p.C, lane);
    if (lane == 0) {
      shared.triangle[warp] = triangle;
      const int64_t column = first_column + warp;
      describe_column(p, shared, warp, column, backward && row_block == 0 && column < p.Q);
    }
  }
  if (p.contrast.temperature != nullptr && blockIdx.x + threadIdx.x == 0) {
    *p.contrast.grad_temperature = *p.grad * *p.contrast.slope;
  }
  __syncthreads();

  for (int tile = 0; tile < p.tiles; ++tile) {
    const int64_t first_row = (row_block * p.tiles + tile) * kTileRows + warp * kWarpRows;
    const float* rows[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) rows[r] = p.anchor + min(first_row + r, p.P - 1) * p.stride;

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
        vectors[l] = p.others[l] + other_row * p.stride;
        of_source[l] = __shfl_sync(kFullWarp, t[l], source);
      }
      const float residual =
          squared_residual<Width, K>(p.anchor + (first_row + source / Columns) * p.stride, vectors,
                                     shared.triangle[source % Columns], of_source, p.C, lane);
      if (lane == source) squared_height = residual;
    }

    if (!real) continue;
    const float scale = p.unit ? to_unit_length(square) : 1.0f;
    const float height = scale * sqrtf(squared_height < 0.0f ? 0.0f : squared_height);  // a NaN stays
    const float volume = shared.area[pair_column] * height;
    const int64_t pair = row * p.Q + column;
    if (backward) {
      // Below the rounding of |a| the direction of the residual is noise; the floor keeps its gradient bounded.
      const float floor = kEpsilon * scale * sqrtf(square);
      const float grad = p.contrast.temperature == nullptr
                             ? p.grad[pair]
                             : contrast_gradient(p.contrast, *p.grad, volume, row, column, p.P);
      if (p.unit && column == 0) p.workspace.anchor_scale[row] = scale;
      p.workspace.quotient[pair] = height == 0.0f ? 0.0f : grad / (height < floor ? floor : height);
      p.workspace.rise[pair] = grad * height;
#pragma unroll
      for (int l = 0; l < K; ++l) p.workspace.projections[l * p.P * p.Q + pair] = scale * t[l];
    } else {
      p.volume[pair] = volume;
    }
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
  const dim3 grid = grid_of(p.column_blocks * ceil_div(row_tiles, p.tiles));
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

struct Launch {
  const GramianPairs& p;
  cudaStream_t stream;

  template <int K>
  cudaError_t operator()() const {
    Pairs<K> pairs = {};
    pairs.anchor = p.anchor;
    pairs.volume = p.volume;
    pairs.grad = p.grad;
    pairs.workspace = p.workspace;
    pairs.contrast = p.contrast;
    pairs.P = p.P, pairs.Q = p.Q, pairs.C = p.C, pairs.stride = p.stride;
    pairs.unit = p.unit;
    bool wide = vectorizable<float>(p.anchor, p.C, p.stride) && vectorizable<float>(p.workspace.basis, p.C);
    for (int l = 0; l < K; ++l) {
      pairs.others[l] = p.others[l];
      wide = wide && vectorizable<float>(p.others[l], p.C, p.stride);
    }
    return launch_pairs<K>(pairs, wide, stream);
  }
};

}  // namespace

cudaError_t gramian_pairs(const GramianPairs& p, cudaStream_t stream) {
  return dispatch_others(p.k, Launch{p, stream});
}

cudaError_t gramian_volume(const GramianVolume& p, cudaStream_t stream) {
  if (p.P == 0 || p.Q == 0) return cudaSuccess;
  GramianPairs pairs = {};
  pairs.anchor = p.anchor, pairs.others = p.others.at, pairs.volume = p.volume;
  pairs.P = p.P, pairs.Q = p.Q, pairs.C = pairs.stride = p.C, pairs.k = p.others.k;
  return gramian_pairs(pairs, stream);
}

}  // namespace signal_reid
