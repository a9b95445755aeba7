// What the launches of the gramian volume share, and those of the contrastive loss with them: the pairs, forward and
// backward, and the gradients after them.
#pragma once

#include "ops.h"
#include "simt.cuh"

namespace signal_reid {

constexpr int64_t kFewBlocks = 128;  // below this many, narrow tiles, which leave less of the card idle
constexpr float kShortest = 1e-12f;  // a vector shorter than this is divided by this, as F.normalize does

// Where the two launches of the backward meet. All of it is written by the first and read by the second.
struct Workspace {
  float* basis;         // (K, Q, C)
  float* quotient;      // (P, Q), grad / height
  float* rise;          // (P, Q), grad * height
  float* projections;   // (K, P, Q), a . q_l
  float* area;          // (Q,)
  float* adjugate;      // (Q, K, K)
  float* anchor_scale;  // (P,), of unit vectors alone: what the anchor is multiplied by
  float* others_scale;  // (K, Q), likewise
};
// Of as many floats as gramian_volume_workspace says.
Workspace partition(float* start, int64_t P, int64_t Q, int64_t C, int k);

// The gradient of the contrastive loss by its logits, from which the backward's pairs take their own.
struct Contrast {
  const float* temperature;  // (), or null: the gradient of every pair is given
  const float* statistics;   // (4, B), as gramian_loss writes them
  const float* slope;        // ()
  float* grad_temperature;   // ()
  float smoothing;
};

// The first launch of the backward, or all of the forward.
struct GramianPairs {
  const float* anchor;         // (P, C)
  const float* const* others;  // k times (Q, C)
  float* volume;               // (P, Q): forward
  const float* grad;           // (P, Q), or (), of the loss: backward, else null
  Workspace workspace;         // backward
  int64_t P, Q, C, stride;     // of the rows of anchor and others
  int k;
  bool unit;  // whether every vector is taken at length 1
  Contrast contrast;
};
cudaError_t gramian_pairs(const GramianPairs& p, cudaStream_t stream);

// The second launch of the backward.
struct GramianGradients {
  const float* anchor;         // (P, C)
  const float* const* others;  // k times (Q, C); unit vectors alone
  Workspace workspace;
  float* grad_anchor;          // (P, C), written whole
  float* const* grad_others;   // k times (Q, C), written whole
  int64_t P, Q, C, stride, grad_stride;
  int k;
  bool unit;
};
cudaError_t gramian_gradients(const GramianGradients& p, cudaStream_t stream);

// A vector to global memory in one instruction; assigned as a struct, nvcc stores some of them element by element.
template <int Width>
__device__ __forceinline__ void store_global(float* address, const Vector<float, Width>& value) {
  if constexpr (Width == 4) {
    __stwb(reinterpret_cast<float4*>(address), make_float4(value.at[0], value.at[1], value.at[2], value.at[3]));
  } else {
    store_vector(address, value);
  }
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

}  // namespace signal_reid
