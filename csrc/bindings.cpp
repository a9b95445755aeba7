// The Python module signal_reid._C: every function takes device addresses, sizes, element strides, a dtype tag and a stream
// as plain integers, in the order of the structs of ops.h, and raises RuntimeError with the words of the CUDA runtime.
//
// A launch takes microseconds and never waits, so the GIL is kept. A call with B = 0 launches nothing: it costs what the
// binding costs.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T = const void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

signal_reid::DType dtype_at(int tag) { return static_cast<signal_reid::DType>(tag); }

void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

void select_tokens(Address tokens, Address intra_query, Address inter_query, Address mask, int64_t B, int64_t M, int64_t N,
                   int64_t C, int64_t tokens_stride_b, int64_t tokens_stride_m, int64_t tokens_stride_n,
                   int64_t intra_stride_b, int64_t intra_stride_m, int64_t inter_stride_b, int64_t inter_stride_m,
                   int64_t k_intra, int64_t k_inter, int dtype, Address stream) {
  const signal_reid::TokenSelection p = {
      pointer(tokens), pointer(intra_query), pointer(inter_query), pointer<bool>(mask), B, M, N, C,
      tokens_stride_b, tokens_stride_m, tokens_stride_n, intra_stride_b, intra_stride_m, inter_stride_b, inter_stride_m,
      k_intra, k_inter};
  check("select_tokens", signal_reid::select_tokens(p, static_cast<signal_reid::DType>(dtype), stream_at(stream)));
}

// Fills an array of addresses from a tuple and returns its length.
template <class T>
int fill_addresses(T* (&addresses)[4], const py::tuple& given) {
  if (given.size() < 1 || given.size() > 4) throw std::invalid_argument("others must hold 1 to 4 addresses");
  for (size_t i = 0; i < given.size(); ++i) addresses[i] = pointer<T>(given[i].cast<Address>());
  return static_cast<int>(given.size());
}

void gramian_volume(Address anchor, const py::tuple& others, Address volume, int64_t P, int64_t Q, int64_t C, Address stream) {
  signal_reid::GramianVolume p = {};
  p.anchor = pointer<const float>(anchor);
  p.k = fill_addresses(p.others, others);
  p.volume = pointer<float>(volume);
  p.P = P, p.Q = Q, p.C = C;
  check("gramian_volume", signal_reid::gramian_volume(p, stream_at(stream)));
}

void gramian_volume_backward(Address grad, Address anchor, const py::tuple& others, Address grad_anchor,
                             const py::tuple& grad_others, Address workspace, int64_t P, int64_t Q, int64_t C, Address stream) {
  signal_reid::GramianVolumeBackward p = {};
  p.grad = pointer<const float>(grad);
  p.anchor = pointer<const float>(anchor);
  p.k = fill_addresses(p.others, others);
  p.grad_anchor = pointer<float>(grad_anchor);
  if (fill_addresses(p.grad_others, grad_others) != p.k) throw std::invalid_argument("grad_others must be as many as others");
  p.workspace = pointer<float>(workspace);
  p.P = P, p.Q = Q, p.C = C;
  check("gramian_volume_backward", signal_reid::gramian_volume_backward(p, stream_at(stream)));
}

void deformable_sample(Address tokens, Address offsets, Address sampled, int64_t B, int64_t H, int64_t W, int64_t C, int64_t Hk,
                       int64_t Wk, int64_t tokens_stride_b, int64_t tokens_stride_n, float offset_range, int dtype,
                       Address stream) {
  const signal_reid::DeformableSampling p = {pointer(tokens), pointer(offsets), pointer<void>(sampled), B, H, W, C, Hk, Wk,
                                             tokens_stride_b, tokens_stride_n, offset_range};
  check("deformable_sample", signal_reid::deformable_sample(p, static_cast<signal_reid::DType>(dtype), stream_at(stream)));
}

void deformable_sample_backward(Address grad, Address tokens, Address offsets, Address grad_tokens, Address grad_offsets,
                                int64_t B, int64_t H, int64_t W, int64_t C, int64_t Hk, int64_t Wk, int64_t tokens_stride_b,
                                int64_t tokens_stride_n, float offset_range, int dtype, Address stream) {
  const signal_reid::DeformableSamplingBackward p = {
      pointer(grad), pointer(tokens), pointer(offsets), pointer<void>(grad_tokens), pointer<void>(grad_offsets),
      B, H, W, C, Hk, Wk, tokens_stride_b, tokens_stride_n, offset_range};
  check("deformable_sample_backward",
        signal_reid::deformable_sample_backward(p, static_cast<signal_reid::DType>(dtype), stream_at(stream)));
}

void add_layer_norm(Address x, Address branch, Address weight, Address bias, Address total, Address normed, int64_t rows,
                    int64_t C, float eps, int x_dtype, int branch_dtype, int weight_dtype, int total_dtype, int normed_dtype,
                    Address stream) {
  const signal_reid::AddLayerNorm p = {
      pointer(x), pointer(branch), pointer(weight), pointer(bias), pointer<void>(total), pointer<void>(normed), rows, C, eps,
      dtype_at(x_dtype), dtype_at(branch_dtype), dtype_at(weight_dtype), dtype_at(total_dtype), dtype_at(normed_dtype)};
  check("add_layer_norm", signal_reid::add_layer_norm(p, stream_at(stream)));
}

void add_layer_norm_backward(Address grad_normed, Address grad_total, Address total, Address weight, Address grad_x,
                             Address grad_branch, Address shares, int64_t rows, int64_t C, int64_t blocks, float eps,
                             int normed_dtype, int total_dtype, int weight_dtype, int branch_dtype, Address stream) {
  const signal_reid::AddLayerNormBackward p = {
      pointer(grad_normed), pointer(grad_total), pointer(total), pointer(weight), pointer<void>(grad_x),
      pointer<void>(grad_branch), pointer<float>(shares), rows, C, blocks, eps,
      dtype_at(normed_dtype), dtype_at(total_dtype), dtype_at(weight_dtype), dtype_at(branch_dtype)};
  check("add_layer_norm_backward", signal_reid::add_layer_norm_backward(p, stream_at(stream)));
}

void quick_gelu(Address x, Address y, int64_t size, int dtype, Address stream) {
  const signal_reid::QuickGELU p = {pointer(x), pointer<void>(y), size};
  check("quick_gelu", signal_reid::quick_gelu(p, dtype_at(dtype), stream_at(stream)));
}

void quick_gelu_backward(Address grad, Address x, Address grad_x, int64_t size, int dtype, Address stream) {
  const signal_reid::QuickGELUBackward p = {pointer(grad), pointer(x), pointer<void>(grad_x), size};
  check("quick_gelu_backward", signal_reid::quick_gelu_backward(p, dtype_at(dtype), stream_at(stream)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Launchers of signal-reid's CUDA kernels; called by signal_reid.ops.cuda.";
#ifdef SIGNAL_REID_SIMT_EMULATOR
  m.attr("built_with_cuda") = false;
  m.attr("cuda_version") = "emulated";
  m.attr("architectures") = py::make_tuple();
#else
  m.attr("built_with_cuda") = true;
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#define SIGNAL_REID_TEXT(x) #x
#define SIGNAL_REID_EXPANDED_TEXT(x) SIGNAL_REID_TEXT(x)
  m.attr("architectures") = py::tuple(py::str(SIGNAL_REID_EXPANDED_TEXT(SIGNAL_REID_ARCHITECTURES)).attr("split")("_"));
#endif
  m.def("select_tokens", &select_tokens);
  m.def("gramian_volume", &gramian_volume);
  m.def("gramian_volume_workspace", &signal_reid::gramian_volume_workspace);
  m.def("gramian_volume_backward", &gramian_volume_backward);
  m.def("deformable_sample", &deformable_sample);
  m.def("deformable_sample_backward", &deformable_sample_backward);
  m.def("add_layer_norm", &add_layer_norm);
  m.def("add_layer_norm_backward", &add_layer_norm_backward);
  m.def("quick_gelu", &quick_gelu);
  m.def("quick_gelu_backward", &quick_gelu_backward);
}
