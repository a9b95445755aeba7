// Masked attention and its gradients in fp16 and bf16, on tensor cores; signal_reid/ops/reference has the maths.
//
// One block: one sample, or a share of its tokens where samples are few. One warp: 64 channels of everything, so that it
// alone reads the part of shared memory to which it copies its tokens, 32 at a time, while the 32 before are multiplied.
// Only the products over all channels, the logits of a tile or the gradient along its tokens, go from warp to warp: each
// leaves its share, and after a barrier a warp adds those of every eighth query, a token in each lane. The weights that it
// finds are rounded to 16 bits, as PyTorch does, and after another barrier every warp multiplies its channels with them.
// All other products and sums are in fp32. Tokens that are dropped are never read: each has the logit zero.
//
// The matrix of tokens, or its transpose, is always the first operand, of 16 rows, and the queries are the 8 columns of the
// second: 24 queries waste nothing, and a matrix of tokens is loaded once for all of them.
//
// A kept token is read once, in forward and backward; queries, and in the backward the gradient and what they attended to,
// once per block. Every result is written once, 16 bytes at a time. Split samples leave parts in the workspace, which a
// second launch adds up in their order (see masked_attention.cu). No atomics.
#include "masked_attention.cuh"
#include "tensor_cores.cuh"

namespace signal_reid {
namespace {

constexpr int kWarpChannels = 64;
constexpr int kSteps = kWarpChannels / 16;    // matrices of 16 channels that a warp has side by side
constexpr int kTokens = kWarpSize;            // of a tile: where logits are added up, a token is a lane's
constexpr int kRowBytes = kWarpChannels * 2;  // of a warp's part of a token
constexpr int kSliceBytes = 2 * kTokens * kRowBytes;  // this tile and the next
constexpr int kPartialStride = kTokens + 4;   // floats between queries: the lanes of a store fall in different banks
constexpr int kWeightStride = kTokens + 8;    // elements: eight rows of a matrix fall in different banks
constexpr int kSumStride = kWarpChannels + 4;
constexpr int kRounds = 2;                    // tokens of which a thread reads the mask at a time
constexpr int kMostListed = kRounds * kAttentionThreads;

// A warp's 64 channels of up to 64 rows. Chunk i of 16 bytes of row r lies at place i ^ r % 8, so that the eight rows of a
// matrix fall in different banks.
struct Slice {
  unsigned char* start;

  __device__ void* at(int row, int chunk) const { return start + row * kRowBytes + ((chunk ^ (row % 8)) * 16); }
};

// A token: its number in the sample, and where it lies behind the sample's first, counted in 16 bytes.
struct Listed {
  int token;
  unsigned offset;
};

// The block's dynamic shared memory; `Rows` are those of the weights, one per query, or two in the backward.
template <class T, int Queries, int Rows>
struct TensorCoreShared {
  unsigned char* slices;  // (warps with channels, 2 * 32 rows, 128 bytes)
  float* partial;         // (warps with channels, Queries, 36)
  float* factors;         // (Queries,)
  T* weights;             // (Rows, 40)
  Listed* listed;         // (512,)
  int* counts;            // (2, warps)

  __host__ __device__ static int warps(int64_t C) { return static_cast<int>(ceil_div(C, kWarpChannels)); }

  static size_t bytes(int64_t C) {
    const size_t of_warp = kSliceBytes + Queries * kPartialStride * sizeof(float);
    const size_t of_lists = kMostListed * sizeof(Listed) + kRounds * kAttentionWarps * sizeof(int);
    return warps(C) * of_warp + Queries * sizeof(float) + Rows * kWeightStride * sizeof(T) + of_lists;
  }

  __device__ explicit TensorCoreShared(int64_t C) {
    slices = dynamic_shared();
    partial = reinterpret_cast<float*>(slices + warps(C) * kSliceBytes);
    factors = partial + warps(C) * Queries * kPartialStride;
    weights = reinterpret_cast<T*>(factors + Queries);
    listed = reinterpret_cast<Listed*>(weights + Rows * kWeightStride);
    counts = reinterpret_cast<int*>(listed + kMostListed);
  }
};

// Lists the tokens from `first` on, 512 at most: the kept ones in order, then the dropped ones; returns how many are kept.
// Ends with a barrier.
template <class Parameters>
__device__ int list_tokens(const Parameters& p, const bool* mask, int first, int last, Listed* listed, int* counts) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  unsigned ballots[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int token = first + r * kAttentionThreads + threadIdx.x;
    ballots[r] = __ballot_sync(kFullWarp, token < last && mask[token]);
    if (lane == 0) counts[r * kAttentionWarps + warp] = __popc(ballots[r]);
  }
  __syncthreads();
  int before[kRounds] = {}, total = 0;
#pragma unroll 4
  for (int w = 0; w < kRounds * kAttentionWarps; ++w) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) before[r] += w < r * kAttentionWarps + warp ? counts[w] : 0;
    total += counts[w];
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int nth = r * kAttentionThreads + threadIdx.x, token = first + nth;
    const int kept_before = before[r] + __popc(ballots[r] & ((1u << lane) - 1u));
    const int place = (ballots[r] >> lane & 1u) != 0 ? kept_before : total + nth - kept_before;
    const int N = static_cast<int>(p.N);
    const int64_t offset = token / N * p.tokens_stride_m + token % N * p.tokens_stride_n;
    if (token < last) listed[place] = {token, static_cast<unsigned>(offset / 8)};
  }
  __syncthreads();
  return total;
}

// Starts to copy a warp's channels of Q rows to the rows of its slice from `to` on, zeros up to `Queries`.
template <int Queries, class T>
__device__ void copy_rows(const Slice& slice, int to, const T* source, int64_t stride, int Q, int C) {
  const int lane = threadIdx.x % kWarpSize, chunk = lane % 8;
  const int c = threadIdx.x / kWarpSize * kWarpChannels + chunk * 8;
#pragma unroll
  for (int q = lane / 8; q < Queries; q += 4) {
    const bool real = q < Q && c < C;
    copy_async(slice.at(to + q, chunk), real ? source + q * stride + c : source, real);
  }
}

// The same for tokens listed[first..count - 1], 32 at most, of one sample.
template <class T>
__device__ void copy_tile(const Slice& slice, int to, const T* tokens, const Listed* listed, int first, int count, int C) {
  const int lane = threadIdx.x % kWarpSize, chunk = lane % 8;
  const int c = threadIdx.x / kWarpSize * kWarpChannels + chunk * 8;
#pragma unroll 4  // more would cost registers
  for (int n = lane / 8; n < kTokens; n += 4) {
    const bool real = first + n < count && c < C;
    const unsigned offset = real ? listed[first + n].offset : 0;
    copy_async(slice.at(to + n, chunk), tokens + static_cast<uint64_t>(offset) * 8 + (real ? c : 0), real);
  }
}

// Queries in the rows of a slice from `from` on, as the columns that `multiply_rows` takes.
template <int Columns>
__device__ void load_columns(const Slice& slice, int from, unsigned (&columns)[kSteps][Columns][2]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int n = 0; n < Columns; ++n) {
#pragma unroll
    for (int k = 0; k < kSteps; k += 2) {
      unsigned matrix[4];
      load_matrices(matrix, slice.at(from + n * 8 + lane % 8, k * 2 + lane / 8));
#pragma unroll
      for (int i = 0; i < 4; ++i) columns[k + i / 2][n][i % 2] = matrix[i];
    }
  }
}

// The products of a tile's tokens with all queries over a warp's channels, to its part of `partial`.
template <class T, int Columns>
__device__ void multiply_rows(const Slice& slice, int from, const unsigned (&columns)[kSteps][Columns][2],
                              float* partial) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTokens; m += 16) {
    float sum[Columns][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      unsigned token[4];
      load_matrices(token, slice.at(from + m + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < Columns; ++n) multiply_add<T>(sum[n], token, columns[k][n][0], columns[k][n][1]);
    }
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) partial[(n * 8 + t * 2 + e % 2) * kPartialStride + m + g + e / 2 * 8] = sum[n][e];
    }
  }
}

// What `multiply_rows` left of query q and the token that is this lane's, added over the warps.
template <int Queries>
__device__ float product_of_lane(const float* partial, int q, int warps) {
  const int lane = threadIdx.x % kWarpSize;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) {
    sum += w < warps ? partial[(w * Queries + q) * kPartialStride + lane] : 0.0f;
  }
  return sum;
}

// sum (64 channels, queries) += tokens of a tile, transposed, times their weights (queries, 40).
template <class T, int Columns>
__device__ void add_weighted(const Slice& slice, int from, const T* weights, float (&sum)[kSteps][Columns][4]) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned weight[Columns][4];
#pragma unroll
  for (int n = 0; n < Columns; ++n) {
    load_matrices(weight[n], weights + (n * 8 + lane % 8) * kWeightStride + lane / 8 * 8);
  }
#pragma unroll
  for (int m = 0; m < kSteps; ++m) {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      unsigned token[4];
      load_matrices_transposed(token, slice.at(from + k * 16 + lane / 16 * 8 + lane % 8, m * 2 + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < Columns; ++n) multiply_add<T>(sum[m][n], token, weight[n][2 * k], weight[n][2 * k + 1]);
    }
  }
}

template <class T>
__device__ void store_chunk(T* to, const float* values) {
  constexpr int kWidth = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 8; i += kWidth) {
    Vector<T, kWidth> pack;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.at[k] = from_float<T>(values[i + k]);
    store_vector(to + i, pack);
  }
}

// Writes a warp's channels of sum to Q rows of C elements, by way of its slice.
template <class T, int Columns>
__device__ void store_sums(const Slice& slice, const float (&sum)[kSteps][Columns][4], T* rows, int Q, int C) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  float* staged = reinterpret_cast<float*>(slice.start);  // (queries, 68)
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kSteps; ++m) {
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) staged[(n * 8 + t * 2 + e % 2) * kSumStride + m * 16 + g + e / 2 * 8] = sum[m][n][e];
    }
  }
  __syncwarp();
  const int chunk = lane % 8, c = threadIdx.x / kWarpSize * kWarpChannels + chunk * 8;
  if (c >= C) return;
  for (int q = lane / 8; q < Q; q += 4) {
    store_chunk(rows + static_cast<int64_t>(q) * C + c, staged + q * kSumStride + chunk * 8);
  }
}

// The softmax so far of the queries that a warp watches over, q = warp, warp + 8, ...; a lane has the sum of its tokens.
template <class T, int Queries>
struct LaneSoftmax {
  static constexpr int kWatched = Queries / kAttentionWarps;
  float maximum[kWatched], sum[kWatched];

  __device__ LaneSoftmax() {
#pragma unroll
    for (int i = 0; i < kWatched; ++i) maximum[i] = -FLT_MAX, sum[i] = 0.0f;  // finite, so that no difference is NaN
  }

  // Takes the logits of a tile: writes their weights and the factor for what was summed before.
  __device__ void add(const MaskedAttention& p, int64_t b, const TensorCoreShared<T, Queries, Queries>& shared, int warps,
                      int first, int count) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const bool real = first + lane < count;
    const int token = real ? shared.listed[first + lane].token : 0;
#pragma unroll
    for (int i = 0; i < kWatched; ++i) {
      const int q = warp + i * kAttentionWarps;
      const float logit = product_of_lane<Queries>(shared.partial, q, warps);
      float highest = real ? logit : -FLT_MAX;
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
      }
      highest = fmaxf(highest, maximum[i]);
      const float weight = real ? expf(logit - highest) : 0.0f;
      const float factor = expf(maximum[i] - highest);
      sum[i] = sum[i] * factor + weight;
      maximum[i] = highest;
      shared.weights[q * kWeightStride + lane] = from_float<T>(weight);
      if (lane == 0) shared.factors[q] = factor;
      if (real && q < p.Q) p.logits[(b * p.Q + q) * logits_stride(p) + token] = logit;
    }
  }

  // Takes the tokens that were dropped; writes the softmax's maximum and sum, and the factors that the sums still want.
  __device__ void finish(const MaskedAttention& p, const Share& share, int dropped, float* factors) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int i = 0; i < kWatched; ++i) {
      const int q = warp + i * kAttentionWarps;
      const float highest = dropped > 0 ? fmaxf(maximum[i], 0.0f) : maximum[i];
      const float factor = expf(maximum[i] - highest);
      const float total = warp_sum(sum[i]) * factor + static_cast<float>(dropped) * expf(-highest);
      if (lane != 0) continue;
      factors[q] = p.splits > 1 ? factor : factor / total;
      if (q >= p.Q) continue;
      float* softmax = p.splits > 1 ? p.part_softmax + ((share.b * p.splits + share.split) * p.Q + q) * 2
                                    : p.logits + (share.b * p.Q + q) * logits_stride(p) + p.M * p.N;
      softmax[0] = highest;
      softmax[1] = total;
    }
  }
};

template <int Columns>
__device__ void scale_columns(const float* factors, float (&sum)[kSteps][Columns][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < Columns; ++n) {
    const auto factor = load_vector<2>(factors + n * 8 + t * 2);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][n][e] *= factor.at[e % 2];
    }
  }
}

// 16 queries leave registers for two blocks on a multiprocessor; 24 would spill.
template <class T, int Queries>
__global__ void __launch_bounds__(kAttentionThreads, Queries > 16 ? 1 : 2) attend_on_tensor_cores_kernel(MaskedAttention p) {
  constexpr int kColumns = Queries / 8;
  const TensorCoreShared<T, Queries, Queries> shared(p.C);
  const Share share = share_of_block(p);
  const int C = static_cast<int>(p.C), Q = static_cast<int>(p.Q);
  const int warp = threadIdx.x / kWarpSize, warps = shared.warps(C);
  const bool multiplies = warp < warps;
  const bool* mask = p.mask + share.b * p.M * p.N;
  const T* tokens = static_cast<const T*>(p.tokens) + share.b * p.tokens_stride_b;
  const Slice slice{shared.slices + warp * kSliceBytes};
  float* partial = shared.partial + warp * Queries * kPartialStride;

  if (multiplies) {
    copy_rows<Queries>(slice, 0, static_cast<const T*>(p.queries) + share.b * p.queries_stride_b, p.queries_stride_q, Q, C);
    commit_copies();
  }
  unsigned queries[kSteps][kColumns][2] = {};
  float sum[kSteps][kColumns][4] = {};
  LaneSoftmax<T, Queries> softmax;
  int dropped = share.last - share.first;
  int count = list_tokens(p, mask, share.first, share.last, shared.listed, shared.counts);
  if (multiplies) {
    wait_for_copies<0>();
    __syncwarp();
    load_columns<kColumns>(slice, 0, queries);
  }
  for (int listed = share.first;;) {
    dropped -= count;
    if (multiplies) {
      __syncwarp();
      if (count > 0) copy_tile(slice, 0, tokens, shared.listed, 0, count, C);
      commit_copies();
    }
#pragma unroll 1
    for (int first = 0; first < count; first += kTokens) {
      const int here = first % (2 * kTokens);
      if (multiplies) {
        __syncwarp();  // the warp has read the tile before
        const int next = first + kTokens;
        if (next < count) copy_tile(slice, kTokens - here, tokens, shared.listed, next, count, C);
        commit_copies();
        wait_for_copies<1>();
        __syncwarp();
        multiply_rows<T>(slice, here, queries, partial);
      }
      __syncthreads();
      softmax.add(p, share.b, shared, warps, first, count);
      __syncthreads();
      if (multiplies) {
        scale_columns(shared.factors, sum);
        add_weighted(slice, here, shared.weights, sum);
      }
    }
    listed += kMostListed;
    if (listed >= share.last) break;
    count = list_tokens(p, mask, listed, share.last, shared.listed, shared.counts);
  }
  __syncthreads();  // the factors of the last tile have been read
  softmax.finish(p, share, dropped, shared.factors);
  __syncthreads();
  if (!multiplies) return;
  scale_columns(shared.factors, sum);
  if (p.splits > 1) {
    store_sums(slice, sum, p.parts + (share.b * p.splits + share.split) * Q * C, Q, C);
  } else {
    store_sums(slice, sum, static_cast<T*>(p.attended) + share.b * Q * C, Q, C);
  }
}

// What belongs to the queries that a warp watches over, q = warp, warp + 8, ..., in the backward.
template <class T, int Queries>
struct LaneGradients {
  static constexpr int kWatched = Queries / kAttentionWarps;
  float mean[kWatched];                     // sum_n p_n dp_n = dz . z
  float maximum[kWatched], sum[kWatched];   // of the softmax
  float logit[kWatched];                    // of this lane's token in the tile

  __device__ LaneGradients(const MaskedAttentionBackward& p, int64_t b) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int C = static_cast<int>(p.C);
#pragma unroll
    for (int i = 0; i < kWatched; ++i) {
      const int q = warp + i * kAttentionWarps;
      mean[i] = maximum[i] = 0.0f, sum[i] = 1.0f;
      if (q >= p.Q) continue;
      const T* attended = static_cast<const T*>(p.attended) + (b * p.Q + q) * C;
      const T* grad = static_cast<const T*>(p.grad) + b * p.grad_stride_b + q * p.grad_stride_q;
      for (int c = lane * 8; c < C; c += kWarpSize * 8) {
        const auto z = load_vector(attended + c), dz = load_vector(grad + c);
#pragma unroll
        for (int k = 0; k < 8; ++k) mean[i] = fmaf(element(dz, k), element(z, k), mean[i]);
      }
      mean[i] = warp_sum(mean[i]);
      const float* softmax = p.logits + (b * p.Q + q) * logits_stride(p) + p.M * p.N;
      maximum[i] = softmax[0], sum[i] = softmax[1];
    }
  }

  __device__ void fetch(const MaskedAttentionBackward& p, int64_t b, const Listed* listed, int first, int count) {
    const int n = first + threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int token = n < count ? listed[n].token : 0;
#pragma unroll
    for (int i = 0; i < kWatched; ++i) {
      const int q = warp + i * kAttentionWarps;
      logit[i] = n < count && q < p.Q ? p.logits[(b * p.Q + q) * logits_stride(p) + token] : 0.0f;
    }
  }

  // Writes ds, then p, of a tile, zeros where there is no token or query.
  __device__ void write(const TensorCoreShared<T, Queries, 2 * Queries>& shared, int warps, int first, int count,
                        int64_t Q) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int i = 0; i < kWatched; ++i) {
      const int q = warp + i * kAttentionWarps;
      const float along = product_of_lane<Queries>(shared.partial, q, warps);
      const bool real = first + lane < count && q < Q;
      const float weight = real ? expf(logit[i] - maximum[i]) / sum[i] : 0.0f;
      shared.weights[q * kWeightStride + lane] = from_float<T>(real ? weight * (along - mean[i]) : 0.0f);
      shared.weights[(Queries + q) * kWeightStride + lane] = from_float<T>(weight);
    }
  }
};

// Zeros for the tokens that were dropped, listed[kept..total - 1].
template <class T>
__device__ void zero_listed(const Listed* listed, int kept, int total, int C, T* grad_tokens) {
  const int chunks = C / 8;
  for (int e = threadIdx.x; e < (total - kept) * chunks; e += kAttentionThreads) {
    T* row = grad_tokens + static_cast<int64_t>(listed[kept + e / chunks].token) * C;
    store_vector(row + e % chunks * 8, Vector<T>{});
  }
}

// A warp's channels of [queries; gradient], 2 * Queries rows of its slice, as the second operand of `grad_of_tile`: step k
// of 16 rows, 16 channels.
template <int Rows>
__device__ void load_pairs(const Slice& slice, unsigned (&pairs)[Rows / 16][kSteps][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < Rows / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      load_matrices_transposed(pairs[k][n], slice.at(k * 16 + lane % 16, n * 2 + lane / 16));
    }
  }
}

// dtoken = ds u + p dz of a tile, which takes the place of the tokens in the warp's slice.
template <class T, int Rows>
__device__ void grad_of_tile(const Slice& slice, int to, const T* weights, const unsigned (&pairs)[Rows / 16][kSteps][4]) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTokens; m += 16) {
    unsigned weight[Rows / 16][4];
#pragma unroll
    for (int k = 0; k < Rows / 16; ++k) {
      const int row = k * 16 + lane / 16 * 8 + lane % 8;
      load_matrices_transposed(weight[k], weights + row * kWeightStride + m + lane / 8 % 2 * 8);
    }
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
      float grad[4] = {};
#pragma unroll
      for (int k = 0; k < Rows / 16; ++k) {
        multiply_add<T>(grad, weight[k], pairs[k][n / 2][n % 2 * 2], pairs[k][n / 2][n % 2 * 2 + 1]);
      }
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        Vector<T, 2> pack;
        pack.at[0] = from_float<T>(grad[e]), pack.at[1] = from_float<T>(grad[e + 1]);
        store_vector(static_cast<T*>(slice.at(to + m + g + e * 4, n)) + t * 2, pack);
      }
    }
  }
}

template <class T>
__device__ void store_tile(const Slice& slice, int from, const Listed* listed, int first, int count, int C,
                           T* grad_tokens) {
  const int lane = threadIdx.x % kWarpSize, chunk = lane % 8;
  const int c = threadIdx.x / kWarpSize * kWarpChannels + chunk * 8;
  if (c >= C) return;
#pragma unroll
  for (int n = lane / 8; n < kTokens; n += 4) {
    if (first + n >= count) continue;
    T* row = grad_tokens + static_cast<int64_t>(listed[first + n].token) * C;
    store_vector(row + c, load_vector(static_cast<const T*>(slice.at(from + n, chunk))));
  }
}

template <class T, int Queries>
__global__ void __launch_bounds__(kAttentionThreads, 1) attend_backward_on_tensor_cores_kernel(MaskedAttentionBackward p) {
  constexpr int kColumns = Queries / 8, kRows = 2 * Queries;
  const TensorCoreShared<T, Queries, kRows> shared(p.C);
  const Share share = share_of_block(p);
  const int C = static_cast<int>(p.C), Q = static_cast<int>(p.Q);
  const int warp = threadIdx.x / kWarpSize, warps = shared.warps(C);
  const bool multiplies = warp < warps;
  const bool* mask = p.mask + share.b * p.M * p.N;
  const T* tokens = static_cast<const T*>(p.tokens) + share.b * p.tokens_stride_b;
  T* grad_tokens = static_cast<T*>(p.grad_tokens) + share.b * p.M * p.N * C;
  const Slice slice{shared.slices + warp * kSliceBytes};
  float* partial = shared.partial + warp * Queries * kPartialStride;

  if (multiplies) {
    copy_rows<Queries>(slice, 0, static_cast<const T*>(p.queries) + share.b * p.queries_stride_b, p.queries_stride_q, Q, C);
    copy_rows<Queries>(slice, Queries, static_cast<const T*>(p.grad) + share.b * p.grad_stride_b, p.grad_stride_q, Q, C);
    commit_copies();
  }
  LaneGradients<T, Queries> watched(p, share.b);
  unsigned grads[kSteps][kColumns][2] = {}, pairs[kRows / 16][kSteps][4] = {};
  float sum[kSteps][kColumns][4] = {};
  int count = list_tokens(p, mask, share.first, share.last, shared.listed, shared.counts);
  if (multiplies) {
    wait_for_copies<0>();
    __syncwarp();
    load_columns<kColumns>(slice, Queries, grads);
    load_pairs<kRows>(slice, pairs);
  }
  for (int listed = share.first;;) {
    if (multiplies) {
      __syncwarp();
      if (count > 0) copy_tile(slice, 0, tokens, shared.listed, 0, count, C);
      commit_copies();
    }
    zero_listed(shared.listed, count, min(share.last - listed, kMostListed), C, grad_tokens);
#pragma unroll 1
    for (int first = 0; first < count; first += kTokens) {
      const int here = first % (2 * kTokens);
      watched.fetch(p, share.b, shared.listed, first, count);
      if (multiplies) {
        __syncwarp();  // the warp has read the tile before, and stored its gradient
        const int next = first + kTokens;
        if (next < count) copy_tile(slice, kTokens - here, tokens, shared.listed, next, count, C);
        commit_copies();
        wait_for_copies<1>();
        __syncwarp();
        multiply_rows<T>(slice, here, grads, partial);
      }
      __syncthreads();
      watched.write(shared, warps, first, count, Q);
      __syncthreads();
      if (multiplies) {
        add_weighted(slice, here, shared.weights, sum);
        __syncwarp();  // the warp has read the tokens
        grad_of_tile<T, kRows>(slice, here, shared.weights, pairs);
        __syncwarp();
        store_tile(slice, here, shared.listed, first, count, C, grad_tokens);
      }
    }
    listed += kMostListed;
    if (listed >= share.last) break;
    count = list_tokens(p, mask, listed, share.last, shared.listed, shared.counts);
  }
  if (!multiplies) return;
  if (p.splits > 1) {
    store_sums(slice, sum, p.parts + (share.b * p.splits + share.split) * Q * C, Q, C);
  } else {
    store_sums(slice, sum, static_cast<T*>(p.grad_queries) + share.b * Q * C, Q, C);
  }
}

struct AttendOnTensorCores {
  const MaskedAttention& p;
  cudaStream_t stream;

  template <class T, int, int Queries>
  cudaError_t operator()() const {
    return launch(attend_on_tensor_cores_kernel<T, Queries>, grid_of(p.B * p.splits), kAttentionThreads,
                  TensorCoreShared<T, Queries, Queries>::bytes(p.C), stream, p);
  }
};

struct BackwardOnTensorCores {
  const MaskedAttentionBackward& p;
  cudaStream_t stream;

  template <class T, int, int Queries>
  cudaError_t operator()() const {
    return launch(attend_backward_on_tensor_cores_kernel<T, Queries>, grid_of(p.B * p.splits), kAttentionThreads,
                  TensorCoreShared<T, Queries, 2 * Queries>::bytes(p.C), stream, p);
  }
};

template <class Body>
cudaError_t dispatch_low_precision(DType dtype, int64_t Q, Body body) {
  return dtype == DType::float16 ? dispatch_queries<__half, 8>(Q, body) : dispatch_queries<__nv_bfloat16, 8>(Q, body);
}

}  // namespace

cudaError_t attend_on_tensor_cores(const MaskedAttention& p, cudaStream_t stream) {
  return dispatch_low_precision(p.dtype, p.Q, AttendOnTensorCores{p, stream});
}

cudaError_t attend_backward_on_tensor_cores(const MaskedAttentionBackward& p, cudaStream_t stream) {
  return dispatch_low_precision(p.dtype, p.Q, BackwardOnTensorCores{p, stream});
}

}  // namespace signal_reid
