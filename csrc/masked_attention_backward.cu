// Gradients of masked attention where the forward is that of masked_attention.cu; signal_reid/ops/reference derives the maths.
//
// One block: one sample, or a share of its tokens where samples are few. It holds the gradient of what the queries attended
// to in shared memory and passes over the kept tokens 16 at a time, while the next 16 are on their way to registers. p
// follows from the logits that the forward left, ds from the products of the gradient with the tokens. One thread: a quarter
// of these products of a tile over a 16th of the channels; then two channels of everything else, with the queries and their
// gradient in registers. The gradient of a token that is dropped is zero, and the token is not read.
//
// A kept token, its logits, a query, what it attended to and the gradient of that are read once (the last three once per
// block), every token's gradient and every query's are written once. Split samples leave parts of the queries' gradient in
// the workspace, and a second launch adds these up in their order. No atomics. What bounds it is arithmetic: 8 operations
// per query, kept token and channel, in fp32 by the multiply-add pipe, with 8 to 10 products a load from shared memory.
#include "masked_attention.cuh"

namespace signal_reid {
namespace {

constexpr int kTokensAtOnce = 4;

template <int Queries>
struct BackwardShared {
  float *grads, *tokens, *products, *weights, *slopes;
  int *kept, *counts;

  static size_t bytes(int64_t C) {
    const int64_t floats = (Queries + kTile) * stride_of(C) + (kAttentionWarps + 2) * Queries * kTile;
    return (floats + kListed + kAttentionWarps) * sizeof(float);
  }

  __device__ explicit BackwardShared(int64_t C) {
    grads = reinterpret_cast<float*>(dynamic_shared());      // (Queries, stride)
    tokens = grads + Queries * stride_of(C);                 // (16, stride)
    products = tokens + kTile * stride_of(C);                // (warps, Queries, 16)
    weights = products + kAttentionWarps * Queries * kTile;  // p (Queries, 16)
    slopes = weights + Queries * kTile;                      // ds (Queries, 16)
    kept = reinterpret_cast<int*>(slopes + Queries * kTile);
    counts = kept + kListed;
  }
};

// What belongs to the queries that a warp watches over, q = warp, warp + 8, ...
template <class T, int Queries>
struct Watched {
  static constexpr int kCount = Queries / kAttentionWarps;
  float mean[kCount];   // sum_n p_n dp_n = dz . z
  float logit[kCount];  // of the next tile's token lane % 16

  __device__ Watched(const MaskedAttentionBackward& p, int64_t b, const float* grads) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int C = static_cast<int>(p.C), stride = stride_of(p.C);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int q = warp + i * kAttentionWarps;
      mean[i] = 0.0f;
      if (q >= p.Q) continue;
      const T* attended = static_cast<const T*>(p.attended) + (b * p.Q + q) * C;
      for (int c = lane; c < C; c += kWarpSize) mean[i] = fmaf(grads[q * stride + c], to_float(attended[c]), mean[i]);
      mean[i] = warp_sum(mean[i]);
    }
  }

  __device__ void fetch(const MaskedAttentionBackward& p, int64_t b, const int* kept, int first, int count) {
    const int n = first + threadIdx.x % kTile, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int q = warp + i * kAttentionWarps;
      logit[i] = n < count && q < p.Q ? p.logits[(b * p.Q + q) * logits_stride(p) + kept[n]] : 0.0f;
    }
  }

  // Writes p and ds of a tile, zeros where there is no token or query.
  __device__ void write(const MaskedAttentionBackward& p, int64_t b, const BackwardShared<Queries>& shared, int first,
                        int count) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int q = warp + i * kAttentionWarps;
      const float along = product<Queries>(shared.products, q);
      const bool real = first + lane % kTile < count && q < p.Q;
      const float* softmax = p.logits + (b * p.Q + q) * logits_stride(p) + p.M * p.N;  // maximum and sum
      const float weight = real ? expf(logit[i] - softmax[0]) / softmax[1] : 0.0f;
      if (lane < kTile) {
        shared.weights[q * kTile + lane] = weight;
        shared.slopes[q * kTile + lane] = real ? weight * (along - mean[i]) : 0.0f;
      }
    }
  }
};

// Zeros for the tokens first..last - 1 that were dropped; a warp writes one at a time.
template <class T, int Width>
__device__ void zero_dropped(const bool* mask, T* grad_tokens, int first, int last, int C) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int token = first + warp; token < last; token += kAttentionWarps) {
    if (mask[token]) continue;
    T* row = grad_tokens + static_cast<int64_t>(token) * C;
    for (int c = lane * Width; c < C; c += kWarpSize * Width) store_vector(row + c, Vector<T, Width>{});
  }
}

// dtoken = ds u + p dz of four tokens in a thread's two channels, and their part of du.
template <class T, int Width, int Queries>
__device__ void add_gradients(const BackwardShared<Queries>& shared, int first, int count, int c, int C,
                              const float (&query)[Queries][2], float (&grad_query)[Queries][2], T* grad_tokens,
                              const int* kept) {
  const int stride = stride_of(C);
  Vector<float, 2> token[kTokensAtOnce];
  float grad[kTokensAtOnce][2] = {};
#pragma unroll
  for (int n = 0; n < kTokensAtOnce; ++n) token[n] = load_vector<2>(shared.tokens + (first + n) * stride + c);
#pragma unroll
  for (int q = 0; q < Queries; ++q) {
    if (q % 2 == 0) __syncwarp();  // otherwise the compiler loads so far ahead that registers spill
    const auto flow = load_vector<2>(shared.grads + q * stride + c);
    const auto weight = load_vector<kTokensAtOnce>(shared.weights + q * kTile + first);
    const auto slope = load_vector<kTokensAtOnce>(shared.slopes + q * kTile + first);
#pragma unroll
    for (int n = 0; n < kTokensAtOnce; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        grad[n][k] = fmaf(slope.at[n], query[q][k], fmaf(weight.at[n], flow.at[k], grad[n][k]));
        grad_query[q][k] = fmaf(slope.at[n], token[n].at[k], grad_query[q][k]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTokensAtOnce; ++n) {
    if (first + n < count) store_channels<T, Width>(grad_tokens + static_cast<int64_t>(kept[first + n]) * C, c, C, grad[n]);
  }
}

template <class T, int Width, int Queries>
__global__ void __launch_bounds__(kAttentionThreads, 1) attend_masked_backward_kernel(MaskedAttentionBackward p) {
  const BackwardShared<Queries> shared(p.C);
  const Share share = share_of_block(p);
  const int C = static_cast<int>(p.C), Q = static_cast<int>(p.Q);
  const int64_t tokens = p.M * p.N;
  const bool* mask = p.mask + share.b * tokens;
  T* grad_tokens = static_cast<T*>(p.grad_tokens) + share.b * tokens * C;
  const int c = 2 * threadIdx.x;
  const bool owner = c < padded_channels(C);

  stage_rows<T, Width, Queries>(static_cast<const T*>(p.grad) + share.b * p.grad_stride_b, p.grad_stride_q, Q, C,
                                shared.grads);
  float query[Queries][2], grad_query[Queries][2] = {};
#pragma unroll
  for (int q = 0; q < Queries; ++q) {
    const T* row = static_cast<const T*>(p.queries) + share.b * p.queries_stride_b + q * p.queries_stride_q + c;
    if constexpr (Width == 1) {
#pragma unroll
      for (int k = 0; k < 2; ++k) query[q][k] = q < Q && c + k < C ? to_float(row[k]) : 0.0f;
    } else {
      const auto pair = q < Q && c < C ? load_vector<2>(row) : Vector<T, 2>{};
#pragma unroll
      for (int k = 0; k < 2; ++k) query[q][k] = to_float(pair.at[k]);
    }
  }
  __syncthreads();
  Watched<T, Queries> watched(p, share.b, shared.grads);

  for (int listed = share.first; listed < share.last; listed += kListed) {
    const int last = min(listed + kListed, share.last);
    const int count = list_kept(mask, listed, last, shared.kept, shared.counts);
    Ahead<T, Width> ahead;
    ahead.fetch(p, share.b, shared.kept, 0, count);
    zero_dropped<T, Width>(mask, grad_tokens, listed, last, C);
#pragma unroll 1
    for (int first = 0; first < count; first += kTile) {
      ahead.stage(shared.tokens, C);
      watched.fetch(p, share.b, shared.kept, first, count);
      __syncthreads();
      multiply<Queries>(shared.grads, shared.tokens, C, shared.products);
      __syncthreads();
      watched.write(p, share.b, shared, first, count);
      __syncthreads();
      ahead.fetch(p, share.b, shared.kept, first + kTile, count);  // not earlier: the products take those registers
      const int here = min(count - first, kTile);
#pragma unroll 1
      for (int n = 0; n < here && owner; n += kTokensAtOnce) {
        add_gradients<T, Width, Queries>(shared, n, here, c, C, query, grad_query, grad_tokens, shared.kept + first);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int q = 0; q < Queries; ++q) {
    if (q >= Q) break;
    if (p.splits > 1) {
      store_channels<float, Width>(p.parts + ((share.b * p.splits + share.split) * Q + q) * C, c, C, grad_query[q]);
    } else {
      store_channels<T, Width>(static_cast<T*>(p.grad_queries) + (share.b * Q + q) * C, c, C, grad_query[q]);
    }
  }
}

struct Backward {
  const MaskedAttentionBackward& p;
  cudaStream_t stream;

  template <class T, int Width, int Queries>
  cudaError_t operator()() const {
    return launch(attend_masked_backward_kernel<T, Width, Queries>, grid_of(p.B * p.splits), kAttentionThreads,
                  BackwardShared<Queries>::bytes(p.C), stream, p);
  }

  template <class T>
  cudaError_t operator()() const {
    const bool wide = vectorizable<T>(p.tokens, p.C, p.tokens_stride_b, p.tokens_stride_m, p.tokens_stride_n) &&
                      vectorizable<T>(p.queries, p.C, p.queries_stride_b, p.queries_stride_q) &&
                      vectorizable<T>(p.grad, p.C, p.grad_stride_b, p.grad_stride_q) &&
                      vectorizable<T>(p.grad_tokens, p.C) && vectorizable<T>(p.grad_queries, p.C) &&
                      vectorizable<float>(p.parts, p.C);
    return dispatch_width<T>(wide, p, stream, *this, attend_backward_on_tensor_cores);
  }
};

}  // namespace

cudaError_t attend_masked_backward(const MaskedAttentionBackward& p, cudaStream_t stream) {
  if (p.B * p.M * p.N * p.C == 0) return cudaSuccess;
  if (!attention_fits(p)) return cudaErrorInvalidValue;
  const cudaError_t status = dispatch_dtype(p.dtype, Backward{p, stream});
  if (status != cudaSuccess || p.splits == 1 || p.Q == 0) return status;
  return combine_splits({p.parts, nullptr, p.grad_queries, nullptr, p.B, p.Q, p.C, p.splits, 0, p.dtype}, stream);
}

}  // namespace signal_reid
