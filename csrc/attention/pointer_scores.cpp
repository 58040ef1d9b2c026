// pointer_scores on the CPU: schemas, checks, allocation, and the choice of kernels. See pointer_scores.h.
#include "pointer_scores.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "../common/rows.h"

namespace seqops::pointer {
namespace {

const PointerScoresKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::pointer_scores_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("pointer_scores: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

struct Arguments {
  const Tensor &query, &key;
  const Optional& weight;
  const std::string& mode;
  double clip;
  const Optional& lengths;

  bool clipped() const { return mode == "clipped_dot"; }
};

void check_arguments(const char* op, const Arguments& a) {
  using enum ScalarType;
  const Tensor &query = a.query, &key = a.key;
  check(query.dim() == 3, op, ": query: expected 3 dimensions [B, Tq, A], got shape ", shape_text(query));
  check_type(op, "query", query, {Float, Double, BFloat16, Half});
  check(query.size(2) >= 1, op, ": query: expected at least 1 channel, got shape ", shape_text(query));
  check_device(op, "key", key, "query", query);
  check_type(op, "key", key, {query.scalar_type()});
  const bool fits = key.dim() == 3 && key.size(0) == query.size(0) && key.size(2) == query.size(2);
  check(fits, op, ": key: expected [B, Tk, A] = [", query.size(0), ", Tk, ", query.size(2), "], got ", shape_text(key));
  check(a.mode == "additive" || a.mode == "clipped_dot", op, ": mode: expected one of additive, clipped_dot, got '",
        a.mode, "'");
  check(a.weight || a.clipped(), op, ": weight: expected a tensor with mode 'additive', got None");
  if (a.weight) {
    check_device(op, "weight", *a.weight, "query", query);
    check_type(op, "weight", *a.weight, {query.scalar_type(), real_of(query.scalar_type())});
    check_shape(op, "weight", *a.weight, "[A]", {query.size(2)});
  }
  check(a.clip > 0, op, ": clip: expected a number > 0, got ", a.clip);
  if (a.lengths) {
    check_device(op, "lengths", *a.lengths, "query", query);
    check_type(op, "lengths", *a.lengths, {Int, Long});
    check_shape(op, "lengths", *a.lengths, "[B]", {query.size(0)});
  }
}

// ---- the work

int kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: return 0;
  }
}

Tensor with_dense_rows(const Tensor& t) { return dense_from(t, 2) ? t : torch::stable::contiguous(t); }
PointerView view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void clear(Tensor& t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
}

// Kept between 0 and Tk.
std::vector<int64_t> lengths_of(const Optional& lengths, int64_t B, int64_t Tk) {
  std::vector<int64_t> values(B, Tk);
  if (!lengths) return values;
  const bool narrow = lengths->scalar_type() == ScalarType::Int;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t at = b * lengths->stride(0);
    const int64_t value = narrow ? static_cast<const int32_t*>(lengths->const_data_ptr())[at]
                                 : static_cast<const int64_t*>(lengths->const_data_ptr())[at];
    values[b] = std::clamp<int64_t>(value, 0, Tk);
  }
  return values;
}

// The weights in T, filled up with zeros to `padded`; returns whether some are too large for sums of products.
template <class T>
bool fill_weight(const Tensor& weight, int64_t padded, T* out) {
  constexpr T MOST = 1e15;
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  bool calm = true;
  for (int64_t a = 0; a < padded; ++a) {
    out[a] = a < weight.size(0) ? from[a] : T(0);
    calm = calm && std::abs(out[a]) <= MOST;
  }
  return !calm;
}

// A call as the kernels take it, and the memory that it points to.
struct Call {
  Tensor query, key;
  std::vector<int64_t> lengths;
  PointerScores p = {};
  int kind, clipped;
  int64_t real;
  alignas(64) int64_t next = 0;
  Scratch weight, queries, keys, wild;

  explicit Call(const Arguments& a)
      : query(with_dense_rows(a.query)),
        key(with_dense_rows(a.key)),
        lengths(lengths_of(a.lengths, a.query.size(0), a.key.size(1))),
        kind(kind_of(a.query.scalar_type())),
        clipped(a.clipped()),
        real(kind == 1 ? 8 : 4) {
    p.B = query.size(0), p.Tq = query.size(1), p.Tk = key.size(1), p.A = query.size(2);
    p.clip = a.clip;
    p.query = view(query), p.key = view(key);
    p.lengths = lengths.data();
    const int64_t width = 2 * kernels().lanes[kind];
    p.blocks = (p.A + width - 1) / width;
    const int64_t padded = p.blocks * width;
    if (!clipped) {
      weight = Scratch(padded * real);
      const Tensor read = *dense(a.weight, real_of(a.query.scalar_type()));
      p.wild_weight = real == 8 ? fill_weight(read, padded, static_cast<double*>(weight.get()))
                                : fill_weight(read, padded, static_cast<float*>(weight.get()));
      p.weight = weight.get();
    }
    queries = Scratch(p.B * p.Tq * padded * real), keys = Scratch(p.B * p.Tk * padded * real);
    wild = Scratch(p.B * (p.Tq + p.Tk));
    p.queries = queries.get(), p.keys = keys.get();
    p.wild_queries = static_cast<uint8_t*>(wild.get()), p.wild_keys = p.wild_queries + p.B * p.Tq;
    p.next = &next;
  }

  Call(const Call&) = delete;

  int64_t tasks_of(int64_t rows) const { return (rows + ROWS_OF_TASK - 1) / ROWS_OF_TASK; }
  double pairs() const { return 1.0 * p.B * p.Tq * p.Tk * p.A; }

  // `pass(p, worker)` on as many threads as are worth it, each with so many bytes of its own.
  void run(int64_t tasks, double operations, int64_t bytes, const std::function<void(int64_t worker)>& pass) {
    constexpr double WORTH = 1 << 16;  // operations that take as long as waking a thread
    const double most = std::min<double>(torch::stable::get_num_threads(), operations / WORTH);
    const int64_t workers = std::max<int64_t>(1, std::min(tasks, static_cast<int64_t>(most)));
    p.scratch_bytes = aligned(bytes);
    const Scratch scratch(workers * p.scratch_bytes);
    p.scratch = scratch.get();
    next = 0;
    if (workers == 1) return pass(0);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) pass(worker);
    });
  }

  void prepare() {
    const int64_t rows = p.B * (p.Tq + p.Tk);
    run(tasks_of(rows), 4.0 * rows * p.A, 0, [&](int64_t) { kernels().prepare[kind][clipped](p); });
  }
};

// log_p, and the same in float where the storage type has 16 bits and it is wanted.
std::tuple<Tensor, Tensor> compute(const char* op, const Arguments& a, bool wants_exact) {
  check_arguments(op, a);
  const int64_t B = a.query.size(0), Tq = a.query.size(1), Tk = a.key.size(1);
  const ScalarType dtype = a.query.scalar_type();
  const bool narrow = real_of(dtype) != dtype;
  Tensor log_p = new_output(a.query, {B, Tq, Tk}, dtype);
  Tensor exact = new_output(a.query, {B, Tq, narrow && wants_exact ? Tk : 0}, real_of(dtype));
  if (log_p.numel() == 0) return {log_p, exact};
  Call call(a);
  call.p.log_p = log_p.mutable_data_ptr();
  call.p.exact = narrow && wants_exact ? exact.mutable_data_ptr() : nullptr;
  call.prepare();
  const auto pass = kernels().forward[call.kind][call.clipped];
  call.run(call.tasks_of(B * Tq), call.pairs(), (Tk + 32) * call.real, [&](int64_t worker) { pass(call.p, worker); });
  return {log_p, exact};
}

Tensor pointer_scores(const Tensor& query, const Tensor& key, Optional weight, std::string mode, double clip,
                      Optional lengths) {
  return std::get<0>(compute("pointer_scores", {query, key, weight, mode, clip, lengths}, false));
}

std::tuple<Tensor, Tensor> pointer_scores_forward(const Tensor& query, const Tensor& key, Optional weight,
                                                  std::string mode, double clip, Optional lengths) {
  return compute("pointer_scores", {query, key, weight, mode, clip, lengths}, true);
}

// The gradient of the weights is that of each row of the batch, [B, A]; [B, 0] where there is none.
std::tuple<Tensor, Tensor, Tensor> pointer_scores_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                           Optional weight, const Tensor& log_p, std::string mode,
                                                           double clip, Optional lengths) {
  const char* op = "pointer_scores_backward";
  const Arguments a = {query, key, weight, mode, clip, lengths};
  check_arguments(op, a);
  const int64_t B = query.size(0), Tq = query.size(1), Tk = key.size(1), A = query.size(2);
  const ScalarType dtype = query.scalar_type(), real = real_of(dtype);
  check_device(op, "grad", grad, "query", query);
  check_type(op, "grad", grad, {dtype});
  check_shape(op, "grad", grad, "[B, Tq, Tk]", {B, Tq, Tk});
  check_device(op, "log_p", log_p, "query", query);
  check_type(op, "log_p", log_p, {real});
  check_shape(op, "log_p", log_p, "[B, Tq, Tk]", {B, Tq, Tk});
  Tensor dquery = new_output(query, {B, Tq, A}, dtype), dkey = new_output(query, {B, Tk, A}, dtype);
  Tensor dweight = torch::stable::new_empty(query, Sizes{B, a.clipped() ? 0 : A}, real);
  if (grad.numel() == 0) {
    clear(dquery), clear(dkey), clear(dweight);
    return {dquery, dkey, dweight};
  }
  const Tensor grad_read = with_dense_rows(grad);
  const Tensor saved = log_p.is_contiguous() ? log_p : torch::stable::contiguous(log_p);
  Call call(a);
  call.prepare();
  const Scratch ds(B * Tq * Tk * call.real);
  PointerScores& p = call.p;
  p.grad = view(grad_read), p.saved = saved.const_data_ptr(), p.ds = ds.get();
  p.dquery = dquery.mutable_data_ptr(), p.dkey = dkey.mutable_data_ptr(), p.dweight = dweight.mutable_data_ptr();
  const auto first = kernels().score_gradient[call.kind][call.clipped];
  const double operations = call.clipped ? call.pairs() : 16.0 * B * Tq * Tk;
  call.run(call.tasks_of(B * Tq), operations, 0, [&](int64_t worker) { first(p, worker); });
  const auto second = kernels().backward[call.kind][call.clipped];
  const int64_t width = 2 * kernels().lanes[call.kind];
  call.run(B * p.blocks, 2 * call.pairs(), Tk * width * call.real, [&](int64_t worker) { second(p, worker); });
  return {dquery, dkey, dweight};
}

}  // namespace
}  // namespace seqops::pointer

#define OPTIONS "str mode=\"additive\", float clip=10.0, Tensor? lengths=None)"

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("pointer_scores(Tensor query, Tensor key, Tensor? weight, *, " OPTIONS " -> Tensor log_p");
  m.def("pointer_scores_forward(Tensor query, Tensor key, Tensor? weight, *, " OPTIONS
        " -> (Tensor log_p, Tensor exact)");
  m.def("pointer_scores_backward(Tensor grad, Tensor query, Tensor key, Tensor? weight, Tensor log_p, *, " OPTIONS
        " -> (Tensor dquery, Tensor dkey, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("pointer_scores", TORCH_BOX(&seqops::pointer::pointer_scores));
  m.impl("pointer_scores_forward", TORCH_BOX(&seqops::pointer::pointer_scores_forward));
  m.impl("pointer_scores_backward", TORCH_BOX(&seqops::pointer::pointer_scores_backward));
}
