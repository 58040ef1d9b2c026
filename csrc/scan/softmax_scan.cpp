// softmax_scan on the CPU: schema, checks, allocation, and the choice of kernel. See scan.h for the notation.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "host.h"

namespace seqops::scan {
namespace {

// ---- checks

struct Shape {
  int64_t B, T, H, D;
};

Shape check_inputs(const char* op, const Tensor& s, const Tensor& v) {
  check(s.dim() == 3, op, ": s: expected 3 dimensions [B, T, H], got shape ", shape_text(s));
  check(s.size(2) >= 1, op, ": s: expected at least 1 head, got shape ", shape_text(s));
  check_device(op, "v", v, "s", s);
  check(v.dim() == 4, op, ": v: expected 4 dimensions [B, T, H, D], got shape ", shape_text(v));
  const bool fits = v.size(0) == s.size(0) && v.size(1) == s.size(1) && v.size(2) == s.size(2);
  check(fits, op, ": v: expected [B, T, H] = ", shape_text(s), " in front, got ", shape_text(v));
  check(v.size(3) >= 1, op, ": v: expected at least 1 value a head, got shape ", shape_text(v));
  using enum ScalarType;
  check_type(op, "v", v, {Float, Double, BFloat16, Half});
  if (v.scalar_type() == Double) {
    check_type(op, "s", s, {BFloat16, Half, Float, Double});
  } else {
    check_type(op, "s", s, {BFloat16, Half, Float});
  }
  return {v.size(0), v.size(1), v.size(2), v.size(3)};
}

void check_state(const char* op, const char* name, const Optional& state, const Tensor& like, const Shape& shape,
                 int64_t rows, bool packed, bool values) {
  if (!state) return;
  check_device(op, name, *state, "s", like);
  const char* letters = values ? (packed ? "[N, H, D]" : "[B, H, D]") : (packed ? "[N, H]" : "[B, H]");
  if (values) {
    check_shape(op, name, *state, letters, {rows, shape.H, shape.D});
  } else {
    check_shape(op, name, *state, letters, {rows, shape.H});
  }
}

void check_initial(const char* op, const Tensor& s, const Tensor& v, const Shape& shape, const Optional& initial_lse,
                   const Optional& initial_out, int64_t rows, bool packed) {
  check(!initial_lse || initial_out, op, ": initial_out: expected together with initial_lse, got None");
  check(!initial_out || initial_lse, op, ": initial_lse: expected together with initial_out, got None");
  if (!initial_lse) return;
  const ScalarType real = real_of(v.scalar_type());
  check_state(op, "initial_lse", initial_lse, s, shape, rows, packed, false);
  check_type(op, "initial_lse", *initial_lse, {s.scalar_type(), real});
  check_state(op, "initial_out", initial_out, s, shape, rows, packed, true);
  check_type(op, "initial_out", *initial_out, {v.scalar_type(), real});
}

// ---- both passes

struct Types {
  ScalarType score;
  Pair pair;
};

Types types_of(ScalarType v, ScalarType s) {
  using enum ScalarType;
  if (v == Double) return {v, Pair::float64};
  if (v == Float) return {v, Pair::float32};
  if (v == BFloat16) return s == v ? Types{v, Pair::bfloat16} : Types{Float, Pair::bfloat16_float32};
  return s == v ? Types{v, Pair::float16} : Types{Float, Pair::float16_float32};
}

// The states (m, u) and, by a head, o that a walk carries.
struct States {
  Tensor m, u, o;
};

// (lse, out) enters as (m, u) = (lse, 1), or as nothing seen yet where lse is -inf.
template <class Real>
void fill_initial(States& states, const Optional& lse, const Optional& out, int64_t D) {
  Real *m = static_cast<Real*>(states.m.mutable_data_ptr()), *u = static_cast<Real*>(states.u.mutable_data_ptr());
  Real* o = static_cast<Real*>(states.o.mutable_data_ptr());
  constexpr Real NOTHING = -std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < states.m.numel(); ++i) {
    m[i] = lse ? static_cast<const Real*>(lse->const_data_ptr())[i] : NOTHING;
    const bool empty = m[i] == NOTHING;
    u[i] = empty ? 0 : 1;
    for (int64_t d = 0; d < D; ++d)
      o[i * D + d] = empty ? 0 : static_cast<const Real*>(out->const_data_ptr())[i * D + d];
  }
}

States initial_states(const Tensor& like, const Shape& shape, int64_t rows, const Optional& initial_lse,
                      const Optional& initial_out) {
  const ScalarType real = real_of(like.scalar_type());
  States states = {torch::stable::new_empty(like, Sizes{rows, shape.H}, real),
                   torch::stable::new_empty(like, Sizes{rows, shape.H}, real),
                   torch::stable::new_empty(like, Sizes{rows, shape.H, shape.D}, real)};
  const Optional lse = dense(initial_lse, real), out = dense(initial_out, real);
  if (real == ScalarType::Double) {
    fill_initial<double>(states, lse, out, shape.D);
  } else {
    fill_initial<float>(states, lse, out, shape.D);
  }
  return states;
}

// What chunks need at their beginnings. Forward: a reduced chunk says (m, u, o) of its own steps.
template <class Real>
void join_forward(const Plan::Chunked& chunked, Real* m, Real* u, Real* o, int64_t H, int64_t D) {
  constexpr Real INF = std::numeric_limits<Real>::infinity();
  for (int64_t h = 0; h < H; ++h) {
    const auto at = [&](int64_t i) { return (chunked.slot + i) * H + h; };
    Real past_m = m[at(0)], past_u = u[at(0)];
    std::vector<Real> past(o + at(0) * D, o + at(0) * D + D);
    for (int64_t i = 1; i < chunked.chunks; ++i) {
      const int64_t c = at(i);
      const Real own_m = m[c], own_u = u[c];
      m[c] = past_m, u[c] = past_u;
      for (int64_t d = 0; d < D; ++d)
        std::swap(o[c * D + d], past[d]);  // o: at the beginning; past: of the chunk alone
      if (i + 1 == chunked.chunks) break;
      const Real most = own_m > past_m ? own_m : past_m;
      const auto weight = [&](Real part_m, Real part_u) {
        return part_u == 0 ? Real(0) : (part_m == most ? part_u : part_u * std::exp(part_m - most));
      };
      // As in a walk, +inf twice is NaN.
      const Real twice = past_m == INF && own_m == INF ? std::numeric_limits<Real>::quiet_NaN() : Real(0);
      const Real before = weight(past_m, past_u), own = weight(own_m, own_u), sum = before + own + twice;
      for (int64_t d = 0; d < D; ++d) {
        const Real old = past_u == 0 ? 0 : before / sum * o[c * D + d], added = own_u == 0 ? 0 : own / sum * past[d];
        past[d] = old + added;
      }
      past_m = most, past_u = sum;
    }
  }
}

// Backward: it says R and r for nothing coming in, and the product of alpha, 0 where the past was empty.
template <class Real>
void join_backward(const Plan::Chunked& chunked, Real* r, Real* product, Real* R, int64_t H, int64_t D) {
  const auto fold = [&](Real* values, int64_t width, int64_t h, int64_t d) {
    const auto at = [&](int64_t i) { return ((chunked.slot + i) * H + h) * width + d; };
    Real state = values[at(0)];
    for (int64_t i = 1; i < chunked.chunks; ++i) {
      const Real out = values[at(i)], factor = product[(chunked.slot + i) * H + h];
      values[at(i)] = state;
      state = factor == 0 ? out : factor * state + out;
    }
  };
  for (int64_t h = 0; h < H; ++h) {
    fold(r, 1, h, 0);
    for (int64_t d = 0; d < D; ++d) fold(R, D, h, d);
  }
}

// Reduced chunks start from nothing: forward (m, u) = (-inf, 0), backward a product of 1.
template <class Real>
void start_chunks(const Plan& plan, const SoftmaxScan& k, bool backward) {
  for (const Plan::Chunked& chunked : plan.chunked) {
    const int64_t from = (chunked.slot + 1) * k.H, count = (chunked.chunks - 1) * k.H;
    std::fill_n(static_cast<Real*>(k.carry_m) + from, count, backward ? 0 : -std::numeric_limits<Real>::infinity());
    std::fill_n(static_cast<Real*>(k.carry_u) + from, count, backward ? 1 : 0);
  }
}

template <class Real>
bool join_chunks(const Plan::Chunked& chunked, const SoftmaxScan& k, bool backward) {
  Real *first = static_cast<Real*>(k.carry_m), *second = static_cast<Real*>(k.carry_u),
       *values = static_cast<Real*>(k.carry);
  if (backward) {
    join_backward(chunked, first, second, values, k.H, k.D);
  } else {
    join_forward(chunked, first, second, values, k.H, k.D);
  }
  return true;
}

void run(const SoftmaxScan& arguments, Pair pair, const std::vector<Row>& rows, Plan& plan, const Work& work,
         const Carried& m, const Carried& u, const Carried& o, bool backward) {
  SoftmaxScan k = arguments;
  const SoftmaxScanKernels& kernels = softmax_scan_kernels();
  const bool wide = pair == Pair::float64;
  const int64_t real_bytes = wide ? 8 : 4;
  k.rows = rows.data();
  k.block = plan.block;
  k.carry = o.data(), k.carry_m = m.data(), k.carry_u = u.data();
  k.scratch_bytes = (4 * plan.block * k.H * real_bytes + 63) / 64 * 64;
  const Scratch scratch(plan.workers * k.scratch_bytes);
  k.scratch = scratch.get();
  wide ? start_chunks<double>(plan, k, backward) : start_chunks<float>(plan, k, backward);
  const auto kernel = [&](const std::vector<Task>& tasks, bool reduce, int64_t* next, int64_t worker) {
    SoftmaxScan task = k;
    task.tasks = tasks.data(), task.count = static_cast<int64_t>(tasks.size()), task.next = next;
    const SoftmaxScanKernel* pass = backward ? (reduce ? kernels.backward_reduce : kernels.backward)
                                             : (reduce ? kernels.forward_reduce : kernels.forward);
    pass[static_cast<int>(pair)](task, worker);
  };
  const auto join = [&](const Plan::Chunked& chunked) {
    return wide ? join_chunks<double>(chunked, k, backward) : join_chunks<float>(chunked, k, backward);
  };
  execute(plan, rows, work, kernel, join);
  m.finish(), u.finish(), o.finish();
}

Work work_of(const Shape& shape, int64_t element_bytes, bool backward) {
  const int64_t bytes = shape.D * element_bytes;
  return {shape.H, 1, (backward ? 4 : 2) * bytes, 0.6, bytes};
}

// ---- forward

struct Result {
  Tensor o, lse;
  Optional m, u;  // in training
};

Result forward(const Tensor& s, const Tensor& v, const Optional& initial_lse, const Optional& initial_out, bool reverse,
               const Optional& cu_seqlens, bool train) {
  const char* op = "softmax_scan";
  const Shape shape = check_inputs(op, s, v);
  const std::vector<Row> rows = rows_of(op, "s", s, cu_seqlens);
  const int64_t B = shape.B, T = shape.T, N = static_cast<int64_t>(rows.size());
  check_initial(op, s, v, shape, initial_lse, initial_out, N, cu_seqlens.has_value());
  const Types types = types_of(v.scalar_type(), s.scalar_type());
  const ScalarType real = real_of(v.scalar_type());

  const Sizes of_heads = {B, T, shape.H};
  Result out = {new_output(v, {B, T, shape.H, shape.D}, v.scalar_type()), new_output(v, of_heads, real), {}, {}};
  if (train) out.m = new_output(v, of_heads, real), out.u = new_output(v, of_heads, real);
  if (B == 0 || T == 0) return out;

  const Tensor scores = with_dense_steps(as_type(s, types.score)), values = with_dense_steps(v);
  States states = initial_states(v, shape, N, initial_lse, initial_out);
  SoftmaxScan k = {};
  k.H = shape.H, k.D = shape.D, k.descending = reverse;
  k.s = sequence(scores, B, T), k.v = sequence(values, B, T);
  k.o = sequence(out.o, B, T), k.lse = sequence(out.lse, B, T);
  k.m = sequence(out.m, B, T), k.u = sequence(out.u, B, T);
  const Work work = work_of(shape, v.element_size(), false);
  Plan plan = make_plan(rows, work);
  const Carried m(plan, states.m), u(plan, states.u), o(plan, states.o);
  run(k, types.pair, rows, plan, work, m, u, o, false);
  return out;
}

std::tuple<Tensor, Tensor> softmax_scan(const Tensor& s, const Tensor& v, Optional initial_lse, Optional initial_out,
                                        bool reverse, Optional cu_seqlens) {
  const Result out = forward(s, v, initial_lse, initial_out, reverse, cu_seqlens, false);
  return {out.o, out.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_scan_forward(const Tensor& s, const Tensor& v, Optional initial_lse,
                                                                Optional initial_out, bool reverse,
                                                                Optional cu_seqlens) {
  const Result out = forward(s, v, initial_lse, initial_out, reverse, cu_seqlens, true);
  return {out.o, out.lse, *out.m, *out.u};
}

// ---- backward

// dinitial_lse = alpha_0 (<R_0, initial_out> - r_0), from what the walk carried to the first step; nothing reaches a
// state that was empty.
template <class Real>
void finish_initial(Tensor& dlse, Tensor& dout, const States& initial, int64_t D) {
  Real *r = static_cast<Real*>(dlse.mutable_data_ptr()), *R = static_cast<Real*>(dout.mutable_data_ptr());
  const Real* u = static_cast<const Real*>(initial.u.const_data_ptr());
  const Real* o = static_cast<const Real*>(initial.o.const_data_ptr());
  for (int64_t i = 0; i < dlse.numel(); ++i) {
    Real dot = 0;
    for (int64_t d = 0; d < D; ++d) {
      if (u[i] == 0) R[i * D + d] = 0;
      if (R[i * D + d] != 0)
        dot += R[i * D + d] * o[i * D + d];  // in an empty sequence nothing meets an infinite state
    }
    r[i] = u[i] == 0 ? 0 : dot - r[i];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_scan_backward(Optional grad_o, Optional grad_lse, const Tensor& s,
                                                                 const Tensor& v, const Tensor& o, const Tensor& m,
                                                                 const Tensor& u, Optional initial_lse,
                                                                 Optional initial_out, bool reverse,
                                                                 Optional cu_seqlens) {
  const char* op = "softmax_scan_backward";
  const Shape shape = check_inputs(op, s, v);
  const std::vector<Row> rows = rows_of(op, "s", s, cu_seqlens);
  const int64_t B = shape.B, T = shape.T, H = shape.H, D = shape.D, N = static_cast<int64_t>(rows.size());
  check_initial(op, s, v, shape, initial_lse, initial_out, N, cu_seqlens.has_value());
  const Types types = types_of(v.scalar_type(), s.scalar_type());
  const ScalarType real = real_of(v.scalar_type());
  const auto check_sequence = [&](const char* name, const Optional& t, bool values) {
    if (!t) return;
    check_device(op, name, *t, "s", s);
    check_type(op, name, *t, {values ? v.scalar_type() : real});
    if (values) {
      check_shape(op, name, *t, "[B, T, H, D]", {B, T, H, D});
    } else {
      check_shape(op, name, *t, "[B, T, H]", {B, T, H});
    }
  };
  check_sequence("grad_o", grad_o, true), check_sequence("grad_lse", grad_lse, false);
  check_sequence("o", o, true), check_sequence("m", m, false), check_sequence("u", u, false);

  Tensor ds = new_output(s, {B, T, H}, types.score), dv = new_output(v, {B, T, H, D}, v.scalar_type());
  Tensor dlse = new_state(v, {N, H}, real, {}), dout = new_state(v, {N, H, D}, real, {});
  if (B == 0 || T == 0) return {as_type(ds, s.scalar_type()), dv, dlse, dout};

  const auto in = [&](const Optional& t, ScalarType dtype) {
    return t ? Optional(with_dense_steps(as_type(*t, dtype))) : t;
  };
  const Optional scores = in(s, types.score), values = in(v, v.scalar_type()), out = in(o, v.scalar_type()),
                 most = in(m, real), sums = in(u, real), grad = in(grad_o, v.scalar_type()),
                 grad_l = in(grad_lse, real);
  States initial = initial_states(v, shape, N, initial_lse, initial_out);
  SoftmaxScan k = {};
  k.H = H, k.D = D, k.descending = !reverse;
  k.s = sequence(scores, B, T), k.v = sequence(values, B, T), k.o = sequence(out, B, T);
  k.m = sequence(most, B, T), k.u = sequence(sums, B, T);
  k.grad_o = sequence(grad, B, T), k.grad_lse = sequence(grad_l, B, T);
  k.ds = sequence(ds, B, T), k.dv = sequence(dv, B, T);
  k.initial_m = initial.m.const_data_ptr(), k.initial_u = initial.u.const_data_ptr();
  const Work work = work_of(shape, v.element_size(), true);
  Plan plan = make_plan(rows, work);
  Tensor products = new_state(v, {N, H}, real, {});
  const Carried r(plan, dlse), product(plan, products), R(plan, dout);
  run(k, types.pair, rows, plan, work, r, product, R, true);
  if (real == ScalarType::Double) {
    finish_initial<double>(dlse, dout, initial, D);
  } else {
    finish_initial<float>(dlse, dout, initial, D);
  }
  return {as_type(ds, s.scalar_type()), dv, dlse, dout};
}

}  // namespace
}  // namespace seqops::scan

#define INPUTS                                                                                               \
  "(Tensor s, Tensor v, Tensor? initial_lse=None, Tensor? initial_out=None, *, bool reverse=False, Tensor? " \
  "cu_seqlens=None)"

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("softmax_scan" INPUTS " -> (Tensor o, Tensor lse)");
  m.def("softmax_scan_forward" INPUTS " -> (Tensor o, Tensor lse, Tensor m, Tensor u)");
  m.def(
      "softmax_scan_backward(Tensor? grad_o, Tensor? grad_lse, Tensor s, Tensor v, Tensor o, Tensor m, Tensor u, "
      "Tensor? initial_lse, Tensor? initial_out, *, bool reverse=False, Tensor? cu_seqlens=None) "
      "-> (Tensor ds, Tensor dv, Tensor dinitial_lse, Tensor dinitial_out)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("softmax_scan", TORCH_BOX(&seqops::scan::softmax_scan));
  m.impl("softmax_scan_forward", TORCH_BOX(&seqops::scan::softmax_scan_forward));
  m.impl("softmax_scan_backward", TORCH_BOX(&seqops::scan::softmax_scan_backward));
}
