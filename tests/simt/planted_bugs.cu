// Kernels with known results or known bugs, for the tests of the emulator itself: `planted_bugs NAME [SEED]`.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "simt.cuh"
#include "tensor_cores.cuh"

extern "C" void simt_seed(uint64_t seed);

namespace {

using namespace signal_reid;

// Each thread hands a value to its mirror image through shared memory.
template <bool with_barrier>
__global__ void reverse_dynamic(const int* in, int* out) {
  int* staged = reinterpret_cast<int*>(dynamic_shared());
  staged[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

template <bool with_barrier>
__global__ void reverse_static(const int* in, int* out) {
  __shared__ int staged[64];
  staged[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

// The same within one warp, where a shuffle does not order memory but __syncwarp does.
template <bool with_syncwarp>
__global__ void reverse_in_warp(const int* in, int* out) {
  int* staged = reinterpret_cast<int*>(dynamic_shared());
  staged[threadIdx.x] = in[threadIdx.x];
  if (with_syncwarp) __syncwarp();
  if (!with_syncwarp) out[threadIdx.x] = __shfl_sync(kFullWarp, in[threadIdx.x], 0);
  out[threadIdx.x] = staged[threadIdx.x ^ 31];
}

__global__ void read_past(const int* in, int* out, int past) { out[threadIdx.x] = in[threadIdx.x + past]; }

__global__ void read_past_dynamic(int* out, int past) {
  int* staged = reinterpret_cast<int*>(dynamic_shared());
  staged[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x + past];
}

__global__ void read_past_static(int* out, int past) {
  __shared__ int staged[64];
  staged[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x + past];
}

__global__ void read_misaligned(const int* in, int* out) { out[0] = load_vector(in + 1).at[0]; }

__global__ void read_unwritten(float* dynamic_value, float* static_value) {
  __shared__ float fixed[8];
  *dynamic_value = reinterpret_cast<float*>(dynamic_shared())[1];
  *static_value = fixed[blockIdx.x];
  if (blockIdx.x == 1000) fixed[blockIdx.x % 8] = 1.0f;
}

__global__ void barrier_in_branch() {
  if (threadIdx.x < 16) __syncthreads();
}

__global__ void barrier_in_both_branches() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void mismatched_masks() { __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1, 16); }
__global__ void mask_without_caller() { __syncwarp(0xfffffffeu); }

__global__ void collectives(int* wrong) {
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const auto expect = [&](bool right) { if (!right) atomicAdd(wrong, 1); };
  expect(__shfl_sync(kFullWarp, t, 5) == 32 * warp + 5);
  expect(__shfl_sync(kFullWarp, t, 5, 8) == t - lane % 8 + 5);
  expect(__shfl_up_sync(kFullWarp, t, 3) == (lane < 3 ? t : t - 3));
  expect(__shfl_down_sync(kFullWarp, t, 3, 16) == (lane % 16 > 12 ? t : t + 3));
  expect(__shfl_xor_sync(kFullWarp, t + 0.5f, 9) == (t ^ 9) + 0.5f);
  expect(__ballot_sync(kFullWarp, lane % 3 == 0) == 0x49249249u);
  expect(__any_sync(kFullWarp, lane == 7) == 1 && __any_sync(kFullWarp, 0) == 0);
  expect(__all_sync(kFullWarp, 1) == 1 && __all_sync(kFullWarp, lane != 7) == 0);
  expect(__reduce_add_sync(kFullWarp, lane) == 496 && __reduce_min_sync(kFullWarp, -lane) == -31);
  expect(__reduce_max_sync(kFullWarp, static_cast<unsigned>(-lane)) == ~0u);
  expect(__match_any_sync(kFullWarp, lane % 2) == (lane % 2 == 1 ? 0xaaaaaaaau : 0x55555555u));
  expect(warp_sum(1.0f) == 32.0f);
  expect(__syncthreads_count(t < 40) == 40 && __syncthreads_or(t == 3) != 0 && __syncthreads_and(t < 40) == 0);
  if (lane < 10) expect(__ballot_sync(0x3ffu, lane > 4) == 0x3e0u);
  expect(__popc(0xf0u) == 4 && __clz(1) == 31 && __ffs(8) == 4 && __ffs(0) == 0 && __brev(1u) == 0x80000000u);
}

__global__ void conversions(int* wrong) {
  const auto expect = [&](bool right) { if (!right) atomicAdd(wrong, 1); };
  expect(__half_as_ushort(__float2half_rn(1.00048828125f)) == 0x3c00);   // a tie goes to the even neighbour
  expect(__half_as_ushort(__float2half_rn(1.00146484375f)) == 0x3c02);
  expect(__half_as_ushort(__float2half_rn(65520.0f)) == 0x7c00);         // rounds to infinity
  expect(__half2float(__ushort_as_half(0x0001)) == 5.9604644775390625e-8f);
  expect(__bfloat16_as_ushort(__float2bfloat16_rn(1.00390625f)) == 0x3f80);
  expect(__bfloat16_as_ushort(__float2bfloat16_rn(1.01171875f)) == 0x3f82);
  expect(__bfloat162float(__float2bfloat16_rn(-3.0f)) == -3.0f);
  const float nan = __int_as_float(0x7fffffff);
  expect(isnan(__half2float(__float2half_rn(nan))) && isnan(__bfloat162float(__float2bfloat16_rn(nan))));
}

__global__ void count_atomically(int* counts) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x < 2) shared[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&shared[threadIdx.x % 2], 1);
  __syncthreads();
  if (threadIdx.x < 2) atomicAdd(&counts[threadIdx.x], shared[threadIdx.x]);
}

__global__ void log_order(int* next, int* order) { order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x; }

__global__ void sum_blocks(const float* in, float* out) {
  float* partial = reinterpret_cast<float*>(dynamic_shared());
  const float sum = warp_sum(in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    out[blockIdx.x] = total;
  }
}

// One warp: a (16, 16) times b (16, 8), which comes as its transpose; once with the operands as they lie, once with their
// transposes, which are then transposed as they are loaded. `products` is (2, 16, 8).
template <class T, bool waits, bool with_syncwarp>
__global__ void multiply_on_tensor_cores(const T* a, const T* b_transposed, float* products) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  T* plain_a = reinterpret_cast<T*>(dynamic_shared());
  T *plain_b = plain_a + 256, *turned_a = plain_b + 128, *turned_b = turned_a + 256;
  copy_async(plain_a + lane * 8, a + lane * 8, true);
  if (lane < 16) copy_async(plain_b + lane * 8, b_transposed + lane * 8, true);
  commit_copies();
  for (int i = lane; i < 256; i += 32) turned_a[i % 16 * 16 + i / 16] = a[i];
  for (int i = lane; i < 128; i += 32) turned_b[i % 16 * 8 + i / 16] = b_transposed[i];
  if (waits) wait_for_copies<0>();
  if (with_syncwarp) __syncwarp();
  for (int turned = 0; turned < 2; ++turned) {
    unsigned left[4], right[4];
    if (turned == 0) {
      load_matrices(left, plain_a + lane % 16 * 16 + lane / 16 * 8);
      load_matrices(right, plain_b + lane % 8 * 16 + lane / 8 % 2 * 8);
    } else {
      load_matrices_transposed(left, turned_a + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
      load_matrices_transposed(right, turned_b + lane % 16 * 8);
    }
    float sum[4] = {};
    multiply_add<T>(sum, left, right[0], right[1]);
    for (int e = 0; e < 4; ++e) products[turned * 128 + (g + e / 2 * 8) * 8 + t * 2 + e % 2] = sum[e];
  }
}

int failures = 0;

void report(cudaError_t status) { std::printf("%s\n", cudaGetErrorString(status)); }

template <class Kernel>
void reverse(Kernel kernel, int threads) {
  std::vector<int> in(threads), out(threads, -7);
  for (int i = 0; i < threads; ++i) in[i] = i;
  report(launch(kernel, 1, threads, threads * sizeof(int), nullptr, in.data(), out.data()));
  for (int i = 0; i < threads; ++i) failures += out[i] != threads - 1 - i;
}

template <class T, bool waits = true, bool with_syncwarp = true>
void multiply() {
  std::vector<T> a(256), b(128);
  std::vector<float> products(256, -7.0f);
  for (int i = 0; i < 256; ++i) a[i] = from_float<T>(static_cast<float>(i * 37 % 101 - 50));
  for (int i = 0; i < 128; ++i) b[i] = from_float<T>(static_cast<float>(i * 29 % 97 - 48));
  const size_t shared = 2 * (256 + 128) * sizeof(T);
  const auto kernel = multiply_on_tensor_cores<T, waits, with_syncwarp>;
  report(launch(kernel, 1, 32, shared, nullptr, a.data(), b.data(), products.data()));
  for (int i = 0; i < 256; ++i) {
    float expected = 0.0f;  // of integers, exact
    for (int k = 0; k < 16; ++k) expected += to_float(a[i % 128 / 8 * 16 + k]) * to_float(b[i % 8 * 16 + k]);
    failures += products[i] != expected;
  }
}

void limits() {
  int* none = nullptr;
  report(launch(count_atomically, 1, 1025, 8, nullptr, none));
  report(launch(count_atomically, 0, 32, 8, nullptr, none));
  report(launch(count_atomically, dim3(1, 65536), 32, 8, nullptr, none));
  report(launch(count_atomically, 1, dim3(1, 1, 65), 8, nullptr, none));
  report(launch(count_atomically, 1, 32, 99 * 1024 + 1, nullptr, none));
  int counts[2] = {};
  report(launch(count_atomically, 3, 100, 99 * 1024, nullptr, +counts));
  failures += counts[0] != 150 || counts[1] != 150;
}

void run(const char* name) {
  std::vector<int> ints(64), out(64);
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("barrier")) reverse(reverse_dynamic<true>, 64), reverse(reverse_static<true>, 64);
  if (is("missing barrier, dynamic")) reverse(reverse_dynamic<false>, 64);
  if (is("missing barrier, static")) reverse(reverse_static<false>, 64);
  if (is("syncwarp")) reverse(reverse_in_warp<true>, 32);
  if (is("missing syncwarp")) reverse(reverse_in_warp<false>, 32);
  if (is("past global")) report(launch(read_past, 1, 64, 0, nullptr, ints.data(), out.data(), 1));
  if (is("past dynamic")) report(launch(read_past_dynamic, 1, 64, 256, nullptr, out.data(), 1));
  if (is("past static")) report(launch(read_past_static, 1, 64, 0, nullptr, out.data(), 1));
  if (is("misaligned")) report(launch(read_misaligned, 1, 1, 0, nullptr, ints.data(), out.data()));
  if (is("barrier in branch")) report(launch(barrier_in_branch, 1, 64, 0, nullptr));
  if (is("barrier in both branches")) report(launch(barrier_in_both_branches, 1, 64, 0, nullptr));
  if (is("mismatched masks")) report(launch(mismatched_masks, 1, 32, 0, nullptr));
  if (is("mask without caller")) report(launch(mask_without_caller, 1, 32, 0, nullptr));
  if (is("collectives")) report(launch(collectives, 2, 96, 0, nullptr, &failures));
  if (is("conversions")) report(launch(conversions, 1, 1, 0, nullptr, &failures));
  if (is("tensor cores")) multiply<__half>(), multiply<__nv_bfloat16>();
  if (is("missing wait for a copy")) multiply<__half, false>();
  if (is("missing syncwarp after a copy")) multiply<__half, true, false>();
  if (is("limits")) limits();
  if (is("unwritten")) {
    float values[2] = {};
    report(launch(read_unwritten, 1, 1, 64, nullptr, &values[0], &values[1]));
    failures += values[0] == values[0] || values[1] == values[1];
  }
  if (is("order")) {
    int next = 0, order[12];
    report(launch(log_order, 3, 4, 0, nullptr, &next, +order));
    for (int place : order) std::printf("%d ", place);
  }
  if (is("many blocks")) {
    std::vector<float> in(512 * 256, 1.0f), sums(512);
    report(launch(sum_blocks, 512, 256, 8 * sizeof(float), nullptr, in.data(), sums.data()));
    for (float sum : sums) failures += sum != 256.0f;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2) simt_seed(std::strtoull(argv[2], nullptr, 10));
  run(argv[1]);
  if (failures > 0) std::printf("%d wrong results\n", failures);
  return failures > 0;
}
