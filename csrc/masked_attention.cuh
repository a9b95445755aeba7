// What the two directions of masked attention share: how a block lists the tokens that are kept, brings them to shared
// memory 16 at a time, and multiplies them with its rows (the queries, or the gradient of what they attended to).
//
// Rows and tokens lie in shared memory as fp32, zero where there is none, `stride_of` floats apart: 8 more than a multiple
// of 32, so that the rows and tokens that a warp loads together fall into different banks.
#pragma once

#include <cfloat>

#include "ops.h"
#include "simt.cuh"
#include "tensor_cores.cuh"

namespace signal_reid {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / kWarpSize;
constexpr int kMostQueries = 24;
constexpr int kMostChannels = 2 * kAttentionThreads;  // the backward's threads own two each
constexpr int kTile = 16;                             // tokens in shared memory at a time
constexpr int kListed = kAttentionThreads;            // tokens whose mask a block reads at a time, one a thread
constexpr int kSlice = 8 * kAttentionWarps;           // channels that the warps multiply at a time, 8 each

__host__ __device__ inline int padded_channels(int64_t C) { return static_cast<int>(ceil_div(C, kSlice) * kSlice); }
__host__ __device__ inline int stride_of(int64_t C) { return padded_channels(C) + 8; }

// A block's share of one sample: the tokens first..last - 1 of its M N.
struct Share {
  int64_t b;
  int split, first, last;
};

template <class Parameters>
__device__ inline Share share_of_block(const Parameters& p) {
  const int splits = static_cast<int>(p.splits), tokens = static_cast<int>(p.M * p.N);
  const int each = static_cast<int>(ceil_div(tokens, splits));
  const int split = static_cast<int>(blockIdx.x % splits);
  return {static_cast<int64_t>(blockIdx.x / splits), split, min(split * each, tokens), min(split * each + each, tokens)};
}

// Lists the kept ones of up to 256 tokens from `first` on in `kept`, in order; returns how many. Ends with a barrier.
__device__ inline int list_kept(const bool* mask, int first, int last, int* kept, int* counts) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int token = first + threadIdx.x;
  const bool keep = token < last && mask[token];
  const unsigned ballot = __ballot_sync(kFullWarp, keep);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) {
    before += w < warp ? counts[w] : 0;
    total += counts[w];
  }
  if (keep) kept[before + __popc(ballot & ((1u << lane) - 1u))] = token;
  __syncthreads();
  return total;
}

// The next 16 tokens on their way from global to shared memory: each warp has two of them in its registers.
template <class T, int Width>
struct Ahead {
  static constexpr int kEach = kTile / kAttentionWarps;
  static constexpr int kVectors = kMostChannels / (kWarpSize * Width);
  Vector<T, Width> at[kEach][kVectors];

  // Loads tokens kept[first..count - 1], 16 at most; zeros beyond.
  template <class Parameters>
  __device__ void fetch(const Parameters& p, int64_t b, const int* kept, int first, int count) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int N = static_cast<int>(p.N), C = static_cast<int>(p.C);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int n = first + warp * kEach + e;
      const int token = n < count ? kept[n] : 0;
      const T* row = static_cast<const T*>(p.tokens) + b * p.tokens_stride_b + token / N * p.tokens_stride_m +
                     token % N * p.tokens_stride_n;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = (v * kWarpSize + lane) * Width;
        at[e][v] = n < count && c < C ? load_vector<Width>(row + c) : Vector<T, Width>{};
      }
    }
  }

  __device__ void stage(float* tokens, int C) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int columns = padded_channels(C), stride = stride_of(C);
    constexpr int kPack = Width < 4 ? Width : 4;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int c = (v * kWarpSize + lane) * Width;
        if (c >= columns) continue;
#pragma unroll
        for (int i = 0; i < Width; i += kPack) {
          Vector<float, kPack> pack;
#pragma unroll
          for (int k = 0; k < kPack; ++k) pack.at[k] = to_float(at[e][v].at[i + k]);
          store_vector(tokens + (warp * kEach + e) * stride + c + i, pack);
        }
      }
    }
  }
};

// Brings Q rows of C elements to shared memory, and zeros up to the padded sizes.
template <class T, int Width, int Queries>
__device__ void stage_rows(const T* source, int64_t row_stride, int Q, int C, float* rows) {
  const int stride = stride_of(C), vectors = padded_channels(C) / Width;
  for (int e = threadIdx.x; e < Queries * vectors; e += kAttentionThreads) {
    const int q = e / vectors, c = e % vectors * Width;
    Vector<T, Width> vector = {};
    if (q < Q && c < C) vector = load_vector<Width>(source + q * row_stride + c);
#pragma unroll
    for (int i = 0; i < Width; ++i) rows[q * stride + c + i] = to_float(vector.at[i]);
  }
}

// One warp: the products of all rows with all 16 tokens over an eighth of the channels, to its part of `products`,
// (warps, Queries, 16). One thread: a quarter of the rows times a quarter of the tokens over every other four channels.
template <int Queries>
__device__ void multiply(const float* rows, const float* tokens, int C, float* products) {
  constexpr int kRows = Queries / 4, kTokens = kTile / 4;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int half = lane % 2, n0 = lane / 2 % 4, q0 = lane / 8;
  const int columns = padded_channels(C), stride = stride_of(C);
  float sum[kRows][kTokens] = {};
#pragma unroll 1
  for (int c = warp * 8 + half * 4; c < columns; c += kSlice) {
    Vector<float, 4> token[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) token[j] = load_vector<4>(tokens + (n0 + 4 * j) * stride + c);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const auto row = load_vector<4>(rows + (q0 + 4 * i) * stride + c);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i][j] = fmaf(row.at[k], token[j].at[k], sum[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      sum[i][j] += __shfl_xor_sync(kFullWarp, sum[i][j], 1);
      if (half == j % 2) products[(warp * Queries + q0 + 4 * i) * kTile + n0 + 4 * j] = sum[i][j];
    }
  }
}

// What `multiply` left of row q and token lane % 16, added over the warps; the same in both halves of the warp.
template <int Queries>
__device__ float product(const float* products, int q) {
  const int lane = threadIdx.x % kWarpSize, n = lane % kTile, half = lane / kTile;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kAttentionWarps / 2; ++w) {
    sum += products[((half * (kAttentionWarps / 2) + w) * Queries + q) * kTile + n];
  }
  return sum + __shfl_xor_sync(kFullWarp, sum, kTile);
}

// Up to Width neighbouring channels from c on, of T or fp32; the last ones one by one where C is odd.
template <class T, int Width, int Count>
__device__ void store_channels(T* row, int c, int C, const float (&value)[Count]) {
  if constexpr (Width == 1) {
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      if (c + k < C) row[c + k] = from_float<T>(value[k]);
    }
  } else if (c < C) {
    Vector<T, Count> pack;
#pragma unroll
    for (int k = 0; k < Count; ++k) pack.at[k] = from_float<T>(value[k]);
    store_vector(row + c, pack);
  }
}

// The second launch where samples are split: result (B, Q, C) = sum over splits of weight * part (B, splits, Q, C). With
// the maximum and sum of each part's softmax the weights make one softmax of them, whose maximum and sum go to `softmax`,
// `softmax_stride` floats apart. Without, the weights are one.
struct CombineSplits {
  const float* parts;
  const float* part_softmax;  // (B, splits, Q, 2) or null
  void* result;               // contiguous, written whole
  float* softmax;             // two per row of the result, or null
  int64_t B, Q, C, splits, softmax_stride;
  DType dtype;
};
cudaError_t combine_splits(const CombineSplits& p, cudaStream_t stream);

// Calls body.template operator()<T, Width, Queries>() with 16 queries, those of two modalities, or 24, those of three and
// all that is off 16 bytes: an instantiation of eight or of narrow ones costs as long to compile as all of activation.cu.
template <class T, int Width, class Body>
cudaError_t dispatch_queries(int64_t Q, Body body) {
  if constexpr (Width > 1) {
    if (Q <= 16) return body.template operator()<T, Width, 16>();
  }
  return body.template operator()<T, Width, 24>();
}

// The same in fp16 or bf16 on tensor cores, one launch without the combining one. For rows that can be moved 16 bytes at a
// time, on a device with tensor cores.
cudaError_t attend_on_tensor_cores(const MaskedAttention& p, cudaStream_t stream);
cudaError_t attend_backward_on_tensor_cores(const MaskedAttentionBackward& p, cudaStream_t stream);

// A vector kernel of fp32, or tensor cores in lower precision, where rows can be moved 16 bytes at a time (`wide`); else, or
// on a GPU older than sm_80, a kernel that moves single elements.
template <class T, class Body, class Parameters>
cudaError_t dispatch_width(bool wide, const Parameters& p, cudaStream_t stream, Body body,
                           cudaError_t (*on_tensor_cores)(const Parameters&, cudaStream_t)) {
  if constexpr (sizeof(T) == 4) {
    if (wide) return dispatch_queries<T, Vector<T>::size>(p.Q, body);
  } else {
    const int64_t reach = (p.M - 1) * p.tokens_stride_m + (p.N - 1) * p.tokens_stride_n;  // of a sample, counted in 32 bits
    if (wide && reach / 8 <= UINT32_MAX && has_tensor_cores()) return on_tensor_cores(p, stream);
  }
  return dispatch_queries<T, 1>(p.Q, body);
}

// Floats of a query in the logits: one per token, then the maximum and the sum of its softmax.
template <class Parameters>
__host__ __device__ int64_t logits_stride(const Parameters& p) {
  return p.M * p.N + 2;
}

template <class Parameters>
bool attention_fits(const Parameters& p) {
  const bool sizes = p.Q <= kMostQueries && p.C <= kMostChannels && p.M <= 1 << 15 && p.N <= 1 << 15;
  return sizes && p.splits >= 1 && p.splits <= p.M * p.N && p.B <= kMostBlocks / p.splits;
}

}  // namespace signal_reid
