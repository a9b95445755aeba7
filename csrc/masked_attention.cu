// Attention of few queries over the tokens of all modalities times their mask; signal_reid/ops/reference has the maths. This
// kernel is that of fp32, and of fp16 and bf16 off 16 bytes; the others have masked_attention_tensor_cores.cu.
//
// One block: one sample, or a share of its tokens where samples are few. It lists the tokens that are kept and passes over
// them 16 at a time with a softmax that is corrected as it goes: the next 16 are on their way to registers while these are
// multiplied from shared memory. One thread: a quarter of the logits of a tile over a 16th of the channels; then four
// channels of half of the queries' sums, in registers. Tokens that are dropped are never read: each has the logit zero, so
// together they add their number times exp(0 - maximum) to the sum of the softmax, and nothing else.
//
// A kept token is read once, a query once per block, z written once, and for the backward the logits of kept tokens and
// the maximum and the sum of every query's softmax. Split samples leave their parts in the workspace, and a second launch adds these up in
// their order. No atomics. What bounds it is arithmetic: 4 operations per query, kept token and channel, in fp32 by the
// multiply-add pipe, whose operands come from shared memory at 10 to 12 products a load of 16 bytes. For 24 queries that
// takes longer than reading the tokens of 2 bytes does, and about as long as reading those of 4.
#include "masked_attention.cuh"

namespace signal_reid {
namespace {

template <int Queries>
struct ForwardShared {
  float *queries, *tokens, *products, *weights, *factors;
  int *kept, *counts;

  static size_t bytes(int64_t C) {
    const int64_t floats = (Queries + kTile) * stride_of(C) + (kAttentionWarps + 1) * Queries * kTile + Queries;
    return (floats + kListed + kAttentionWarps) * sizeof(float);
  }

  __device__ explicit ForwardShared(int64_t C) {
    queries = reinterpret_cast<float*>(dynamic_shared());  // (Queries, stride)
    tokens = queries + Queries * stride_of(C);             // (16, stride)
    products = tokens + kTile * stride_of(C);              // (warps, Queries, 16)
    weights = products + kAttentionWarps * Queries * kTile;  // (Queries, 16)
    factors = weights + Queries * kTile;                     // (Queries,), of what was summed before
    kept = reinterpret_cast<int*>(factors + Queries);
    counts = kept + kListed;
  }
};

// The softmax so far of the queries that a warp watches over, q = warp, warp + 8, ...
template <int Queries>
struct Softmax {
  static constexpr int kWatched = Queries / kAttentionWarps;
  float maximum[kWatched], sum[kWatched];

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kWatched; ++i) maximum[i] = -FLT_MAX, sum[i] = 0.0f;  // finite, so that no difference is NaN
  }

  // Takes the logits of a tile: writes their weights and the factor for what was summed before.
  __device__ void add(const MaskedAttention& p, int64_t b, const ForwardShared<Queries>& shared, int first, int count) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int n = lane % kTile;
    const bool real = first + n < count;
#pragma unroll
    for (int i = 0; i < kWatched; ++i) {
      const int q = warp + i * kAttentionWarps;
      const float logit = product<Queries>(shared.products, q);
      float highest = real ? logit : -FLT_MAX;
#pragma unroll
      for (int offset = kTile / 2; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
      }
      highest = fmaxf(highest, maximum[i]);
      const float weight = real ? expf(logit - highest) : 0.0f;
      float total = weight;
#pragma unroll
      for (int offset = kTile / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kFullWarp, total, offset);
      const float factor = expf(maximum[i] - highest);
      sum[i] = sum[i] * factor + total;
      maximum[i] = highest;
      if (lane < kTile) shared.weights[q * kTile + n] = weight;
      if (lane == 0) shared.factors[q] = factor;
      if (lane < kTile && real && q < p.Q) {
        p.logits[(b * p.Q + q) * logits_stride(p) + shared.kept[first + n]] = logit;
      }
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
      const float total = sum[i] * factor + static_cast<float>(dropped) * expf(-highest);
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

template <class T, int Width, int Queries>
__global__ void __launch_bounds__(kAttentionThreads, 1) attend_masked_kernel(MaskedAttention p) {
  constexpr int kOwned = Queries / 2;  // sums of a thread, four channels each
  const ForwardShared<Queries> shared(p.C);
  const Share share = share_of_block(p);
  const int C = static_cast<int>(p.C), Q = static_cast<int>(p.Q), stride = stride_of(p.C);
  const bool* mask = p.mask + share.b * p.M * p.N;
  const int c = threadIdx.x % (kAttentionThreads / 2) * 4, q0 = threadIdx.x / (kAttentionThreads / 2) * kOwned;
  const bool owner = c < padded_channels(C);

  stage_rows<T, Width, Queries>(static_cast<const T*>(p.queries) + share.b * p.queries_stride_b, p.queries_stride_q, Q, C,
                                shared.queries);
  Softmax<Queries> softmax;
  float sum[kOwned][4] = {};
  int dropped = 0;
  for (int listed = share.first; listed < share.last; listed += kListed) {
    const int last = min(listed + kListed, share.last);
    const int count = list_kept(mask, listed, last, shared.kept, shared.counts);
    dropped += last - listed - count;
    Ahead<T, Width> ahead;
    ahead.fetch(p, share.b, shared.kept, 0, count);
#pragma unroll 1
    for (int first = 0; first < count; first += kTile) {
      ahead.stage(shared.tokens, C);
      __syncthreads();
      ahead.fetch(p, share.b, shared.kept, first + kTile, count);
      multiply<Queries>(shared.queries, shared.tokens, C, shared.products);
      __syncthreads();
      softmax.add(p, share.b, shared, first, count);
      __syncthreads();
      if (owner) {
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
          const float factor = shared.factors[q0 + i];
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[i][k] *= factor;
        }
#pragma unroll 1
        for (int n = 0; n < kTile; n += 4) {
          Vector<float, 4> token[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) token[j] = load_vector<4>(shared.tokens + (n + j) * stride + c);
#pragma unroll
          for (int i = 0; i < kOwned; ++i) {
            const auto weight = load_vector<4>(shared.weights + (q0 + i) * kTile + n);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (int k = 0; k < 4; ++k) sum[i][k] = fmaf(weight.at[j], token[j].at[k], sum[i][k]);
            }
          }
        }
      }
      __syncthreads();
    }
  }
  softmax.finish(p, share, dropped, shared.factors);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    const int q = q0 + i;
    const float factor = shared.factors[q];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[i][k] *= factor;
    if (q >= Q) continue;
    if (p.splits > 1) {
      store_channels<float, Width>(p.parts + ((share.b * p.splits + share.split) * Q + q) * C, c, C, sum[i]);
    } else {
      store_channels<T, Width>(static_cast<T*>(p.attended) + (share.b * Q + q) * C, c, C, sum[i]);
    }
  }
}

constexpr int kCombining = 128;

// One block: one row. One thread: 16 bytes of it at a time. Parts are read once, the row is written once.
template <class T, int Width>
__global__ void __launch_bounds__(kCombining) combine_splits_kernel(CombineSplits p) {
  const int64_t row = blockIdx.x, b = row / p.Q, q = row % p.Q;
  const int C = static_cast<int>(p.C), splits = static_cast<int>(p.splits);
  float highest = -FLT_MAX, total = 0.0f;
  if (p.part_softmax != nullptr) {
    const float* softmax = p.part_softmax + (b * splits * p.Q + q) * 2;
    for (int s = 0; s < splits; ++s) highest = fmaxf(highest, softmax[s * p.Q * 2]);
    for (int s = 0; s < splits; ++s) total += softmax[s * p.Q * 2 + 1] * expf(softmax[s * p.Q * 2] - highest);
    if (threadIdx.x == 0) {
      p.softmax[row * p.softmax_stride] = highest;
      p.softmax[row * p.softmax_stride + 1] = total;
    }
  }
  for (int c = threadIdx.x * Width; c < C; c += kCombining * Width) {
    float sum[Width] = {};
#pragma unroll 1
    for (int s = 0; s < splits; ++s) {
      const int64_t from = (b * splits + s) * p.Q + q;
      const float* part = p.parts + from * C;
      const float weight = p.part_softmax != nullptr ? expf(p.part_softmax[from * 2] - highest) / total : 1.0f;
      constexpr int kPack = Width < 4 ? Width : 4;
#pragma unroll
      for (int i = 0; i < Width; i += kPack) {
        const auto pack = load_vector<kPack>(part + c + i);
#pragma unroll
        for (int k = 0; k < kPack; ++k) sum[i + k] = fmaf(weight, pack.at[k], sum[i + k]);
      }
    }
    store_channels<T, Width>(static_cast<T*>(p.result) + row * C, c, C, sum);
  }
}

struct Attend {
  const MaskedAttention& p;
  cudaStream_t stream;

  template <class T, int Width, int Queries>
  cudaError_t operator()() const {
    return launch(attend_masked_kernel<T, Width, Queries>, grid_of(p.B * p.splits), kAttentionThreads,
                  ForwardShared<Queries>::bytes(p.C), stream, p);
  }

  template <class T>
  cudaError_t operator()() const {
    const bool wide = vectorizable<T>(p.tokens, p.C, p.tokens_stride_b, p.tokens_stride_m, p.tokens_stride_n) &&
                      vectorizable<T>(p.queries, p.C, p.queries_stride_b, p.queries_stride_q) &&
                      vectorizable<T>(p.attended, p.C) && vectorizable<float>(p.parts, p.C);
    return dispatch_width<T>(wide, p, stream, *this, attend_on_tensor_cores);
  }
};

struct Combine {
  const CombineSplits& p;
  cudaStream_t stream;

  template <class T>
  cudaError_t operator()() const {
    const bool wide = vectorizable<T>(p.result, p.C) && vectorizable<float>(p.parts, p.C);
    const auto kernel = wide ? combine_splits_kernel<T, Vector<T>::size> : combine_splits_kernel<T, 1>;
    return launch(kernel, grid_of(p.B * p.Q), kCombining, 0, stream, p);
  }
};

}  // namespace

cudaError_t combine_splits(const CombineSplits& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, Combine{p, stream});
}

cudaError_t attend_masked(const MaskedAttention& p, cudaStream_t stream) {
  if (p.B * p.M * p.N * p.Q * p.C == 0) return cudaSuccess;
  if (!attention_fits(p)) return cudaErrorInvalidValue;
  const cudaError_t status = dispatch_dtype(p.dtype, Attend{p, stream});
  if (status != cudaSuccess || p.splits == 1) return status;
  return combine_splits({p.parts, p.part_softmax, p.attended, p.logits + p.M * p.N, p.B, p.Q, p.C, p.splits,
                         logits_stride(p), p.dtype},
                        stream);
}

}  // namespace signal_reid
