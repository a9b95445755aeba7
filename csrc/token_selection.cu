// Top-k token selection within and across modalities.
//
// One block serves one sample, or where samples are few, a share of one. It first brings the sample's 2M queries to shared
// memory as fp32, 16 bytes at a time. Then a warp takes four tokens at a time: each thread loads its 16 bytes of all four
// before using any, multiplies them with the M queries that rank these tokens, and the warp adds up. Scores stay in shared
// memory as unsigned integers of the same order, (query, modality, N): row q of query q holds the scores of its own tokens by
// intra_query, the other rows those by inter_query. At last one warp per list holds it in registers, eight scores a lane, and
// finds its k-th largest bit by bit with one sum over the warp a bit; every thread then compares the scores of a token with
// the thresholds of the M lists that have it. Of a sample that several blocks share, the scores go to global memory instead,
// and a second launch, a block per sample, does the last part.
//
// Tokens are read once (with more than three modalities, once per three of them, from cache after the first), queries
// once per block, the mask is written once. Nothing else touches global memory but the scores of a shared sample, which are
// written and read once. Results depend neither on the order of execution nor on the number of blocks. What bounds it is
// memory: a token of 3 modalities and 512 channels in fp32 is 2,048 bytes for 1,536 multiply-adds, 16 bytes for 12.
#include <algorithm>
#include <limits>

#include "ops.h"
#include "simt.cuh"

namespace signal_reid {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kQueries = 3;  // that a warp multiplies its tokens with at a time
constexpr int kHeld = 8;     // scores of a list that a lane keeps in registers
constexpr int kTokensAtOnce = 4;
constexpr int kStepsAtOnce = 2;  // 8 loads of 16 bytes in flight per thread
constexpr int64_t kLargestSharedMemory = 227 * 1024;  // of any device; the launch refuses what exceeds this one's
constexpr int64_t kLargestSize = int64_t{1} << 20;    // keeps every product of sizes within 64 bits

// Blocks on a multiprocessor at least, so that some load tokens while others search: as many as fit without a spill, which
// leaves tokens of 4 bytes 80 registers a thread and those of 2, whose conversion needs more, 128.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;

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

template <class T, int Size>
__device__ inline void accumulate(const Vector<T, Size> (&tokens)[kTokensAtOnce], const float* const (&queries)[kQueries],
                                  int at, float (&sums)[kQueries][kTokensAtOnce]) {
  constexpr int group = kGroup<Size>;
#pragma unroll
  for (int g = 0; g < Size / group; ++g) {
    Vector<float, group> weights[kQueries];
#pragma unroll
    for (int q = 0; q < kQueries; ++q) weights[q] = load_vector<group>(queries[q] + at + g * kWarpSize * group);
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; ++t) {
#pragma unroll
      for (int i = 0; i < group; ++i) {
        const float x = element(tokens[t], g * group + i);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) sums[q][t] = fmaf(x, weights[q].at[i], sums[q][t]);
      }
    }
  }
}

// Scores by three queries of four tokens from `first` on, the last one again beyond `last`; lane l gets those of token l / 8.
// Addresses are made at each load: four of them kept would cost the registers that let three blocks fit.
template <class T, int Size>
__device__ inline void score_tokens(const T* tokens, int64_t stride, int first, int last,
                                    const float* const (&queries)[kQueries], int C, int lane, float (&scores)[kQueries]) {
  float sums[kQueries][kTokensAtOnce] = {};
#pragma unroll 1
  for (int step = 0; step * kWarpSize * Size < C; step += kStepsAtOnce) {
    Vector<T, Size> vectors[kStepsAtOnce][kTokensAtOnce];
#pragma unroll
    for (int s = 0; s < kStepsAtOnce; ++s) {
      const int c = ((step + s) * kWarpSize + lane) * Size;
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        if (c < C) vectors[s][t] = load_vector<Size>(tokens + min(first + t, last) * stride + c);
      }
    }
#pragma unroll
    for (int s = 0; s < kStepsAtOnce; ++s) {
      const int c = ((step + s) * kWarpSize + lane) * Size;
      if (c < C) accumulate(vectors[s], queries, (step + s) * kWarpSize * Size + lane * kGroup<Size>, sums);
    }
  }
#pragma unroll
  for (int q = 0; q < kQueries; ++q) scores[q] = warp_sum_of_four(sums[q], lane);
}

// A row of a query's scores, or all rows but one: a list to select from. Item i is score i, from `skip_from` on i + skipped.
struct List {
  const unsigned* scores;
  int size, skip_from, skipped;

  // 0, which no score is, beyond the end.
  __device__ unsigned at(int i) const { return i < size ? scores[i < skip_from ? i : i + skipped] : 0u; }
};

// What a list keeps: every score above the threshold, and of those that equal it the ones before item `end`.
struct Cut {
  unsigned threshold;
  int end;

  __device__ bool keeps(unsigned score, int item) const {
    return score > threshold || (score == threshold && item < end);
  }
};

// A lane's share of 256 items of a list: every 32nd from `first` + lane on.
struct Held {
  unsigned at[kHeld];

  __device__ Held(const List& list, int first, int lane) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) at[j] = list.at(first + j * kWarpSize + lane);
  }

  // How many are no less than a threshold, which is not 0.
  __device__ int reaching(unsigned threshold) const {
    int count = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) count += at[j] >= threshold;
    return count;
  }
};

// How many scores of a list reach a threshold. The first 256 are in registers, longer lists are read again.
__device__ inline int reaching(const List& list, const Held& held, unsigned threshold, int lane) {
  int count = held.reaching(threshold);
#pragma unroll 1
  for (int first = kHeld * kWarpSize; first < list.size; first += kHeld * kWarpSize) {
    count += Held(list, first, lane).reaching(threshold);
  }
  return warp_sum(count);
}

// The end of the first `wanted` scores that equal a threshold, of which there are more.
__device__ inline int end_of_equals(const List& list, unsigned threshold, int wanted, int lane) {
  int end = 0;
#pragma unroll 1
  for (int first = 0; first < list.size && wanted > 0; first += kWarpSize) {
    const bool equal = list.at(first + lane) == threshold;
    const unsigned equals = __ballot_sync(kFullWarp, equal);
    if (equal && __popc(equals & ((1u << lane) - 1u)) < wanted) end = first + lane + 1;
    wanted -= __popc(equals);
  }
  return warp_max(end);
}

// One warp finds what the k largest of a list are.
__device__ inline Cut cut_after(const List& list, int k, int lane) {
  const Held held(list, 0, lane);
  // The largest threshold that at least k scores reach, found from its highest bit down.
  unsigned threshold = 0;
  for (unsigned bit = 0x80000000u; bit != 0; bit /= 2) {
    const int reached = reaching(list, held, threshold | bit, lane);
    if (reached >= k) threshold |= bit;
    if (reached == k) return {threshold, list.size};
  }
  const int above = threshold == 0xffffffffu ? 0 : reaching(list, held, threshold + 1, lane);
  return {threshold, end_of_equals(list, threshold, k - above, lane)};
}

// Writes the mask of one sample from its scores in shared memory.
__device__ inline void select_from_scores(const TokenSelection& p, int64_t b, const unsigned* scores, Cut* cuts) {
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), tokens = M * N;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int l = warp; l < 2 * M; l += kWarps) {
    const int q = l % M;
    const bool inter = l >= M;
    const List list = inter ? List{scores + q * tokens, tokens - N, q * N, N} : List{scores + q * tokens + q * N, N, N, 0};
    const Cut cut = cut_after(list, static_cast<int>(inter ? p.k_inter : p.k_intra), lane);
    if (lane == 0) cuts[l] = cut;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    const int m = i / N;
    bool keep = cuts[m].keeps(scores[m * tokens + i], i - m * N);
    for (int q = 0; q < M; ++q) {
      keep = keep || (q != m && cuts[M + q].keeps(scores[q * tokens + i], m < q ? i : i - N));
    }
    p.mask[b * tokens + i] = keep;
  }
}

// Row `row` of a sample's 2M queries, intra before inter.
template <class T>
__device__ inline const T* query_row(const TokenSelection& p, int64_t b, int row) {
  const bool inter = row >= p.M;
  const auto* queries = static_cast<const T*>(inter ? p.inter_query : p.intra_query);
  const int64_t stride_b = inter ? p.inter_stride_b : p.intra_stride_b, stride_m = inter ? p.inter_stride_m : p.intra_stride_m;
  return queries + b * stride_b + (inter ? row - p.M : row) * stride_m;
}

// Brings the 2M queries of a sample to shared memory; a thread loads three vectors before it stores any.
template <class T, int Size>
__device__ inline void stage_queries(const TokenSelection& p, int64_t b, float* queries) {
  constexpr int group = kGroup<Size>, at_once = 3;
  const int C = static_cast<int>(p.C), columns = static_cast<int>(padded<Size>(C));
  const int each = columns / Size, vectors = 2 * static_cast<int>(p.M) * each;
  for (int first = threadIdx.x; first < vectors; first += at_once * kThreads) {
    Vector<T, Size> vector[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int v = first + k * kThreads, c = v % each * Size;
      vector[k] = {};
      if (v < vectors && c < C) vector[k] = load_vector<Size>(query_row<T>(p, b, v / each) + c);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int v = first + k * kThreads, c = v % each * Size;
      if (v >= vectors) break;
#pragma unroll
      for (int i = 0; i < Size; i += group) {
        Vector<float, group> pack;
#pragma unroll
        for (int j = 0; j < group; ++j) pack.at[j] = element(vector[k], i + j);
        store_vector(queries + v / each * columns + place_of<Size>(c + i), pack);
      }
    }
  }
}

template <class T, int Size>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) select_tokens_kernel(TokenSelection p) {
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), C = static_cast<int>(p.C), tokens_of_all = M * N;
  const int splits = static_cast<int>(p.splits), split = static_cast<int>(blockIdx.x) % splits;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int columns = static_cast<int>(padded<Size>(C));
  const int64_t b = blockIdx.x / static_cast<unsigned>(splits);
  auto* queries = reinterpret_cast<float*>(dynamic_shared());       // (2M, columns), intra before inter
  auto* cuts = reinterpret_cast<Cut*>(queries + 2 * M * columns);  // (2M,)
  auto* scores = reinterpret_cast<unsigned*>(cuts + 2 * M);        // (M queries, M, N)

  stage_queries<T, Size>(p, b, queries);
  __syncthreads();

  const int tiles = static_cast<int>(ceil_div(N, kTokensAtOnce));
  for (int tile = split * kWarps + warp; tile < M * tiles; tile += splits * kWarps) {
    const int m = tile / tiles, first = tile % tiles * kTokensAtOnce;
    const T* tokens = static_cast<const T*>(p.tokens) + b * p.tokens_stride_b + m * p.tokens_stride_m;
    const int n = first + lane / 8;
    for (int q0 = 0; q0 < M; q0 += kQueries) {
      const float* ranking[kQueries];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const int q = min(q0 + i, M - 1);
        ranking[i] = queries + (q == m ? q : M + q) * columns;
      }
      float found[kQueries];
      score_tokens<T, Size>(tokens, p.tokens_stride_n, first, N - 1, ranking, C, lane, found);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (lane % 8 != 0 || n >= N || q0 + i >= M) continue;
        const int at = (q0 + i) * tokens_of_all + m * N + n;
        const unsigned score = order_preserving(found[i]);
        if (splits > 1) {
          p.scores[b * M * tokens_of_all + at] = score;
        } else {
          scores[at] = score;
        }
      }
    }
  }
  if (splits > 1) return;
  __syncthreads();
  select_from_scores(p, b, scores, cuts);
}

// The second launch where several blocks share a sample: one block selects from the scores of one sample.
__global__ void __launch_bounds__(kThreads) select_from_scores_kernel(TokenSelection p) {
  const int M = static_cast<int>(p.M), all = static_cast<int>(p.M * p.M * p.N);
  const int64_t b = blockIdx.x;
  auto* cuts = reinterpret_cast<Cut*>(dynamic_shared());     // (2M,)
  auto* scores = reinterpret_cast<unsigned*>(cuts + 2 * M);  // (M queries, M, N)
#pragma unroll 4
  for (int i = threadIdx.x; i < all; i += kThreads) scores[i] = p.scores[b * all + i];
  __syncthreads();
  select_from_scores(p, b, scores, cuts);
}

// Of the scores and what each list keeps.
int64_t scores_bytes(int64_t M, int64_t N) {
  return M * M * N * static_cast<int64_t>(sizeof(unsigned)) + 2 * M * static_cast<int64_t>(sizeof(Cut));
}

// The same with the queries.
template <int Size>
int64_t shared_bytes(int64_t M, int64_t N, int64_t C) {
  return 2 * M * padded<Size>(C) * static_cast<int64_t>(sizeof(float)) + scores_bytes(M, N);
}

template <class T>
int64_t most_shared_bytes(int64_t M, int64_t N, int64_t C) {
  return C % Vector<T>::size == 0 ? shared_bytes<Vector<T>::size>(M, N, C) : shared_bytes<1>(M, N, C);
}

template <class T, int Size>
cudaError_t launch_select_tokens(const TokenSelection& p, cudaStream_t stream) {
  const int64_t bytes = shared_bytes<Size>(p.M, p.N, p.C);
  if (bytes > kLargestSharedMemory) return cudaErrorInvalidValue;
  return launch(select_tokens_kernel<T, Size>, grid_of(p.B * p.splits), kThreads, static_cast<size_t>(bytes), stream, p);
}

struct Select {
  const TokenSelection& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const bool wide = vectorizable<T>(p.tokens, p.C, p.tokens_stride_b, p.tokens_stride_m, p.tokens_stride_n) &&
                      vectorizable<T>(p.intra_query, p.C, p.intra_stride_b, p.intra_stride_m) &&
                      vectorizable<T>(p.inter_query, p.C, p.inter_stride_b, p.inter_stride_m);
    return wide ? launch_select_tokens<T, Vector<T>::size>(p, stream) : launch_select_tokens<T, 1>(p, stream);
  }
};

}  // namespace

int64_t select_tokens_shared_bytes(int64_t M, int64_t N, int64_t C, DType dtype) {
  if (std::max({M, N, C}) > kLargestSize) return std::numeric_limits<int64_t>::max();
  return dtype == DType::float32 ? most_shared_bytes<float>(M, N, C) : most_shared_bytes<__half>(M, N, C);
}

cudaError_t select_tokens(const TokenSelection& p, cudaStream_t stream) {
  if (p.B == 0 || p.M == 0 || p.N == 0) return cudaSuccess;
  if (std::max({p.M, p.N, p.C, p.splits}) > kLargestSize || p.splits < 1) return cudaErrorInvalidValue;
  if (p.B > kMostBlocks / p.splits) return cudaErrorInvalidValue;
  if (p.k_intra < 0 || p.k_intra > p.N || p.k_inter < 0 || p.k_inter > (p.M - 1) * p.N) return cudaErrorInvalidValue;
  const cudaError_t status = dispatch_dtype(p.dtype, Select{p, stream});
  if (status != cudaSuccess || p.splits == 1) return status;
  return launch(select_from_scores_kernel, grid_of(p.B), kThreads, static_cast<size_t>(scores_bytes(p.M, p.N)), stream, p);
}

}  // namespace signal_reid
