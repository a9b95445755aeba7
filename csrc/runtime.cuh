// What every launcher needs: dtypes, strides, argument checks and the launch itself. No torch header anywhere in csrc/.
//
// Launchers take a struct of raw device addresses, sizes, element strides and dtype tags, and a stream; they return
// cudaError_t, never allocate and never synchronise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace signal_reid {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Calls body.template operator()<T>() with the type of a dtype tag.
template <class Body>
cudaError_t dispatch_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body.template operator()<float>();
    case DType::float16:
      return body.template operator()<__half>();
    case DType::bfloat16:
      return body.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

// Launches a kernel; the first error of the launch itself is returned, nothing waits for the device.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  // More than 48 KiB of dynamic shared memory has to be asked for, once per kernel; asking again costs little.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Makes a device the thread's current one for as long as it lives, and then the former one again. Where it is current
// already, which is nearly always, that is one look. A negative number is none: the emulator's and an empty tensor's memory
// is the host's.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    if (device < 0) return;
    status_ = cudaGetDevice(&former_);
    if (status_ != cudaSuccess || former_ == device) return;
    status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(former_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int former_ = 0;
  cudaError_t status_ = cudaSuccess;
  bool changed_ = false;
};

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid along x, on every GPU

// A grid of that many blocks; of none, which no launch accepts, where that is too many.
inline dim3 grid_of(int64_t blocks) { return dim3(blocks > kMostBlocks ? 0 : static_cast<unsigned>(blocks)); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace signal_reid
