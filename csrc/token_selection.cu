// Top-k token selection within and across modalities.
//
// One block serves one sample. It first brings the sample's 2M queries to shared memory as fp32. Then a warp takes four
// tokens at a time: each thread loads its 16 bytes of all four before using any, multiplies them with the M queries that rank
// these tokens, and the warp adds up. Scores stay in shared memory as unsigned integers of the same order, (query, modality,
// N): row q of query q holds the scores of its own tokens by intra_query, the other rows those by inter_query. At last one
// warp per list finds the k-th largest score bit by bit, and marks what is above it and the first of its equals.
//
// Tokens are read once (with more than four modalities, once per four of them, from cache after the first), queries
// once, the mask is written once; nothing else touches global memory. Results do not depend on the order of execution.
#include <algorithm>
#include <limits>

#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kThreads = 384;
constexpr int kTokensAtOnce = 4;
constexpr int kStepsAtOnce = 2;  // 8 loads of 16 bytes in flight per thread
constexpr int64_t kLargestSharedMemory = 227 * 1024;  // of any device; the launch refuses what exceeds this one's
constexpr int64_t kLargestSize = int64_t{1} << 20;    // keeps every product of sizes within 64 bits

template <int Size>
constexpr int kGroup = Size < 4 ? Size : 4;  // floats that one shared-memory load moves

// Columns of a query in shared memory, padded with zeros so that every lane has `Size` of them in every step.
template <int Size>
__host__ __device__ constexpr int64_t padded(int64_t C) { return ceil_div(C, kWarpSize * Size) * kWarpSize * Size; }

// Where column c of a query lies: a lane owns `Size` neighbouring columns, and the groups that the lanes of a warp load
// together are neighbours, so that no two fall into one bank.
template <int Size>
__device__ inline int place_of(int c) {
  constexpr int group = kGroup<Size>;
  const int step = c / (kWarpSize * Size), lane = c % (kWarpSize * Size) / Size, i = c % Size;
  return ((step * (Size / group) + i / group) * kWarpSize + lane) * group + i % group;
}

// An unsigned integer that orders as the score does: all NaN equal and above infinity, -0 equal to +0.
__device__ inline unsigned order_preserving(float score) {
  if (score != score) return 0xffffffffu;
  const unsigned bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Sums four values over the warp with six shuffles; lane l gets the sum of value l / 8.
__device__ inline float warp_sum_of_four(const float (&x)[4], int lane) {
  const bool upper_half = (lane & 16) != 0, upper_quarter = (lane & 8) != 0;
  float a = upper_half ? x[2] : x[0], b = upper_half ? x[3] : x[1];
  a += __shfl_xor_sync(kFullWarp, upper_half ? x[0] : x[2], 16);
  b += __shfl_xor_sync(kFullWarp, upper_half ? x[1] : x[3], 16);
  float sum = upper_quarter ? b : a;
  sum += __shfl_xor_sync(kFullWarp, upper_quarter ? a : b, 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  return sum;
}

template <class T, int Size, int Queries>
__device__ inline void accumulate(const Vector<T, Size> (&tokens)[kTokensAtOnce], const float* const (&queries)[Queries],
                                  int at, float (&sums)[Queries][kTokensAtOnce]) {
  constexpr int group = kGroup<Size>;
#pragma unroll
  for (int g = 0; g < Size / group; ++g) {
#pragma unroll
    for (int q = 0; q < Queries; ++q) {
      const auto weights = load_vector<group>(queries[q] + at + g * kWarpSize * group);
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
#pragma unroll
        for (int i = 0; i < group; ++i) sums[q][t] = fmaf(to_float(tokens[t].at[g * group + i]), weights.at[i], sums[q][t]);
      }
    }
  }
}

// Scores of four tokens of one modality by `Queries` queries; lane l gets those of token l / 8.
template <class T, int Size, int Queries>
__device__ inline void score_tokens(const T* const (&tokens)[kTokensAtOnce], const float* const (&queries)[Queries], int C,
                                    int lane, float (&scores)[Queries]) {
  float sums[Queries][kTokensAtOnce] = {};
#pragma unroll 1
  for (int step = 0; step * kWarpSize * Size < C; step += kStepsAtOnce) {
    Vector<T, Size> vectors[kStepsAtOnce][kTokensAtOnce];
#pragma unroll
    for (int s = 0; s < kStepsAtOnce; ++s) {
      const int c = ((step + s) * kWarpSize + lane) * Size;
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        if (c < C) vectors[s][t] = load_vector<Size>(tokens[t] + c);
      }
    }
#pragma unroll
    for (int s = 0; s < kStepsAtOnce; ++s) {
      const int c = ((step + s) * kWarpSize + lane) * Size;
      if (c < C) accumulate(vectors[s], queries, (step + s) * kWarpSize * Size + lane * kGroup<Size>, sums);
    }
  }
#pragma unroll
  for (int q = 0; q < Queries; ++q) scores[q] = warp_sum_of_four(sums[q], lane);
}

// The rows first..last - 1 but one of a query's scores: a list to select from.
struct Rows {
  const unsigned* scores;  // (M, N)
  int first, last, skipped, N;
};

// Calls visit(row, n, score, inside) for all scores in order of index, 32 neighbours of a row at a time.
template <class Visit>
__device__ inline void for_each_score(const Rows& rows, int lane, Visit visit) {
  for (int row = rows.first; row < rows.last; ++row) {
    if (row == rows.skipped) continue;
    for (int first = 0; first < rows.N; first += kWarpSize) {
      const int n = first + lane;
      const bool inside = n < rows.N;
      visit(row, n, inside ? rows.scores[row * rows.N + n] : 0u, inside);
    }
  }
}

// One warp marks the k largest scores of its rows in `kept`, (M, words), one bit per token.
__device__ inline void mark_largest(const Rows& rows, int k, unsigned* kept, int words, int lane) {
  // The largest threshold that at least k scores reach, found from its highest bit down.
  unsigned threshold = 0;
  for (unsigned bit = 0x80000000u; bit != 0; bit /= 2) {
    const unsigned candidate = threshold | bit;
    int reached = 0;
    for_each_score(rows, lane, [&](int, int, unsigned score, bool inside) {
      reached += __popc(__ballot_sync(kFullWarp, inside && score >= candidate));
    });
    if (reached >= k) threshold = candidate;
    if (reached == k) break;
  }
  int equals_wanted = k;
  for_each_score(rows, lane, [&](int, int, unsigned score, bool inside) {
    equals_wanted -= __popc(__ballot_sync(kFullWarp, inside && score > threshold));
  });
  for_each_score(rows, lane, [&](int row, int n, unsigned score, bool inside) {
    const unsigned equals = __ballot_sync(kFullWarp, inside && score == threshold);
    const bool early = __popc(equals & ((1u << lane) - 1u)) < equals_wanted;
    const unsigned keep = __ballot_sync(kFullWarp, inside && (score > threshold || (score == threshold && early)));
    equals_wanted -= __popc(equals);
    if (lane == 0) atomicOr(&kept[row * words + n / kWarpSize], keep);
  });
}

template <class T, int Size, int Queries>
__global__ void __launch_bounds__(kThreads, 1) select_tokens_kernel(TokenSelection p) {
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), C = static_cast<int>(p.C);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int columns = static_cast<int>(padded<Size>(C)), words = static_cast<int>(ceil_div(N, kWarpSize));
  const int64_t b = blockIdx.x;
  auto* queries = reinterpret_cast<float*>(dynamic_shared());          // (2M, columns), intra before inter
  auto* scores = reinterpret_cast<unsigned*>(queries + 2 * M * columns);  // (M queries, M, N)
  auto* kept = scores + M * M * N;                                        // (M, words)

  for (int row = 0; row < 2 * M; ++row) {
    const T* query = row < M ? static_cast<const T*>(p.intra_query) + b * p.intra_stride_b + row * p.intra_stride_m
                             : static_cast<const T*>(p.inter_query) + b * p.inter_stride_b + (row - M) * p.inter_stride_m;
    for (int c = threadIdx.x; c < columns; c += kThreads) {
      queries[row * columns + place_of<Size>(c)] = c < C ? to_float(query[c]) : 0.0f;
    }
  }
  for (int i = threadIdx.x; i < M * words; i += kThreads) kept[i] = 0;
  __syncthreads();

  const int tiles = static_cast<int>(ceil_div(N, kTokensAtOnce));
  for (int tile = warp; tile < M * tiles; tile += kThreads / kWarpSize) {
    const int m = tile / tiles, first = tile % tiles * kTokensAtOnce;
    const T* tokens[kTokensAtOnce];
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; ++t) {
      const int n = min(first + t, N - 1);
      tokens[t] = static_cast<const T*>(p.tokens) + b * p.tokens_stride_b + m * p.tokens_stride_m + n * p.tokens_stride_n;
    }
    const int n = first + lane / 8;
    for (int q0 = 0; q0 < M; q0 += Queries) {
      const float* ranking[Queries];
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
        const int q = min(q0 + i, M - 1);
        ranking[i] = queries + (q == m ? q : M + q) * columns;
      }
      float found[Queries];
      score_tokens<T, Size, Queries>(tokens, ranking, C, lane, found);
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
        if (lane % 8 == 0 && n < N && q0 + i < M) scores[((q0 + i) * M + m) * N + n] = order_preserving(found[i]);
      }
    }
  }
  __syncthreads();

  for (int list = warp; list < 2 * M; list += kThreads / kWarpSize) {
    const int q = list % M;
    const bool inter = list >= M;
    const Rows rows = {scores + q * M * N, inter ? 0 : q, inter ? M : q + 1, inter ? q : -1, N};
    mark_largest(rows, static_cast<int>(inter ? p.k_inter : p.k_intra), kept, words, lane);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < M * N; i += kThreads) {
    const int m = i / N, n = i % N;
    p.mask[b * M * N + i] = (kept[m * words + n / kWarpSize] >> (n % kWarpSize) & 1u) != 0;
  }
}

// Of the queries, the scores and one bit per token.
template <int Size>
int64_t shared_bytes(int64_t M, int64_t N, int64_t C) {
  const int64_t values = 2 * M * padded<Size>(C) + M * M * N + M * ceil_div(N, kWarpSize);
  return values * static_cast<int64_t>(sizeof(float));
}

template <class T>
int64_t most_shared_bytes(int64_t M, int64_t N, int64_t C) {
  return C % Vector<T>::size == 0 ? shared_bytes<Vector<T>::size>(M, N, C) : shared_bytes<1>(M, N, C);
}

template <class T, int Size, int Queries>
cudaError_t launch_select_tokens(const TokenSelection& p, cudaStream_t stream) {
  const int64_t bytes = shared_bytes<Size>(p.M, p.N, p.C);
  if (bytes > kLargestSharedMemory) return cudaErrorInvalidValue;
  return launch(select_tokens_kernel<T, Size, Queries>, grid_of(p.B), kThreads, static_cast<size_t>(bytes), stream, p);
}

struct Select {
  const TokenSelection& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    if (!vectorizable<T>(p.tokens, p.C, p.tokens_stride_b, p.tokens_stride_m, p.tokens_stride_n)) {
      return launch_select_tokens<T, 1, 4>(p, stream);
    }
    constexpr int size = Vector<T>::size;
    return p.M == 3 ? launch_select_tokens<T, size, 3>(p, stream) : launch_select_tokens<T, size, 4>(p, stream);
  }
};

}  // namespace

int64_t select_tokens_shared_bytes(int64_t M, int64_t N, int64_t C, DType dtype) {
  if (std::max({M, N, C}) > kLargestSize) return std::numeric_limits<int64_t>::max();
  return dtype == DType::float32 ? most_shared_bytes<float>(M, N, C) : most_shared_bytes<__half>(M, N, C);
}

cudaError_t select_tokens(const TokenSelection& p, cudaStream_t stream) {
  if (p.B == 0 || p.M == 0 || p.N == 0) return cudaSuccess;
  if (std::max({p.M, p.N, p.C}) > kLargestSize || p.B > kMostBlocks) return cudaErrorInvalidValue;
  if (p.k_intra < 0 || p.k_intra > p.N || p.k_inter < 0 || p.k_inter > (p.M - 1) * p.N) return cudaErrorInvalidValue;
  return dispatch_dtype(p.dtype, Select{p, stream});
}

}  // namespace signal_reid
