// The launchers, as bindings.cpp and the emulator see them. Addresses are device addresses, strides count elements, the
// last dimension is always contiguous. Every launcher accepts empty sizes and then does nothing, and refuses sizes that it
// cannot serve; signal_reid/ops/cuda refuses these before it launches, with a reason.
//
// Python names the fields of these structs: a field that is added here is added to its list in bindings.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace signal_reid {

enum class DType : int;

// Loads a kernel on a device without launching it, and starts the device for that; what CUDA has against it.
cudaError_t probe(int device);

struct TokenSelection {
  const void* tokens;       // (B, M, N, C)
  const void* intra_query;  // (B, M, C)
  const void* inter_query;  // (B, M, C)
  bool* mask;               // (B, M, N), contiguous, written whole
  unsigned* scores;         // (B, M, M, N), contiguous, where several blocks share a sample, else null
  int64_t B, M, N, C;
  int64_t splits;  // blocks per sample
  int64_t tokens_stride_b, tokens_stride_m, tokens_stride_n;
  int64_t intra_stride_b, intra_stride_m;
  int64_t inter_stride_b, inter_stride_m;
  int64_t k_intra, k_inter;
  DType dtype;  // of tokens and queries
};
// Bytes of shared memory that one sample takes, at most a GPU's per block: what is off 16 bytes takes somewhat less.
int64_t select_tokens_shared_bytes(int64_t M, int64_t N, int64_t C, DType dtype);
cudaError_t select_tokens(const TokenSelection& p, cudaStream_t stream);

// The addresses of k tensors of one shape, k from 1 to 4.
template <class T>
struct Addresses {
  T* at[4];
  int k;
};

// All tensors of the volume are fp32 and contiguous.
struct GramianVolume {
  const float* anchor;            // (P, C)
  Addresses<const float> others;  // k times (Q, C)
  float* volume;                  // (P, Q)
  int64_t P, Q, C;
};
cudaError_t gramian_volume(const GramianVolume& p, cudaStream_t stream);

struct GramianVolumeBackward {
  const float* grad;              // (P, Q)
  const float* anchor;            // (P, C)
  Addresses<const float> others;  // k times (Q, C)
  float* grad_anchor;             // (P, C), written whole
  Addresses<float> grad_others;   // k times (Q, C), written whole
  float* workspace;               // gramian_volume_workspace(P, Q, C, k) floats
  int64_t P, Q, C;
};
int64_t gramian_volume_workspace(int64_t P, int64_t Q, int64_t C, int k);
cudaError_t gramian_volume_backward(const GramianVolumeBackward& p, cudaStream_t stream);

// All tensors of the loss are fp32; features may have any strides but a unit last one.
struct GramianLoss {
  const float* features;     // (B, M, C), M from 2 to 5
  const float* temperature;  // ()
  float* loss;               // ()
  float* slope;              // (), its derivative by the temperature
  float* statistics;  // (4, B): of each row, its least volume and 1 / sum of exp((least - V) / temperature); of each column
  float* workspace;   // gramian_loss_workspace(B) floats
  int64_t B, M, C, stride_b, stride_m;
  float smoothing;
};
int64_t gramian_loss_workspace(int64_t B);
cudaError_t gramian_loss(const GramianLoss& p, cudaStream_t stream);

struct GramianLossBackward {
  const float* grad;         // ()
  const float* features;     // (B, M, C), C not 0
  const float* temperature;  // ()
  const float* slope;        // ()
  const float* statistics;   // (4, B)
  float* grad_features;      // (B, M, C), contiguous, written whole
  float* grad_temperature;   // ()
  float* workspace;          // gramian_volume_workspace(B, B, C, M - 1) floats
  int64_t B, M, C, stride_b, stride_m;
  float smoothing;
};
cudaError_t gramian_loss_backward(const GramianLossBackward& p, cudaStream_t stream);

struct DeformableSampling {
  const void* tokens;   // (B, H * W, C)
  const void* offsets;  // (B, Hk, Wk), contiguous, dtype of the tokens
  void* sampled;        // (B, Hk * Wk, C), contiguous
  int64_t B, H, W, C, Hk, Wk;
  int64_t tokens_stride_b, tokens_stride_n;
  float offset_range;
  DType dtype;
};
cudaError_t deformable_sample(const DeformableSampling& p, cudaStream_t stream);

struct DeformableSamplingBackward {
  const void* grad;     // (B, Hk * Wk, C), contiguous
  const void* tokens;   // (B, H * W, C)
  const void* offsets;  // (B, Hk, Wk), contiguous
  void* grad_tokens;    // (B, H * W, C), contiguous, written whole
  void* grad_offsets;   // (B, Hk, Wk), contiguous, written whole
  int64_t B, H, W, C, Hk, Wk;
  int64_t tokens_stride_b, tokens_stride_n;
  float offset_range;
  DType dtype;
};
cudaError_t deformable_sample_backward(const DeformableSamplingBackward& p, cudaStream_t stream);

// Parameters and their gradients are fp32 and contiguous, a row per modality. H / 4 by W / 4 windows of 4 by 4 tokens;
// tokens beyond the last whole window take no part.
struct OffsetHead {
  const void* hidden;        // (M, B, H * W, C)
  const float* bias;         // (M, C)
  const float* window;       // (M, C, 4, 4)
  const float* window_bias;  // (M, C)
  const float* out;          // (M, C)
  void* offsets;             // (M, B, H / 4, W / 4), contiguous, dtype of the hidden tokens, written whole
  int64_t M, B, H, W, C;
  int64_t stride_m, stride_b, stride_n;
  DType dtype;
};
cudaError_t offset_head(const OffsetHead& p, cudaStream_t stream);

struct OffsetHeadBackward {
  const void* grad;          // (M, B, H / 4, W / 4), contiguous
  const void* hidden;        // (M, B, H * W, C)
  const float* bias;         // (M, C)
  const float* window;       // (M, C, 4, 4)
  const float* window_bias;  // (M, C)
  const float* out;          // (M, C)
  void* grad_hidden;         // (M, B, H * W, C), contiguous, written whole
  float* grad_bias;          // (M, C), written whole as are the next three, unless there are no parts
  float* grad_window;        // (M, C, 4, 4)
  float* grad_window_bias;   // (M, C)
  float* grad_out;           // (M, C)
  float* shares;             // (parts, M, 19, C): of each part of the maps in the gradients of the parameters
  int64_t M, B, H, W, C;
  int64_t stride_m, stride_b, stride_n;
  int64_t parts;  // blocks that share the windows of a modality's 128 channels
  DType dtype;
};
cudaError_t offset_head_backward(const OffsetHeadBackward& p, cudaStream_t stream);

struct PairwiseError {
  const void* maps;  // (M, size), contiguous, M at least 2
  float* shares;     // (blocks,): of each block in the loss, written whole unless the maps are empty
  int64_t M, size, blocks;
  float scale;  // 1 / (pairs * size)
  DType dtype;
};
cudaError_t pairwise_error(const PairwiseError& p, cudaStream_t stream);

struct PairwiseErrorBackward {
  const float* grad;  // ()
  const void* maps;   // (M, size), contiguous
  void* grad_maps;    // (M, size), contiguous, written whole
  int64_t M, size;
  float scale;
  DType dtype;
};
cudaError_t pairwise_error_backward(const PairwiseErrorBackward& p, cudaStream_t stream);

// At most 24 queries of 512 channels, and 32,768 modalities and tokens.
struct MaskedAttention {
  const void* queries;  // (B, Q, C)
  const void* tokens;   // (B, M, N, C)
  const bool* mask;     // (B, M, N), contiguous
  void* attended;       // (B, Q, C), contiguous, written whole
  float* logits;        // (B, Q, M * N + 2), contiguous: those of kept tokens; maximum and sum of the whole softmax
  float* parts;         // (B, splits, Q, C) where there are several splits, else null
  float* part_softmax;  // (B, splits, Q, 2) likewise
  int64_t B, M, N, Q, C;
  int64_t splits;  // blocks per sample, at most M * N
  int64_t queries_stride_b, queries_stride_q;
  int64_t tokens_stride_b, tokens_stride_m, tokens_stride_n;
  DType dtype;  // of queries, tokens and attended
};
cudaError_t attend_masked(const MaskedAttention& p, cudaStream_t stream);

struct MaskedAttentionBackward {
  const void* grad;      // (B, Q, C)
  const void* queries;   // (B, Q, C)
  const void* tokens;    // (B, M, N, C)
  const bool* mask;      // (B, M, N), contiguous
  const void* attended;  // (B, Q, C), contiguous
  const float* logits;   // as the forward left them
  void* grad_queries;    // (B, Q, C), contiguous, written whole
  void* grad_tokens;     // (B, M, N, C), contiguous, written whole
  float* parts;          // as in the forward
  int64_t B, M, N, Q, C;
  int64_t splits;
  int64_t grad_stride_b, grad_stride_q;
  int64_t queries_stride_b, queries_stride_q;
  int64_t tokens_stride_b, tokens_stride_m, tokens_stride_n;
  DType dtype;
};
cudaError_t attend_masked_backward(const MaskedAttentionBackward& p, cudaStream_t stream);

// All tensors are contiguous and each has a dtype of its own; weight and bias share theirs.
struct AddLayerNorm {
  const void* x;       // (rows, C)
  const void* branch;  // (rows, C) or null
  const void* weight;  // (C)
  const void* bias;    // (C)
  void* total;         // (rows, C), written whole if there is a branch
  void* normed;        // (rows, C), written whole
  int64_t rows, C;     // at most 5,120 channels
  float eps;
  DType x_dtype, branch_dtype, weight_dtype, total_dtype, normed_dtype;
};
cudaError_t add_layer_norm(const AddLayerNorm& p, cudaStream_t stream);

struct AddLayerNormBackward {
  const void* grad_normed;  // (rows, C), dtype of normed
  const void* grad_total;   // (rows, C), dtype of the sum, or null for zero
  const void* total;        // (rows, C)
  const void* weight;       // (C)
  void* grad_x;             // (rows, C), dtype of the sum, written whole
  void* grad_branch;        // the same in the branch's dtype, or null
  float* shares;            // (2, blocks, C): of each block in the gradients of weight and bias, written whole
  int64_t rows, C, blocks;
  float eps;
  DType normed_dtype, total_dtype, weight_dtype, branch_dtype;
};
cudaError_t add_layer_norm_backward(const AddLayerNormBackward& p, cudaStream_t stream);

// All tensors lie in memory alike, without gaps.
struct QuickGELU {
  const void* x;
  void* y;  // written whole
  int64_t size;
  DType dtype;
};
cudaError_t quick_gelu(const QuickGELU& p, cudaStream_t stream);

struct QuickGELUBackward {
  const void* grad;
  const void* x;
  void* grad_x;  // written whole
  int64_t size;
  DType dtype;
};
cudaError_t quick_gelu_backward(const QuickGELUBackward& p, cudaStream_t stream);

}  // namespace signal_reid
