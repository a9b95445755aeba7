// The Python module signal_reid._C. A launcher takes one dict: the fields of its struct in ops.h by their names, with
// addresses, sizes, strides and dtype tags as plain integers and `Addresses` as a tuple, the number of the tensors' device
// and the stream's address. A field that is missing, unknown or of another type is a TypeError, what CUDA refuses a
// RuntimeError in the words of its runtime.
//
// A launch sets the device itself: the runtime in here is not PyTorch's, and what PyTorch made current in a thread, or puts
// off making current, is its own affair.
//
// A dict, so that no two of up to 24 numbers can change places. It costs 0.7 us more per launch than 19 numbers in a fixed
// order (1.3 against 0.6); keyword arguments would cost 3.5 us, as Python and pybind11 then build dicts of their own.
//
// A launch takes microseconds and never waits, so the GIL is kept. A call with B = 0 launches nothing: it costs what the
// binding costs.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"
#include "runtime.cuh"

namespace py = pybind11;

namespace {

void check(const std::string& op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(op + ": " + cudaGetErrorString(status));
}

// ---- The names of each struct's fields

#define FIELD(name) visit(#name, p.name)

template <class Visit>
void visit_fields(signal_reid::TokenSelection& p, Visit visit) {
  FIELD(tokens), FIELD(intra_query), FIELD(inter_query), FIELD(mask), FIELD(scores);
  FIELD(B), FIELD(M), FIELD(N), FIELD(C), FIELD(splits);
  FIELD(tokens_stride_b), FIELD(tokens_stride_m), FIELD(tokens_stride_n);
  FIELD(intra_stride_b), FIELD(intra_stride_m), FIELD(inter_stride_b), FIELD(inter_stride_m);
  FIELD(k_intra), FIELD(k_inter), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::GramianVolume& p, Visit visit) {
  FIELD(anchor), FIELD(others), FIELD(volume), FIELD(P), FIELD(Q), FIELD(C);
}

template <class Visit>
void visit_fields(signal_reid::GramianVolumeBackward& p, Visit visit) {
  FIELD(grad), FIELD(anchor), FIELD(others), FIELD(grad_anchor), FIELD(grad_others), FIELD(workspace);
  FIELD(P), FIELD(Q), FIELD(C);
}

template <class Visit>
void visit_fields(signal_reid::GramianLoss& p, Visit visit) {
  FIELD(features), FIELD(temperature), FIELD(loss), FIELD(slope), FIELD(statistics), FIELD(workspace);
  FIELD(B), FIELD(M), FIELD(C), FIELD(stride_b), FIELD(stride_m), FIELD(smoothing);
}

template <class Visit>
void visit_fields(signal_reid::GramianLossBackward& p, Visit visit) {
  FIELD(grad), FIELD(features), FIELD(temperature), FIELD(slope), FIELD(statistics);
  FIELD(grad_features), FIELD(grad_temperature), FIELD(workspace);
  FIELD(B), FIELD(M), FIELD(C), FIELD(stride_b), FIELD(stride_m), FIELD(smoothing);
}

template <class Visit>
void visit_fields(signal_reid::DeformableSampling& p, Visit visit) {
  FIELD(tokens), FIELD(offsets), FIELD(sampled);
  FIELD(B), FIELD(H), FIELD(W), FIELD(C), FIELD(Hk), FIELD(Wk);
  FIELD(tokens_stride_b), FIELD(tokens_stride_n), FIELD(offset_range), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::DeformableSamplingBackward& p, Visit visit) {
  FIELD(grad), FIELD(tokens), FIELD(offsets), FIELD(grad_tokens), FIELD(grad_offsets);
  FIELD(B), FIELD(H), FIELD(W), FIELD(C), FIELD(Hk), FIELD(Wk);
  FIELD(tokens_stride_b), FIELD(tokens_stride_n), FIELD(offset_range), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::OffsetHead& p, Visit visit) {
  FIELD(hidden), FIELD(bias), FIELD(window), FIELD(window_bias), FIELD(out), FIELD(offsets);
  FIELD(M), FIELD(B), FIELD(H), FIELD(W), FIELD(C), FIELD(stride_m), FIELD(stride_b), FIELD(stride_n), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::OffsetHeadBackward& p, Visit visit) {
  FIELD(grad), FIELD(hidden), FIELD(bias), FIELD(window), FIELD(window_bias), FIELD(out), FIELD(grad_hidden);
  FIELD(grad_bias), FIELD(grad_window), FIELD(grad_window_bias), FIELD(grad_out), FIELD(shares);
  FIELD(M), FIELD(B), FIELD(H), FIELD(W), FIELD(C), FIELD(stride_m), FIELD(stride_b), FIELD(stride_n);
  FIELD(parts), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::PairwiseError& p, Visit visit) {
  FIELD(maps), FIELD(shares), FIELD(M), FIELD(size), FIELD(blocks), FIELD(scale), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::PairwiseErrorBackward& p, Visit visit) {
  FIELD(grad), FIELD(maps), FIELD(grad_maps), FIELD(M), FIELD(size), FIELD(scale), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::MaskedAttention& p, Visit visit) {
  FIELD(queries), FIELD(tokens), FIELD(mask), FIELD(attended), FIELD(logits), FIELD(parts), FIELD(part_softmax);
  FIELD(B), FIELD(M), FIELD(N), FIELD(Q), FIELD(C), FIELD(splits);
  FIELD(queries_stride_b), FIELD(queries_stride_q);
  FIELD(tokens_stride_b), FIELD(tokens_stride_m), FIELD(tokens_stride_n), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::MaskedAttentionBackward& p, Visit visit) {
  FIELD(grad), FIELD(queries), FIELD(tokens), FIELD(mask), FIELD(attended), FIELD(logits);
  FIELD(grad_queries), FIELD(grad_tokens), FIELD(parts);
  FIELD(B), FIELD(M), FIELD(N), FIELD(Q), FIELD(C), FIELD(splits);
  FIELD(grad_stride_b), FIELD(grad_stride_q), FIELD(queries_stride_b), FIELD(queries_stride_q);
  FIELD(tokens_stride_b), FIELD(tokens_stride_m), FIELD(tokens_stride_n), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::AddLayerNorm& p, Visit visit) {
  FIELD(x), FIELD(branch), FIELD(weight), FIELD(bias), FIELD(total), FIELD(normed), FIELD(rows), FIELD(C), FIELD(eps);
  FIELD(x_dtype), FIELD(branch_dtype), FIELD(weight_dtype), FIELD(total_dtype), FIELD(normed_dtype);
}

template <class Visit>
void visit_fields(signal_reid::AddLayerNormBackward& p, Visit visit) {
  FIELD(grad_normed), FIELD(grad_total), FIELD(total), FIELD(weight), FIELD(grad_x), FIELD(grad_branch), FIELD(shares);
  FIELD(rows), FIELD(C), FIELD(blocks), FIELD(eps);
  FIELD(normed_dtype), FIELD(total_dtype), FIELD(weight_dtype), FIELD(branch_dtype);
}

template <class Visit>
void visit_fields(signal_reid::QuickGELU& p, Visit visit) {
  FIELD(x), FIELD(y), FIELD(size), FIELD(dtype);
}

template <class Visit>
void visit_fields(signal_reid::QuickGELUBackward& p, Visit visit) {
  FIELD(grad), FIELD(x), FIELD(grad_x), FIELD(size), FIELD(dtype);
}

#undef FIELD

// ---- Values of Python as fields

void read(py::handle value, int64_t& field) { field = value.cast<int64_t>(); }

void read(py::handle value, int& field) { field = value.cast<int>(); }

void read(py::handle value, float& field) { field = value.cast<float>(); }

void read(py::handle value, signal_reid::DType& field) { field = static_cast<signal_reid::DType>(value.cast<int>()); }

template <class T>
void read(py::handle value, T*& field) {
  field = reinterpret_cast<T*>(value.cast<uintptr_t>());
}

template <class T>
void read(py::handle value, signal_reid::Addresses<T>& field) {
  const size_t size = py::isinstance<py::tuple>(value) ? py::len(value) : 0;
  if (size < 1 || size > 4) throw py::cast_error("a tuple of 1 to 4 addresses is allowed");
  for (const py::handle address : value) read(address, field.at[field.k++]);
}

// ---- Launchers

template <class P>
class Launcher {
 public:
  Launcher(const char* op, cudaError_t (*launch)(const P&, cudaStream_t)) : op_(op), launch_(launch) {
    P p = {};
    visit_fields(p, [&](const char* name, auto&) { add(name); });
    add("device");
    add("stream");
  }

  void operator()(const py::dict& given) const {
    P p = {};
    int device = 0;
    cudaStream_t stream = nullptr;
    size_t index = 0;
    const auto fill = [&](const char*, auto& field) { read_named(given, names_[index++], field); };
    visit_fields(p, fill);
    fill("device", device);
    fill("stream", stream);
    if (given.size() != names_.size()) refuse_unknown(given);
    const signal_reid::CurrentDevice current(device);
    check(op_, current.status());
    check(op_, launch_(p, stream));
  }

  std::string doc() const { return "Launch with the fields " + listing_ + "."; }

 private:
  // Interned as the names in Python's source are, so that a look-up compares addresses.
  void add(const char* name) {
    names_.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)));
    listing_ += (listing_.empty() ? "" : ", ") + std::string(name);
  }

  template <class T>
  void read_named(const py::dict& given, const py::object& name, T& field) const {
    PyObject* value = PyDict_GetItemWithError(given.ptr(), name.ptr());
    if (value == nullptr) throw py::type_error(op_ + ": the field " + std::string(py::str(name)) + " is missing");
    try {
      read(value, field);
    } catch (const py::cast_error& error) {
      throw py::type_error(op_ + ": the field " + std::string(py::str(name)) + " is " + std::string(py::repr(value)) + ": " +
                           error.what());
    }
  }

  void refuse_unknown(const py::dict& given) const {
    for (const auto& [key, value] : given) {
      bool known = false;
      for (const py::object& name : names_) known = known || name.equal(key);
      if (!known) throw py::type_error(op_ + " has no field " + std::string(py::str(key)) + ": " + listing_);
    }
  }

  std::string op_, listing_;
  cudaError_t (*launch_)(const P&, cudaStream_t);
  std::vector<py::object> names_;
};

template <class P>
void define(py::module_& m, const char* op, cudaError_t (*launch)(const P&, cudaStream_t)) {
  Launcher<P> launcher(op, launch);
  const std::string doc = launcher.doc();
  m.def(op, std::move(launcher), py::arg("fields"), py::pos_only(), doc.c_str());
}

int64_t select_tokens_shared_bytes(int64_t M, int64_t N, int64_t C, int dtype) {
  return signal_reid::select_tokens_shared_bytes(M, N, C, static_cast<signal_reid::DType>(dtype));
}

std::string cuda_version(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// Why a device cannot run the kernels, with the two versions that mostly decide it; None where it can.
py::object probe(int device) {
  cudaError_t status = cudaSuccess;
  int driver = 0;
  {
    const py::gil_scoped_release others_run;  // a device takes a while to start
    status = signal_reid::probe(device);
    if (status != cudaSuccess) cudaDriverGetVersion(&driver);
  }
  if (status == cudaSuccess) return py::none();
  const std::string serves = driver == 0 ? "there is no driver" : "the driver serves CUDA " + cuda_version(driver) + " at most";
  return py::str(cudaGetErrorString(status) + (" (the native core is built with CUDA " + cuda_version(CUDART_VERSION)) + ", " +
                 serves + ")");
}

int shared_bytes_per_block(int device) {
  int bytes = 0;
  check("shared_bytes_per_block", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Launchers of signal-reid's CUDA kernels; called by signal_reid.ops.cuda.";
#ifdef SIGNAL_REID_SIMT_EMULATOR
  m.attr("architectures") = py::make_tuple();
#else
#define SIGNAL_REID_TEXT(x) #x
#define SIGNAL_REID_EXPANDED_TEXT(x) SIGNAL_REID_TEXT(x)
  m.attr("architectures") = py::tuple(py::str(SIGNAL_REID_EXPANDED_TEXT(SIGNAL_REID_ARCHITECTURES)).attr("split")("_"));
#endif
  define(m, "select_tokens", signal_reid::select_tokens);
  m.def("select_tokens_shared_bytes", select_tokens_shared_bytes, py::kw_only(), py::arg("M"), py::arg("N"), py::arg("C"),
        py::arg("dtype"));
  define(m, "gramian_volume", signal_reid::gramian_volume);
  m.def("gramian_volume_workspace", signal_reid::gramian_volume_workspace, py::kw_only(), py::arg("P"), py::arg("Q"),
        py::arg("C"), py::arg("k"));
  define(m, "gramian_volume_backward", signal_reid::gramian_volume_backward);
  define(m, "gramian_loss", signal_reid::gramian_loss);
  m.def("gramian_loss_workspace", signal_reid::gramian_loss_workspace, py::kw_only(), py::arg("B"));
  define(m, "gramian_loss_backward", signal_reid::gramian_loss_backward);
  define(m, "deformable_sample", signal_reid::deformable_sample);
  define(m, "deformable_sample_backward", signal_reid::deformable_sample_backward);
  define(m, "offset_head", signal_reid::offset_head);
  define(m, "offset_head_backward", signal_reid::offset_head_backward);
  define(m, "pairwise_error", signal_reid::pairwise_error);
  define(m, "pairwise_error_backward", signal_reid::pairwise_error_backward);
  define(m, "attend_masked", signal_reid::attend_masked);
  define(m, "attend_masked_backward", signal_reid::attend_masked_backward);
  define(m, "add_layer_norm", signal_reid::add_layer_norm);
  define(m, "add_layer_norm_backward", signal_reid::add_layer_norm_backward);
  define(m, "quick_gelu", signal_reid::quick_gelu);
  define(m, "quick_gelu_backward", signal_reid::quick_gelu_backward);
  m.def("probe", probe, "Why a device cannot run the kernels, in CUDA's words; None where it can. It starts the device.",
        py::arg("device"));
  m.def("shared_bytes_per_block", shared_bytes_per_block, "The most shared memory that a block may have on a device.",
        py::arg("device"));
}
