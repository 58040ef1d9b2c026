// linear_scan on the CPU: schema, checks, allocation, and the choice of kernel. See scan.h for the notation.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>

#include "host.h"

namespace seqops::scan {
namespace {

const char* const OP = "linear_scan";

// ---- checks

void check_gate(const char* op, const Tensor& x, const Tensor& a) {
  check_device(op, "a", a, "x", x);
  bool fits = a.dim() == x.dim();
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = a.size(d) == 1 || a.size(d) == x.size(d);
  check(fits, op, ": a: expected every dimension 1 or as in x ", shape_text(x), ", got ", shape_text(a));
  using enum ScalarType;
  switch (real_part_of(x.scalar_type())) {
    case Double: return check_type(op, "a", a, {BFloat16, Half, Float, Double, ComplexFloat, ComplexDouble});
    case Float: return check_type(op, "a", a, {BFloat16, Half, Float, ComplexFloat});
    default: return check_type(op, "a", a, {BFloat16, Half, Float});
  }
}

void check_state(const char* op, const char* name, const Optional& state, const Tensor& x, ScalarType state_type,
                 int64_t rows, bool packed) {
  if (!state) return;
  check_device(op, name, *state, "x", x);
  Sizes expected = {rows};
  for (int64_t d = 2; d < x.dim(); ++d) expected.push_back(x.size(d));
  const auto sizes = state->sizes();
  check(Sizes(sizes.begin(), sizes.end()) == expected, op, ": ", name, ": expected ",
        packed ? "[N, *C] = " : "[B, *C] = ", list_text(expected), ", got ", shape_text(*state));
  check_type(op, name, *state, {x.scalar_type(), real_part_of(state_type), state_type});
}

// ---- gates

// Channel c has gate (c / div) % mod of its step, where the pattern can be said so.
struct Gate {
  int64_t div = 1, mod = 1;
  bool regular = true;
};

Gate gate_of(const Tensor& x, const Tensor& a) {
  Gate gate;
  enum { trailing, own, leading } part = trailing;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (a.size(d) == 1) {
      if (part == trailing) gate.div *= x.size(d);
      if (part == own) part = leading;
    } else {
      if (part == leading) gate.regular = false;
      part = own;
      gate.mod *= x.size(d);
    }
  }
  return gate;
}

// A copy of `a` with a value for every channel.
Tensor written_out(const Tensor& a, const Tensor& x, ScalarType dtype) {
  Sizes sizes = {a.size(0), a.size(1)};
  for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back(x.size(d));
  Tensor full = torch::stable::new_empty(a, sizes, dtype);
  torch::stable::copy_(full, a);
  return full;
}

// ---- both passes

// What a call computes in, and its tensors as the kernels take them. Complex numbers with a real gate are pairs of reals
// that share it.
struct Numbers {
  ScalarType storage;  // of h
  ScalarType gate;
  int64_t parts;  // scalars of an element of h, where it is taken as reals
  Pair pair;
};

Numbers numbers_of(ScalarType x, ScalarType a, bool sums_gates) {
  using enum ScalarType;
  if (is_complex(x) || is_complex(a)) {
    const ScalarType real = real_part_of(x), storage = complex_of(real);
    const bool wide = real == Double;
    if (is_complex(a)) return {storage, storage, 1, wide ? Pair::complex128 : Pair::complex64};
    return {storage, real, 2, wide ? Pair::float64 : Pair::float32};
  }
  if (x == Double) return {x, x, 1, Pair::float64};
  if (x == Float) return {x, x, 1, Pair::float32};
  const bool same = a == x && !sums_gates;
  if (x == BFloat16) return {x, same ? x : Float, 1, same ? Pair::bfloat16 : Pair::bfloat16_float32};
  return {x, same ? x : Float, 1, same ? Pair::float16 : Pair::float16_float32};
}

ScalarType state_type_of(ScalarType storage) { return is_complex(storage) ? storage : real_of(storage); }

int64_t bytes_of(ScalarType dtype) {
  using enum ScalarType;
  return dtype == ComplexDouble ? 16 : (dtype == Double || dtype == ComplexFloat ? 8 : (dtype == Float ? 4 : 2));
}

// The states at the beginnings of the chunks, from the first on: a factor of exactly 0 is a reset. False where a chunk by
// itself is not finite (the whole may be), or its product cannot be said; the last slot then has the state behind chunk 0.
template <class N>
bool join_chunks(const Plan::Chunked& chunked, char* carry, char* product, int64_t channels) {
  const auto row = [&](char* data, int64_t i) { return reinterpret_cast<N*>(data) + (chunked.slot + i) * channels; };
  for (int64_t i = 1; i + 1 < chunked.chunks; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      if (!std::isfinite(std::abs(row(product, i)[c])) || !std::isfinite(std::abs(row(carry, i)[c]))) {
        std::memcpy(row(carry, chunked.chunks - 1), row(carry, 0), channels * sizeof(N));
        return false;
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    N state = row(carry, 0)[c];
    for (int64_t i = 1; i < chunked.chunks; ++i) {
      const N factor = row(product, i)[c], out = row(carry, i)[c];
      row(carry, i)[c] = state;
      state = factor == N(0) ? out : factor * state + out;
    }
  }
  return true;
}

void run(const LinearScan& arguments, const Numbers& numbers, const std::vector<Row>& rows, Plan& plan,
         const Work& work, const Carried& carried, bool backward) {
  LinearScan k = arguments;
  const LinearScanKernels& kernels = linear_scan_kernels();
  const int pair = static_cast<int>(numbers.pair);
  const int64_t width = numbers.pair >= Pair::complex64 ? 2 : 1,
                real_bytes = bytes_of(real_of(real_part_of(numbers.storage)));
  const int64_t row_bytes = k.C * width * real_bytes;
  k.rows = rows.data();
  k.block = plan.block;
  k.carry = carried.data();
  k.scratch_bytes = ((2 * plan.block * k.C + k.gate_mod) * width * real_bytes + 63) / 64 * 64;
  const Scratch scratch(plan.workers * k.scratch_bytes), product(plan.chunked.empty() ? 0 : plan.slots * row_bytes);
  k.scratch = scratch.get();
  if (!plan.chunked.empty()) {  // products start from one
    const bool wide = real_bytes == 8;
    for (int64_t i = 0; i < plan.slots * k.C * width; ++i) {
      const double one = i % width == 0 ? 1 : 0;
      if (wide)
        static_cast<double*>(product.get())[i] = one;
      else
        static_cast<float*>(product.get())[i] = static_cast<float>(one);
    }
  }
  const auto kernel = [&](const std::vector<Task>& tasks, bool reduce, int64_t* next, int64_t worker) {
    LinearScan task = k;
    task.tasks = tasks.data(), task.count = static_cast<int64_t>(tasks.size()), task.next = next;
    if (reduce) task.product = product.get();
    const LinearScanKernel* pass = backward ? (reduce ? kernels.backward_reduce : kernels.backward)
                                            : (reduce ? kernels.forward_reduce : kernels.forward);
    pass[pair](task, worker);
  };
  const auto join = [&](const Plan::Chunked& chunked) {
    char *carry = carried.data(), *products = static_cast<char*>(product.get());
    switch (numbers.pair) {
      case Pair::float64: return join_chunks<double>(chunked, carry, products, k.C);
      case Pair::complex64: return join_chunks<std::complex<float>>(chunked, carry, products, k.C);
      case Pair::complex128: return join_chunks<std::complex<double>>(chunked, carry, products, k.C);
      default: return join_chunks<float>(chunked, carry, products, k.C);
    }
  };
  execute(plan, rows, work, kernel, join);
  carried.finish();
}

// Channels may be shared out where each part has gates of its own, or where gates have no gradient to be summed.
int64_t split_of(const Gate& gate, int64_t C, int64_t parts, int64_t element_bytes, bool sums_gates) {
  const int64_t line = std::max<int64_t>(64 / element_bytes, 1);
  const int64_t any = (line + parts - 1) / parts * parts;
  if (!sums_gates) return any;
  if (gate.div * gate.mod != C) return 0;
  return gate.div == parts ? any : gate.div;
}

// ---- forward

std::tuple<Tensor, Tensor> linear_scan(const Tensor& x, const Tensor& a, Optional initial_state, bool reverse,
                                       Optional cu_seqlens) {
  check(x.dim() >= 2, OP, ": x: expected at least 2 dimensions [B, T, *C], got shape ", shape_text(x));
  using enum ScalarType;
  check_type(OP, "x", x, {Float, Double, BFloat16, Half, ComplexFloat, ComplexDouble});
  int64_t C = 1;
  for (int64_t d = 2; d < x.dim(); ++d) C *= x.size(d);
  check(C >= 1, OP, ": x: expected at least 1 channel, got shape ", shape_text(x));
  check_gate(OP, x, a);
  const std::vector<Row> rows = rows_of(OP, "x", x, cu_seqlens);
  const int64_t B = x.size(0), T = x.size(1), N = static_cast<int64_t>(rows.size());
  const Numbers numbers = numbers_of(x.scalar_type(), a.scalar_type(), false);
  const ScalarType state_type = state_type_of(numbers.storage);
  check_state(OP, "initial_state", initial_state, x, state_type, N, cu_seqlens.has_value());

  const auto x_sizes = x.sizes();
  Sizes sizes(x_sizes.begin(), x_sizes.end()), state_sizes = {N};
  state_sizes.insert(state_sizes.end(), sizes.begin() + 2, sizes.end());
  Tensor h = new_output(x, sizes, numbers.storage);
  Tensor state = new_state(x, state_sizes, state_type, initial_state);
  if (B == 0 || T == 0) return {h, state};

  Gate gate = gate_of(x, a);
  const Tensor gates = gate.regular ? with_dense_steps(as_type(a, numbers.gate)) : written_out(a, x, numbers.gate);
  if (!gate.regular) gate = {1, C, true};
  const Tensor input = with_dense_steps(as_type(x, numbers.storage));

  const int64_t parts = numbers.parts;
  LinearScan k = {};
  k.C = C * parts, k.pairs = parts == 2;
  k.gate_div = gate.div * parts, k.gate_mod = gate.mod;
  k.descending = reverse;
  k.x = sequence(input, B, T, parts);
  k.a = sequence(gates, B, T);
  k.y = sequence(h, B, T, parts);
  const int64_t bytes = h.element_size() / parts;
  const Work work = {k.C, split_of({k.gate_div, k.gate_mod}, k.C, parts, bytes, false), 3 * bytes, 2.0 / 3, bytes};
  Plan plan = make_plan(rows, work);
  const Carried carried(plan, state);
  run(k, numbers, rows, plan, work, carried, false);
  return {h, state};
}

// ---- backward

// The gradient of the gates as the kernels leave it becomes that of `a`: summed over what `a` shares.
Tensor as_gate(const Tensor& sums, const Tensor& a) {
  Sizes shared;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) == 1 && sums.size(d) != 1) shared.push_back(d);
  }
  const Tensor summed = shared.empty() ? sums : torch::stable::sum(sums, shared, /*keepdim=*/true);
  return as_type(summed, a.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(Optional dh, Optional dfinal_state, const Tensor& a, Optional h,
                                                        Optional initial_state, bool reverse, Optional cu_seqlens) {
  const char* op = "linear_scan_backward";
  check(dh || h, op, ": dh: expected a tensor where h is None, got None");
  const Tensor& like = h ? *h : *dh;
  const char* like_name = h ? "h" : "dh";
  check(like.dim() >= 2, op, ": ", like_name, ": expected at least 2 dimensions [B, T, *C], got shape ",
        shape_text(like));
  using enum ScalarType;
  check_type(op, like_name, like, {Float, Double, BFloat16, Half, ComplexFloat, ComplexDouble});
  check_gate(op, like, a);
  const std::vector<Row> rows = rows_of(op, like_name, like, cu_seqlens);
  const int64_t B = like.size(0), T = like.size(1), N = static_cast<int64_t>(rows.size());
  if (dh && h) {
    check_device(op, "dh", *dh, "h", *h);
    const auto expected = h->sizes(), got = dh->sizes();
    check(Sizes(got.begin(), got.end()) == Sizes(expected.begin(), expected.end()), op, ": dh: expected h's shape ",
          shape_text(*h), ", got ", shape_text(*dh));
  }
  if (dh && h) check_type(op, "dh", *dh, {h->scalar_type()});
  check(!is_complex(a.scalar_type()) || is_complex(like.scalar_type()), op, ": ", like_name,
        ": expected a complex dtype with complex a, got ", dtype_text(like.scalar_type()));
  Gate gate = gate_of(like, a);
  // Gates that are shared in a way that the kernels do not sum are summed by torch, from wide values.
  const bool torch_sums = !gate.regular || (a.size(0) == 1 && B > 1 && a.size(1) == T);
  const Numbers numbers = numbers_of(like.scalar_type(), a.scalar_type(), torch_sums);
  const ScalarType state_type = state_type_of(numbers.storage);
  for (const auto& [name, state] : {std::pair{"dfinal_state", &dfinal_state}, {"initial_state", &initial_state}}) {
    check_state(op, name, *state, like, state_type, N, cu_seqlens.has_value());
  }

  const auto like_sizes = like.sizes();
  Sizes sizes(like_sizes.begin(), like_sizes.end()), state_sizes = {N};
  state_sizes.insert(state_sizes.end(), sizes.begin() + 2, sizes.end());
  int64_t C = 1;
  for (size_t d = 2; d < sizes.size(); ++d) C *= sizes[d];
  Tensor dx = new_output(like, sizes, numbers.storage);
  Tensor dinitial = new_state(like, state_sizes, state_type, dfinal_state);
  const auto a_sizes = a.sizes();
  if (B == 0 || T == 0 || C == 0) {
    return {dx, new_state(a, h ? Sizes(a_sizes.begin(), a_sizes.end()) : Sizes{0}, a.scalar_type(), {}), dinitial};
  }

  const Tensor gates = gate.regular ? with_dense_steps(as_type(a, numbers.gate)) : written_out(a, like, numbers.gate);
  if (!gate.regular) gate = {1, C, true};
  const auto in_storage = [&](const Optional& t) {
    return t ? Optional(with_dense_steps(as_type(*t, numbers.storage))) : t;
  };
  const Optional grad = in_storage(dh), before = in_storage(h);
  const Optional initial = h ? dense(initial_state, state_type) : Optional();

  const int64_t parts = numbers.parts;
  LinearScan k = {};
  k.C = C * parts, k.pairs = parts == 2;
  k.gate_div = gate.div * parts, k.gate_mod = gate.mod;
  k.descending = !reverse;
  k.x = sequence(grad, B, T, parts);
  k.a = sequence(gates, B, T);
  k.y = sequence(dx, B, T, parts);
  const bool wants_gate = h.has_value(), per_step = a.size(1) == T;
  const bool sums = wants_gate && !(gate.div == 1 && gate.mod == C && parts == 1);
  const int64_t bytes = dx.element_size() / parts;
  const Work work = {k.C, split_of({k.gate_div, k.gate_mod}, k.C, parts, bytes, sums), (wants_gate ? 5 : 3) * bytes,
                     wants_gate ? 0.4 : 2.0 / 3, bytes};
  Plan plan = make_plan(rows, work);
  const Carried carried(plan, dinitial);

  Tensor da = torch::stable::new_empty(a, Sizes{0}, a.scalar_type());
  if (!wants_gate) {
    run(k, numbers, rows, plan, work, carried, true);
    return {dx, da, dinitial};
  }
  k.h = sequence(before, B, T, parts);
  k.initial = data(initial);
  const auto gate_sizes = gates.sizes();
  Sizes da_sizes(gate_sizes.begin(), gate_sizes.end());
  if (per_step) {
    da_sizes[0] = B;
    da = new_output(a, da_sizes, numbers.gate);
    k.da = sequence(da, B, T);
    run(k, numbers, rows, plan, work, carried, true);
    return {dx, as_gate(da, a), dinitial};
  }
  // One sum for each slot; then those of a row's chunks, or all, in their order.
  const ScalarType sum_type = is_complex(numbers.gate) ? numbers.gate : real_of(numbers.gate);
  da_sizes[0] = plan.slots;
  da = new_state(a, da_sizes, sum_type, {});
  k.da_sum = da.mutable_data_ptr();
  run(k, numbers, rows, plan, work, carried, true);
  if (a.size(0) == B && B > 1) {  // a batch row's slots: its own, and those of its chunks
    Sizes row_sizes = da_sizes;
    row_sizes[0] = B;
    Tensor by_row = torch::stable::new_empty(a, row_sizes, sum_type);
    torch::stable::copy_(by_row, torch::stable::narrow(da, 0, 0, B));
    for (const Plan::Chunked& chunked : plan.chunked) {
      Tensor row = torch::stable::narrow(by_row, 0, chunked.row, 1);
      torch::stable::copy_(
          row, torch::stable::sum(torch::stable::narrow(da, 0, chunked.slot, chunked.chunks), Sizes{0}, true));
    }
    da = by_row;
  }
  return {dx, as_gate(da, a), dinitial};
}

}  // namespace
}  // namespace seqops::scan

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "linear_scan(Tensor x, Tensor a, Tensor? initial_state=None, *, bool reverse=False, Tensor? cu_seqlens=None) "
      "-> (Tensor h, Tensor final_state)");
  m.def(
      "linear_scan_backward(Tensor? dh, Tensor? dfinal_state, Tensor a, Tensor? h, Tensor? initial_state, *, "
      "bool reverse=False, Tensor? cu_seqlens=None) -> (Tensor dx, Tensor da, Tensor dinitial_state)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&seqops::scan::linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&seqops::scan::linear_scan_backward));
}
