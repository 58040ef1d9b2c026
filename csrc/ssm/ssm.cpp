// ssm_kernel and cauchy_kernel on the CPU: schemas, checks, allocation, and the choice of kernels. See ssm.h.
#include "ssm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../common/tensor.h"

namespace seqops::ssm {
namespace {

#define SEQOPS_ROW(name) \
  case Isa::name: return name::SEQOPS_TABLE;

const SsmKernels& ssm_kernels() {
#define SEQOPS_TABLE ssm_kernels
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("ssm_kernel: no kernels for this instruction set");
  }
#undef SEQOPS_TABLE
}

const CauchyKernels& cauchy_kernels() {
#define SEQOPS_TABLE cauchy_kernels
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("cauchy_kernel: no kernels for this instruction set");
  }
#undef SEQOPS_TABLE
}

// ---- checks

void check_modes(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 2, op, ": ", name, ": expected 2 dimensions [H, N], got shape ", shape_text(t));
  const bool complex = t.scalar_type() == ScalarType::ComplexFloat || t.scalar_type() == ScalarType::ComplexDouble;
  check(complex, op, ": ", name, ": expected complex64 or complex128, got ", dtype_text(t.scalar_type()));
}

void check_dtype_of(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  check(t.scalar_type() == expected, op, ": ", name, ": expected ", dtype_text(expected), ", got ",
        dtype_text(t.scalar_type()));
}

// [H, N] as `like`, and of its dtype.
void check_as(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  check_device(op, name, t, like_name, like);
  check_shape(op, name, t, "[H, N]", {like.size(0), like.size(1)});
  check_dtype_of(op, name, t, like.scalar_type());
}

bool is_wide(const Tensor& t) { return t.scalar_type() == ScalarType::ComplexDouble; }
ScalarType real_part_of(const Tensor& t) { return is_wide(t) ? ScalarType::Double : ScalarType::Float; }
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

// Runs `kernel(worker)` on as many threads as are worth it.
template <class Kernel>
void run(int64_t tasks, double operations, const Kernel& kernel) {
  constexpr double WORTH = 1 << 17;  // operations that take as long as waking a thread
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::max<int64_t>(1, std::min({threads, tasks, static_cast<int64_t>(operations / WORTH)}));
  if (workers == 1) return kernel(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) kernel(worker);
  });
}

int64_t most_workers() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// ---- ssm_kernel

void check_ssm_kernel(const char* op, const Tensor& z, const Tensor& c, int64_t length) {
  check_modes(op, "z", z);
  check_as(op, "c", c, "z", z);
  check(length >= 0, op, ": length: expected 0 or more, got ", length);
}

// Columns of a row: about the root of the length, so that tables cost least.
int64_t columns_of(int64_t length) {
  int64_t C = 16;
  while (C < MOST_COLUMNS && C * C < length) C *= 2;
  return C;
}

SsmKernel arguments(const Tensor& z, const Tensor& c, int64_t length, bool backward) {
  SsmKernel k = {};
  k.H = z.size(0), k.N = z.size(1), k.L = length;
  k.C = columns_of(length);
  k.segments = (length + k.C * k.C - 1) / (k.C * k.C);
  k.z = z.const_data_ptr(), k.c = c.const_data_ptr();
  const int64_t numbers = backward ? MODES * 6 * k.C + 2 * k.C + 2 * k.C * k.C : MODES * 4 * k.C;
  k.scratch_bytes = (numbers * static_cast<int64_t>(z.element_size()) / 2 + 63) / 64 * 64;
  return k;
}

Tensor ssm_kernel(const Tensor& z, const Tensor& c, int64_t length) {
  check_ssm_kernel("ssm_kernel", z, c, length);
  if (z.size(1) == 0) return zeros(z, {z.size(0), length}, real_part_of(z));
  Tensor out = new_output(z, {z.size(0), length}, real_part_of(z));
  if (out.numel() == 0) return out;
  const Tensor z_read = dense(z), c_read = dense(c);
  SsmKernel k = arguments(z_read, c_read, length, false);
  k.k = out.mutable_data_ptr();
  const Scratch scratch(most_workers() * k.scratch_bytes);
  k.scratch = scratch.get();
  alignas(64) int64_t next = 0;
  k.next = &next;
  const SsmKernelPass pass = ssm_kernels().forward[is_wide(z)];
  run(k.H * k.segments, 4.0 * k.H * k.N * k.L, [&](int64_t worker) { pass(k, worker); });
  return out;
}

// dz = 2 conj(c sum_l l dk_l e^{l z}) and dc = 2 conj(sum_l dk_l e^{l z}), of sums of segments in their order.
template <class T>
void combine(const SsmKernel& k, Tensor& dz, Tensor& dc) {
  using C = std::complex<T>;
  const C* c = static_cast<const C*>(k.c);
  C *to_z = static_cast<C*>(dz.mutable_data_ptr()), *to_c = static_cast<C*>(dc.mutable_data_ptr());
  for (int64_t h = 0; h < k.H; ++h) {
    for (int64_t n = 0; n < k.N; ++n) {
      double sum[4] = {};
      for (int64_t s = 0; s < k.segments; ++s) {
        const double* part = k.sums + ((h * k.segments + s) * k.N + n) * 4;
        for (int i = 0; i < 4; ++i) sum[i] += part[i];
      }
      const int64_t i = h * k.N + n;
      const double re = c[i].real(), im = c[i].imag();
      to_c[i] = C(static_cast<T>(2 * sum[0]), static_cast<T>(-2 * sum[1]));
      to_z[i] = C(static_cast<T>(2 * (re * sum[2] - im * sum[3])), static_cast<T>(-2 * (re * sum[3] + im * sum[2])));
    }
  }
}

std::tuple<Tensor, Tensor> ssm_kernel_backward(const Tensor& dk, const Tensor& z, const Tensor& c) {
  const char* op = "ssm_kernel_backward";
  check(dk.dim() == 2, op, ": dk: expected 2 dimensions [H, length], got shape ", shape_text(dk));
  const int64_t length = dk.size(1);
  check_ssm_kernel(op, z, c, length);
  check_device(op, "dk", dk, "z", z);
  check_shape(op, "dk", dk, "[H, length]", {z.size(0), length});
  check_dtype_of(op, "dk", dk, real_part_of(z));
  const Sizes sizes = {z.size(0), z.size(1)};
  if (z.numel() == 0 || length == 0) return {zeros(z, sizes, z.scalar_type()), zeros(z, sizes, z.scalar_type())};
  Tensor dz = new_output(z, sizes, z.scalar_type()), dc = new_output(z, sizes, z.scalar_type());
  const Tensor z_read = dense(z), c_read = dense(c), dk_read = dense(dk);
  SsmKernel k = arguments(z_read, c_read, length, true);
  k.dk = dk_read.const_data_ptr();
  const Scratch scratch(most_workers() * k.scratch_bytes), sums(k.H * k.segments * k.N * 4 * sizeof(double));
  k.scratch = scratch.get();
  k.sums = static_cast<double*>(sums.get());
  alignas(64) int64_t next = 0;
  k.next = &next;
  const SsmKernelPass pass = ssm_kernels().backward[is_wide(z)];
  run(k.H * k.segments, 8.0 * k.H * k.N * k.L, [&](int64_t worker) { pass(k, worker); });
  if (is_wide(z))
    combine<double>(k, dz, dc);
  else
    combine<float>(k, dz, dc);
  return {dz, dc};
}

// ---- cauchy_kernel

void check_cauchy_kernel(const char* op, const Tensor& v, const Tensor& nodes, const Tensor& w) {
  check_modes(op, "v", v);
  check_device(op, "nodes", nodes, "v", v);
  check(nodes.dim() == 1, op, ": nodes: expected 1 dimension [L], got shape ", shape_text(nodes));
  check_dtype_of(op, "nodes", nodes, v.scalar_type());
  check_as(op, "w", w, "v", v);
}

constexpr int64_t GROUP = 8;  // heads whose gradients of nodes are one sum

// The parts of nodes apart. Infinite ones become finite, and are marked; the last node fills the vectors.
template <class T>
void split_nodes(const Tensor& nodes, int64_t padded, T* parts) {
  const T* p = static_cast<const T*>(nodes.const_data_ptr());
  const int64_t L = nodes.size(0);
  for (int64_t i = 0; i < padded; ++i) {
    const T re = p[2 * std::min(i, L - 1)], im = p[2 * std::min(i, L - 1) + 1];
    const bool infinite = std::isinf(re) || std::isinf(im);
    parts[i] = infinite ? std::numeric_limits<T>::max() / 16 : re;
    parts[padded + i] = infinite ? T(0) : im;
    parts[2 * padded + i] = infinite ? T(0) : T(1);
  }
}

// What both passes read; `nodes_read` and `parts` outlive it.
CauchyKernel arguments(const Tensor& v, const Tensor& nodes, const Tensor& w, void* parts, int64_t group) {
  CauchyKernel k = {};
  k.H = v.size(0), k.N = v.size(1), k.L = nodes.size(0);
  k.group = group;
  k.stretches = (k.L + NODES - 1) / NODES;
  k.padded = (k.L + 15) / 16 * 16;
  k.v = v.const_data_ptr(), k.w = w.const_data_ptr();
  if (is_wide(v))
    split_nodes(nodes, k.padded, static_cast<double*>(parts));
  else
    split_nodes(nodes, k.padded, static_cast<float*>(parts));
  k.nodes = parts;
  return k;
}

int64_t bytes_of_parts(const Tensor& nodes) { return 3 * (nodes.size(0) + 15) * static_cast<int64_t>(sizeof(double)); }

Tensor cauchy_kernel(const Tensor& v, const Tensor& nodes, const Tensor& w) {
  check_cauchy_kernel("cauchy_kernel", v, nodes, w);
  if (v.size(1) == 0) return zeros(v, {v.size(0), nodes.size(0)}, v.scalar_type());
  Tensor out = new_output(v, {v.size(0), nodes.size(0)}, v.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor v_read = dense(v), w_read = dense(w), nodes_read = dense(nodes);
  const Scratch parts(bytes_of_parts(nodes));
  CauchyKernel k = arguments(v_read, nodes_read, w_read, parts.get(), 1);
  k.y = out.mutable_data_ptr();
  alignas(64) int64_t next = 0;
  k.next = &next;
  const CauchyKernelPass pass = cauchy_kernels().forward[is_wide(v)];
  run(k.H * k.stretches, 25.0 * k.H * k.N * k.L, [&](int64_t) { pass(k); });
  return out;
}

// Sums of stretches and of groups of heads, in their order.
template <class T>
void combine(const CauchyKernel& k, Tensor& dv, Tensor& dnodes, Tensor& dw) {
  using C = std::complex<T>;
  const C* v = static_cast<const C*>(k.v);
  C *to_v = static_cast<C*>(dv.mutable_data_ptr()), *to_w = static_cast<C*>(dw.mutable_data_ptr());
  for (int64_t h = 0; h < k.H; ++h) {
    for (int64_t n = 0; n < k.N; ++n) {
      double sum[4] = {};
      for (int64_t s = 0; s < k.stretches; ++s) {
        const T* part = static_cast<const T*>(k.sums) + ((h * k.stretches + s) * k.N + n) * 4;
        for (int i = 0; i < 4; ++i) sum[i] += part[i];
      }
      const int64_t i = h * k.N + n;
      const double re = v[i].real(), im = v[i].imag();
      to_v[i] = C(static_cast<T>(sum[0]), static_cast<T>(sum[1]));
      to_w[i] = C(static_cast<T>(re * sum[2] + im * sum[3]), static_cast<T>(re * sum[3] - im * sum[2]));
    }
  }
  if (k.dnodes == nullptr) return;
  C* to_nodes = static_cast<C*>(dnodes.mutable_data_ptr());
  for (int64_t i = 0; i < k.L; ++i) {
    double re = 0, im = 0;
    for (int64_t g = 0; g < (k.H + k.group - 1) / k.group; ++g) {
      const T* part = static_cast<const T*>(k.dnodes) + g * 2 * k.L + i;
      re += part[0], im += part[k.L];
    }
    to_nodes[i] = C(static_cast<T>(re), static_cast<T>(im));
  }
}

std::tuple<Tensor, Tensor, Tensor> cauchy_kernel_backward(const Tensor& dy, const Tensor& v, const Tensor& nodes,
                                                          const Tensor& w, bool wants_nodes) {
  const char* op = "cauchy_kernel_backward";
  check_cauchy_kernel(op, v, nodes, w);
  check_device(op, "dy", dy, "v", v);
  check_shape(op, "dy", dy, "[H, L]", {v.size(0), nodes.size(0)});
  check_dtype_of(op, "dy", dy, v.scalar_type());
  const ScalarType dtype = v.scalar_type();
  const Sizes modes = {v.size(0), v.size(1)}, of_nodes = {wants_nodes ? nodes.size(0) : 0};
  if (v.numel() == 0 || nodes.size(0) == 0) {
    return {zeros(v, modes, dtype), zeros(v, of_nodes, dtype), zeros(v, modes, dtype)};
  }
  Tensor dv = new_output(v, modes, dtype), dw = new_output(v, modes, dtype), dnodes = new_output(v, of_nodes, dtype);
  const Tensor v_read = dense(v), w_read = dense(w), nodes_read = dense(nodes), dy_read = dense(dy);
  const Scratch parts(bytes_of_parts(nodes));
  CauchyKernel k = arguments(v_read, nodes_read, w_read, parts.get(), GROUP);
  const int64_t groups = (k.H + GROUP - 1) / GROUP, size = static_cast<int64_t>(v.element_size()) / 2;
  const Scratch sums(k.H * k.stretches * k.N * 4 * size), heads(wants_nodes ? groups * 2 * k.L * size : 0);
  k.dy = dy_read.const_data_ptr();
  k.sums = sums.get();
  k.dnodes = wants_nodes ? heads.get() : nullptr;
  alignas(64) int64_t next = 0;
  k.next = &next;
  const CauchyKernelPass pass = cauchy_kernels().backward[is_wide(v)];
  run(groups * k.stretches, 60.0 * k.H * k.N * k.L, [&](int64_t) { pass(k); });
  if (is_wide(v))
    combine<double>(k, dv, dnodes, dw);
  else
    combine<float>(k, dv, dnodes, dw);
  return {dv, dnodes, dw};
}

}  // namespace
}  // namespace seqops::ssm

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("ssm_kernel(Tensor z, Tensor c, SymInt length) -> Tensor");
  m.def("ssm_kernel_backward(Tensor dk, Tensor z, Tensor c) -> (Tensor dz, Tensor dc)");
  m.def("cauchy_kernel(Tensor v, Tensor nodes, Tensor w) -> Tensor");
  m.def(
      "cauchy_kernel_backward(Tensor dy, Tensor v, Tensor nodes, Tensor w, *, bool wants_nodes=True) "
      "-> (Tensor dv, Tensor dnodes, Tensor dw)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("ssm_kernel", TORCH_BOX(&seqops::ssm::ssm_kernel));
  m.impl("ssm_kernel_backward", TORCH_BOX(&seqops::ssm::ssm_kernel_backward));
  m.impl("cauchy_kernel", TORCH_BOX(&seqops::ssm::cauchy_kernel));
  m.impl("cauchy_kernel_backward", TORCH_BOX(&seqops::ssm::cauchy_kernel_backward));
}
