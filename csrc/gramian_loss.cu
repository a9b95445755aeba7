// Contrastive loss on the gramian volumes of unit vectors in fp32, and its gradients; the maths is in
// signal_reid/ops/reference/gramian_loss.py.
//
// Forward two launches: the pairs (gramian.cu), which take vectors of any length, then the lines, rows and columns of the
// volumes. Backward two: the pairs, which take their gradient from what the lines left, and the gradients
// (gramian_backward.cu), which end at the vectors as they were given. No atomics: every result has one writer and a fixed
// order of additions.
#include "gramian.cuh"

namespace signal_reid {
namespace {

constexpr int kLines = 32;  // of a group: rows, a warp each, or columns, a lane each
constexpr int kThreads = kLines * kWarpSize;
constexpr int64_t kOneBlock = 256;  // up to this batch one block takes all groups, and no launch has to sum up blocks

struct Lines {
  const float* volume;       // (B, B)
  const float* temperature;  // ()
  float* statistics;         // (4, B)
  float* loss;               // (blocks,), the share of each
  float* slope;              // (blocks,)
  int64_t B, groups;
  float smoothing;
};

// Sums over a line of e = (V - least V of the line) / temperature.
struct Excess {
  float exponentials = 0.0f;  // exp(-e), no less than 1: that of the least volume
  float weighted = 0.0f;      // e exp(-e)
  float total = 0.0f;

  __device__ void add(float e) {
    const float exponential = expf(-e);
    exponentials += exponential;
    weighted += e * exponential;
    total += e;
  }
};

struct Share {
  float loss = 0.0f, slope = 0.0f;
};

__device__ float warp_min(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fminf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// What a line leaves for the backward, and what it adds to the loss; `own` is the excess of its target.
__device__ void conclude(const Lines& p, float* statistics, int64_t line, float least, const Excess& excess, float own,
                         float temperature, Share& share) {
  statistics[line] = least;
  statistics[p.B + line] = 1.0f / excess.exponentials;
  const float size = static_cast<float>(p.B);
  const float target = (1.0f - p.smoothing) * own + p.smoothing * (excess.total / size);
  share.loss += (logf(excess.exponentials) + target) / (2.0f * size);
  share.slope += (excess.weighted / excess.exponentials - target) / (2.0f * size * temperature);
}

// One warp: one row, read twice, the second time from the cache.
__device__ void take_rows(const Lines& p, int64_t group, float temperature, Share& share) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t i = group * kLines + threadIdx.x / kWarpSize;
  if (i >= p.B) return;
  const float* row = p.volume + i * p.B;
  float least = INFINITY;
#pragma unroll 4
  for (int64_t j = lane; j < p.B; j += kWarpSize) least = fminf(least, row[j]);
  least = warp_min(least);
  Excess excess;
#pragma unroll 4
  for (int64_t j = lane; j < p.B; j += kWarpSize) excess.add((row[j] - least) / temperature);
  excess.exponentials = warp_sum(excess.exponentials);
  excess.weighted = warp_sum(excess.weighted);
  excess.total = warp_sum(excess.total);
  if (lane == 0) conclude(p, p.statistics, i, least, excess, (row[i] - least) / temperature, temperature, share);
}

// One lane: one column, of which each warp takes every 32nd row; read twice, the second time from the cache.
__device__ void take_columns(const Lines& p, int64_t group, float temperature, Share& share) {
  __shared__ float of_warps[3][kThreads / kWarpSize][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t j = group * kLines + lane;
  const bool real = j < p.B;
  float least = INFINITY;
#pragma unroll 4
  for (int64_t i = warp; i < p.B && real; i += kThreads / kWarpSize) least = fminf(least, p.volume[i * p.B + j]);
  of_warps[0][warp][lane] = least;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarpSize; ++w) least = fminf(least, of_warps[0][w][lane]);
  __syncthreads();
  Excess excess;
#pragma unroll 4
  for (int64_t i = warp; i < p.B && real; i += kThreads / kWarpSize) {
    excess.add((p.volume[i * p.B + j] - least) / temperature);
  }
  of_warps[0][warp][lane] = excess.exponentials;
  of_warps[1][warp][lane] = excess.weighted;
  of_warps[2][warp][lane] = excess.total;
  __syncthreads();
  if (warp == 0 && real) {
    excess = {};
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
      excess.exponentials += of_warps[0][w][lane];
      excess.weighted += of_warps[1][w][lane];
      excess.total += of_warps[2][w][lane];
    }
    const float own = (p.volume[j * p.B + j] - least) / temperature;
    conclude(p, p.statistics + 2 * p.B, j, least, excess, own, temperature, share);
  }
  __syncthreads();
}

// One block: one group of 32 rows or columns after the other, as many apart as there are blocks. The volumes are read for
// rows and for columns once each but for the cache, the statistics and the block's share of the loss written once.
__global__ void __launch_bounds__(kThreads, 1) lines_kernel(Lines p) {
  __shared__ float losses[kThreads / kWarpSize], slopes[kThreads / kWarpSize];
  const float temperature = *p.temperature;
  Share share;
  for (int64_t group = blockIdx.x; group < 2 * p.groups; group += gridDim.x) {
    if (group < p.groups) {
      take_rows(p, group, temperature, share);
    } else {
      take_columns(p, group - p.groups, temperature, share);
    }
  }
  share.loss = warp_sum(share.loss);
  share.slope = warp_sum(share.slope);
  if (threadIdx.x % kWarpSize == 0) {
    losses[threadIdx.x / kWarpSize] = share.loss;
    slopes[threadIdx.x / kWarpSize] = share.slope;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  share = {};
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    share.loss += losses[w];
    share.slope += slopes[w];
  }
  p.loss[blockIdx.x] = share.loss;
  p.slope[blockIdx.x] = share.slope;
}

// One block of one warp: sums the shares of all blocks, which are read once.
__global__ void __launch_bounds__(kWarpSize) total_kernel(const float* losses, const float* slopes, int64_t blocks,
                                                          float* loss, float* slope) {
  Share share;
  for (int64_t block = threadIdx.x; block < blocks; block += kWarpSize) {
    share.loss += losses[block];
    share.slope += slopes[block];
  }
  share.loss = warp_sum(share.loss);
  share.slope = warp_sum(share.slope);
  if (threadIdx.x != 0) return;
  *loss = share.loss;
  *slope = share.slope;
}

int64_t blocks_of(int64_t B) { return B <= kOneBlock ? 1 : 2 * ceil_div(B, kLines); }

cudaError_t take_lines(const GramianLoss& p, cudaStream_t stream) {
  const int64_t blocks = blocks_of(p.B);
  float* losses = p.workspace + p.B * p.B;
  const bool alone = blocks == 1;
  const Lines lines = {p.workspace, p.temperature, p.statistics, alone ? p.loss : losses,
                       alone ? p.slope : losses + blocks, p.B, ceil_div(p.B, kLines), p.smoothing};
  const cudaError_t status = launch(lines_kernel, grid_of(blocks), kThreads, 0, stream, lines);
  if (status != cudaSuccess || alone) return status;
  return launch(total_kernel, 1, kWarpSize, 0, stream, lines.loss, lines.slope, blocks, p.loss, p.slope);
}

// The addresses of one modality's vectors after another's.
struct Modalities {
  const float* at[5];
  float* grad[5];
};

template <class P>
Modalities modalities_of(const P& p, float* grad) {
  Modalities m = {};
  for (int64_t index = 0; index < p.M; ++index) {
    m.at[index] = p.features + index * p.stride_m;
    m.grad[index] = grad == nullptr ? nullptr : grad + index * p.C;
  }
  return m;
}

template <class P>
GramianPairs pairs_of(const P& p, const Modalities& modalities) {
  GramianPairs pairs = {};
  pairs.anchor = modalities.at[0], pairs.others = modalities.at + 1;
  pairs.P = pairs.Q = p.B, pairs.C = p.C, pairs.stride = p.stride_b;
  pairs.k = static_cast<int>(p.M) - 1;
  pairs.unit = true;
  return pairs;
}

bool fits(int64_t M) { return M >= 2 && M <= 5; }

}  // namespace

int64_t gramian_loss_workspace(int64_t B) { return B * B + 2 * blocks_of(B); }

cudaError_t gramian_loss(const GramianLoss& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  if (!fits(p.M)) return cudaErrorInvalidValue;
  const Modalities modalities = modalities_of(p, nullptr);
  GramianPairs pairs = pairs_of(p, modalities);
  pairs.volume = p.workspace;
  const cudaError_t status = gramian_pairs(pairs, stream);
  return status == cudaSuccess ? take_lines(p, stream) : status;
}

cudaError_t gramian_loss_backward(const GramianLossBackward& p, cudaStream_t stream) {
  if (p.B == 0) return cudaSuccess;
  if (!fits(p.M) || p.C == 0) return cudaErrorInvalidValue;
  const Modalities modalities = modalities_of(p, p.grad_features);
  GramianPairs pairs = pairs_of(p, modalities);
  pairs.grad = p.grad;
  pairs.workspace = partition(p.workspace, p.B, p.B, p.C, pairs.k);
  pairs.contrast = {p.temperature, p.statistics, p.slope, p.grad_temperature, p.smoothing};
  const cudaError_t status = gramian_pairs(pairs, stream);
  if (status != cudaSuccess) return status;
  GramianGradients gradients = {};
  gradients.anchor = pairs.anchor, gradients.others = pairs.others, gradients.workspace = pairs.workspace;
  gradients.grad_anchor = modalities.grad[0], gradients.grad_others = modalities.grad + 1;
  gradients.P = gradients.Q = p.B, gradients.C = p.C;
  gradients.stride = p.stride_b, gradients.grad_stride = p.M * p.C;
  gradients.k = pairs.k, gradients.unit = true;
  return gramian_gradients(gradients, stream);
}

}  // namespace signal_reid
