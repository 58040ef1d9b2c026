// Parts of prob_sparse_attention on the CPU: schemas, checks, selection, allocation. See prob_sparse.h.
#include "prob_sparse.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "../common/rows.h"

namespace seqops::prob_sparse {
namespace {

const ProbSparseKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::prob_sparse_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("prob_sparse_attention: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

void check_like(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  check_device(op, name, t, like_name, like);
  check_type(op, name, t, {like.scalar_type()});
}

void check_heads(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 4, op, ": ", name, ": expected 4 dimensions [B, T, H, D], got shape ", shape_text(t));
  check_type(op, name, t, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  check(t.size(2) >= 1 && t.size(3) >= 1, op, ": ", name, ": expected at least 1 head and 1 channel, got shape ",
        shape_text(t));
}

void check_divides(const char* op, const char* name, int64_t heads, int64_t of) {
  check(heads >= 1 && of % heads == 0, op, ": ", name, ": expected a number of heads that divides ", of, ", got ",
        heads);
}

// [B, H, N], of heads that key heads divide.
void check_index(const char* op, const Tensor& index, int64_t batches, const char* like_name, const Tensor& like) {
  check_device(op, "index", index, like_name, like);
  check_type(op, "index", index, {ScalarType::Long});
  check(index.dim() == 3 && index.size(0) == batches && index.size(1) >= 1, op, ": index: expected [B, H, N] = [",
        batches, ", H, N], got ", shape_text(index));
}

// ---- layout

int kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: return 0;
  }
}

int64_t bytes_of_real(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? 8 : 4; }
Tensor with_dense_heads(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }
Tensor whole(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
ProbSparseView view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// As many workers as are worth waking for so many operations.
int64_t workers_for(int64_t tasks, double operations) {
  constexpr double WORTH = 1 << 17;
  const double most = std::min<double>(torch::stable::get_num_threads(), operations / WORTH);
  return std::max<int64_t>(1, std::min(tasks, static_cast<int64_t>(most)));
}

void run(int64_t workers, const std::function<void(int64_t worker)>& work) {
  if (workers == 1) return work(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

void clear(Tensor& t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
}

// ---- selection

// The samples of each query that are positions, in their order, and how many.
template <class Index>
void list_samples(const Tensor& sample_index, int32_t* samples, int32_t* counts) {
  const Index* p = static_cast<const Index*>(sample_index.const_data_ptr());
  const int64_t T = sample_index.size(0), U = sample_index.size(1);
  for (int64_t i = 0; i < T; ++i) {
    int32_t* out = samples + i * U;
    for (int64_t u = 0; u < U; ++u) {
      const int64_t j = p[i * U + u];
      if (j >= 0 && j < T) *out++ = static_cast<int32_t>(j);
    }
    counts[i] = static_cast<int32_t>(out - (samples + i * U));
  }
}

struct Ranked {
  double measure;
  int64_t place;
};

// NaN first, then by size; of equal ones the earlier. (-0 equals 0.)
bool before(const Ranked& a, const Ranked& b) {
  const bool a_nan = std::isnan(a.measure), b_nan = std::isnan(b.measure);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.measure != b.measure) return a.measure > b.measure;
  return a.place < b.place;
}

// The places of the N largest of T, ascending.
template <class Real>
void select(const Real* measure, int64_t T, int64_t N, Ranked* ranked, int64_t* index) {
  for (int64_t i = 0; i < T; ++i) ranked[i] = {static_cast<double>(measure[i]), i};
  if (N < T) std::nth_element(ranked, ranked + N, ranked + T, before);
  for (int64_t n = 0; n < N; ++n) index[n] = ranked[n].place;
  std::sort(index, index + N);
}

Tensor rows(const Tensor& q, const Tensor& k, const Tensor& sample_index, int64_t top) {
  const char* op = "prob_sparse_rows";
  check_heads(op, "q", q);
  check_like(op, "k", k, "q", q);
  check(k.dim() == 4, op, ": k: expected 4 dimensions [B, T, Hk, D], got shape ", shape_text(k));
  check_shape(op, "k", k, "[B, T, Hk, D]", {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_divides(op, "k", k.size(2), q.size(2));
  check_device(op, "sample_index", sample_index, "q", q);
  check_type(op, "sample_index", sample_index, {ScalarType::Int, ScalarType::Long});
  check(sample_index.dim() == 2 && sample_index.size(0) == q.size(1), op, ": sample_index: expected [T, U] = [",
        q.size(1), ", U], got ", shape_text(sample_index));
  check(top >= 1, op, ": top: expected an integer >= 1, got ", top);

  ProbSparseMeasure m = {};
  m.B = q.size(0), m.T = q.size(1), m.H = q.size(2), m.D = q.size(3), m.Hk = k.size(2), m.U = sample_index.size(1);
  const int64_t N = std::min(top, m.T);
  Tensor index = torch::stable::new_empty(q, Sizes{m.B, m.H, N}, ScalarType::Long);
  if (index.numel() == 0) return index;
  const Tensor q_read = with_dense_heads(q), k_read = with_dense_heads(k), samples_read = whole(sample_index);
  m.q = view(q_read), m.k = view(k_read);
  const Scratch samples(m.T * m.U * sizeof(int32_t)), counts(m.T * sizeof(int32_t));
  m.samples = static_cast<int32_t*>(samples.get()), m.counts = static_cast<int32_t*>(counts.get());
  if (samples_read.scalar_type() == ScalarType::Int) {
    list_samples<int32_t>(samples_read, static_cast<int32_t*>(samples.get()), static_cast<int32_t*>(counts.get()));
  } else {
    list_samples<int64_t>(samples_read, static_cast<int32_t*>(samples.get()), static_cast<int32_t*>(counts.get()));
  }

  const int64_t real = bytes_of_real(q), threads = torch::stable::get_num_threads(), owners = m.B * m.Hk;
  // Each stretch packs the keys again, which is worth as much as some queries.
  m.stretches = owners >= 2 * threads ? 1 : std::clamp<int64_t>(m.T / 32, 1, 2 * threads);
  m.steps = (m.T + m.stretches - 1) / m.stretches;
  const double operations = 1.0 * m.B * m.H * m.T * (m.U + 1) * m.D;
  const int64_t workers = workers_for(owners * m.stretches, operations);
  const int64_t padded = (m.D + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
  m.scratch_bytes = aligned((m.T + 2) * padded * real);
  const Scratch scratch(workers * m.scratch_bytes), measure(m.B * m.H * m.T * real);
  m.scratch = scratch.get(), m.measure = measure.get();
  alignas(64) int64_t next = 0;
  m.next = &next;
  const auto pass = kernels().measure[kind_of(q.scalar_type())];
  run(workers, [&](int64_t worker) { pass(m, worker); });

  const int64_t heads = m.B * m.H, rankers = workers_for(heads, 16.0 * heads * m.T);
  const Scratch ranked(rankers * m.T * sizeof(Ranked));
  int64_t* const out = static_cast<int64_t*>(index.mutable_data_ptr());
  next = 0;
  run(rankers, [&](int64_t worker) {
    Ranked* own = static_cast<Ranked*>(ranked.get()) + worker * m.T;
    for (;;) {
      const int64_t h = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (h >= heads) return;
      if (real == 8) {
        select(static_cast<const double*>(measure.get()) + h * m.T, m.T, N, own, out + h * N);
      } else {
        select(static_cast<const float*>(measure.get()) + h * m.T, m.T, N, own, out + h * N);
      }
    }
  });
  return index;
}

// ---- the fill

// Shares out the channels among few heads, and runs `pass`. The rest of `f` is set.
void run_fill(ProbSparseFill f, void (*pass)(const ProbSparseFill&, int64_t), int64_t real) {
  const int64_t threads = torch::stable::get_num_threads(), owners = f.B * f.Hk;
  const int64_t vectors = (f.D + MOST_LANES - 1) / MOST_LANES;
  const int64_t wanted = owners >= 2 * threads ? 1 : std::min(vectors, 2 * threads);
  f.width = (vectors + wanted - 1) / wanted * MOST_LANES;
  f.stretches = (f.D + f.width - 1) / f.width;
  f.scratch_bytes = aligned(2 * f.width * real + f.H / f.Hk * static_cast<int64_t>(sizeof(int64_t)));
  const int64_t workers = workers_for(owners * f.stretches, 1.0 * f.B * f.T * (f.H + f.Hk) * f.D);
  const Scratch scratch(workers * f.scratch_bytes);
  f.scratch = scratch.get();
  alignas(64) int64_t next = 0;
  f.next = &next;
  run(workers, [&](int64_t worker) { pass(f, worker); });
}

Tensor fill(const Tensor& v, const Tensor& rows, const Tensor& index, bool causal) {
  const char* op = "prob_sparse_fill";
  check_heads(op, "v", v);
  check_index(op, index, v.size(0), "v", v);
  check_divides(op, "v", v.size(2), index.size(1));
  check_like(op, "rows", rows, "v", v);
  check_shape(op, "rows", rows, "[B, N, H, D]", {v.size(0), index.size(2), index.size(1), v.size(3)});
  ProbSparseFill f = {};
  f.B = v.size(0), f.T = v.size(1), f.Hk = v.size(2), f.D = v.size(3), f.H = index.size(1), f.N = index.size(2);
  f.causal = causal;
  Tensor o = new_output(v, {f.B, f.T, f.H, f.D}, v.scalar_type());
  if (o.numel() == 0) return o;
  const Tensor v_read = with_dense_heads(v), rows_read = with_dense_heads(rows), index_read = whole(index);
  f.v = view(v_read), f.rows = view(rows_read);
  f.index = static_cast<const int64_t*>(index_read.const_data_ptr());
  f.o = o.mutable_data_ptr();
  run_fill(f, kernels().fill[kind_of(v.scalar_type())], bytes_of_real(v));
  return o;
}

std::tuple<Tensor, Tensor> fill_backward(const Tensor& grad, const Tensor& index, int64_t key_heads, bool causal) {
  const char* op = "prob_sparse_fill_backward";
  check_heads(op, "grad", grad);
  check_index(op, index, grad.size(0), "grad", grad);
  check(index.size(1) == grad.size(2), op, ": index: expected H = ", grad.size(2), " heads, got ", index.size(1));
  check_divides(op, "key_heads", key_heads, grad.size(2));
  ProbSparseFill f = {};
  f.B = grad.size(0), f.T = grad.size(1), f.H = grad.size(2), f.D = grad.size(3), f.Hk = key_heads, f.N = index.size(2);
  f.causal = causal;
  Tensor dv = new_output(grad, {f.B, f.T, f.Hk, f.D}, grad.scalar_type());
  Tensor drows = torch::stable::new_empty(grad, Sizes{f.B, f.N, f.H, f.D}, grad.scalar_type());
  if (dv.numel() == 0) {
    clear(drows);
    return {dv, drows};
  }
  const Tensor grad_read = with_dense_heads(grad), index_read = whole(index);
  f.grad = view(grad_read);
  f.index = static_cast<const int64_t*>(index_read.const_data_ptr());
  f.dv = dv.mutable_data_ptr(), f.drows = drows.mutable_data_ptr();
  run_fill(f, kernels().fill_backward[kind_of(grad.scalar_type())], bytes_of_real(grad));
  return {dv, drows};
}

}  // namespace
}  // namespace seqops::prob_sparse

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("prob_sparse_rows(Tensor q, Tensor k, Tensor sample_index, int top) -> Tensor index");
  m.def("prob_sparse_fill(Tensor v, Tensor rows, Tensor index, *, bool causal=False) -> Tensor o");
  m.def(
      "prob_sparse_fill_backward(Tensor grad, Tensor index, int key_heads, *, bool causal=False) "
      "-> (Tensor dv, Tensor drows)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("prob_sparse_rows", TORCH_BOX(&seqops::prob_sparse::rows));
  m.impl("prob_sparse_fill", TORCH_BOX(&seqops::prob_sparse::fill));
  m.impl("prob_sparse_fill_backward", TORCH_BOX(&seqops::prob_sparse::fill_backward));
}
