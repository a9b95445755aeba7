// Whether a device runs these kernels: whether its driver is new enough, whether it starts, and whether it finds machine
// code or PTX that fits it.
#include "ops.h"
#include "runtime.cuh"

namespace signal_reid {
namespace {

// Never launched. It is compiled for the same GPUs as every other kernel, so what keeps it from loading keeps them all.
__global__ void probe_kernel() {}

}  // namespace

cudaError_t probe(int device) {
  const CurrentDevice current(device);
  if (current.status() != cudaSuccess) return current.status();
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
}

}  // namespace signal_reid
