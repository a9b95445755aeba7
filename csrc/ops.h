// The launchers, as bindings.cpp and the emulator see them. Addresses are device addresses, strides count elements, the
// last dimension is always contiguous. Every launcher accepts empty sizes and then does nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace signal_reid {

enum class DType : int;

struct TokenSelection {
  const void* tokens;       // (B, M, N, C)
  const void* intra_query;  // (B, M, C)
  const void* inter_query;  // (B, M, C)
  bool* mask;               // (B, M, N), contiguous, written whole
  int64_t B, M, N, C;
  int64_t tokens_stride_b, tokens_stride_m, tokens_stride_n;
  int64_t intra_stride_b, intra_stride_m;
  int64_t inter_stride_b, inter_stride_m;
  int64_t k_intra, k_inter;
};
cudaError_t select_tokens(const TokenSelection& p, DType dtype, cudaStream_t stream);

// All tensors of the volume are fp32 and contiguous; k = number of others, 1 to 4.
struct GramianVolume {
  const float* anchor;     // (P, C)
  const float* others[4];  // k times (Q, C)
  float* volume;           // (P, Q)
  int64_t P, Q, C;
  int k;
};
cudaError_t gramian_volume(const GramianVolume& p, cudaStream_t stream);

struct GramianVolumeBackward {
  const float* grad;       // (P, Q)
  const float* anchor;     // (P, C)
  const float* others[4];  // k times (Q, C)
  float* grad_anchor;      // (P, C), written whole
  float* grad_others[4];   // k times (Q, C), written whole
  float* workspace;        // gramian_volume_workspace(P, Q, C, k) floats
  int64_t P, Q, C;
  int k;
};
int64_t gramian_volume_workspace(int64_t P, int64_t Q, int64_t C, int k);
cudaError_t gramian_volume_backward(const GramianVolumeBackward& p, cudaStream_t stream);

struct DeformableSampling {
  const void* tokens;   // (B, H * W, C)
  const void* offsets;  // (B, Hk, Wk), contiguous, dtype of the tokens
  void* sampled;        // (B, Hk * Wk, C), contiguous
  int64_t B, H, W, C, Hk, Wk;
  int64_t tokens_stride_b, tokens_stride_n;
  float offset_range;
};
cudaError_t deformable_sample(const DeformableSampling& p, DType dtype, cudaStream_t stream);

struct DeformableSamplingBackward {
  const void* grad;     // (B, Hk * Wk, C), contiguous
  const void* tokens;   // (B, H * W, C)
  const void* offsets;  // (B, Hk, Wk), contiguous
  void* grad_tokens;    // (B, H * W, C), contiguous, written whole
  void* grad_offsets;   // (B, Hk, Wk), contiguous, written whole
  int64_t B, H, W, C, Hk, Wk;
  int64_t tokens_stride_b, tokens_stride_n;
  float offset_range;
};
cudaError_t deformable_sample_backward(const DeformableSamplingBackward& p, DType dtype, cudaStream_t stream);

}  // namespace signal_reid
