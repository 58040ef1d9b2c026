// range_attention on the CPU: schema, checks, allocation, and how tiles are shared out among threads.
#include "range_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "../common/rows.h"

namespace seqops {
namespace {

const RangeAttentionKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::range_attention_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("range_attention: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

struct Arguments {
  const Tensor &q, &k, &v, &ranges;
  const Optional &k2, &v2, &ranges2, &bias;
  std::optional<double> scale;
  const std::string& activation;
};

void check_keys(const char* op, const Tensor& q, const char* k_name, const Tensor& k, const char* v_name,
                const Tensor& v, int64_t heads = 0) {
  const int64_t B = q.size(0), H = q.size(2), D = q.size(3);
  const std::string name = k_name, second = name == "k2" ? "S" : "Tk", letters = "[B, " + second + ", Hk, D]";
  check_device(op, k_name, k, "q", q);
  check_type(op, k_name, k, {q.scalar_type()});
  check(k.dim() == 4 && k.size(0) == B && k.size(3) == D, op, ": ", k_name, ": expected ", letters, " = [", B, ", ",
        second, ", Hk, ", D, "], got ", shape_text(k));
  if (heads == 0) {
    check(k.size(2) >= 1 && H % k.size(2) == 0, op, ": ", k_name, ": expected a number of heads that divides q's ", H,
          ", got shape ", shape_text(k));
  } else {
    check(k.size(2) == heads, op, ": ", k_name, ": expected k's ", heads, " heads, got shape ", shape_text(k));
  }
  check_device(op, v_name, v, "q", q);
  check_type(op, v_name, v, {q.scalar_type()});
  check_shape(op, v_name, v, letters.c_str(), {k.size(0), k.size(1), k.size(2), k.size(3)});
}

void check_ranges(const char* op, const char* name, const Tensor& ranges, const Tensor& q, const char* letter,
                  int64_t owners) {
  const int64_t B = q.size(0), H = q.size(2);
  check_device(op, name, ranges, "q", q);
  check_type(op, name, ranges, {ScalarType::Int});
  const auto is = [&](int64_t size, int64_t full) { return size == 1 || size == full; };
  const bool good = ranges.dim() == 5 && is(ranges.size(0), B) && is(ranges.size(1), H) && ranges.size(2) >= 1 &&
                    ranges.size(3) == 2 && ranges.size(4) == owners;
  check(good, op, ": ", name, ": expected [B or 1, H or 1, P, 2, ", letter, "] = [", B, " or 1, ", H, " or 1, P, 2, ",
        owners, "], got ", shape_text(ranges));
}

void check_bias(const char* op, const Tensor& bias, const Arguments& a) {
  check(!a.k2, op, ": bias: expected None with k2, got a tensor");
  check_device(op, "bias", bias, "q", a.q);
  check_type(op, "bias", bias, {a.q.scalar_type(), real_of(a.q.scalar_type())});
  const int64_t H = a.q.size(2);
  const bool fits = (bias.dim() == 2 && bias.size(1) % 2 == 1) ||
                    (bias.dim() == 3 && bias.size(1) == bias.size(2) && bias.size(2) >= 1);
  check(fits && (bias.size(0) == 1 || bias.size(0) == H), op,
        ": bias: expected [1 or H, 2 C - 1] or [1 or H, C, C] with H = ", H, ", got ", shape_text(bias));
}

void check_arguments(const char* op, const Arguments& a) {
  using enum ScalarType;
  const Tensor& q = a.q;
  check(q.dim() == 4, op, ": q: expected 4 dimensions [B, T, H, D], got shape ", shape_text(q));
  check_type(op, "q", q, {Float, Double, BFloat16, Half});
  check(q.size(2) >= 1 && q.size(3) >= 1, op, ": q: expected at least 1 head and 1 channel, got shape ", shape_text(q));
  check_keys(op, q, "k", a.k, "v", a.v);
  check_ranges(op, "ranges", a.ranges, q, "Tq", q.size(1));
  if (a.k2 || a.v2 || a.ranges2) {
    const auto given = [](const Optional& t) { return t ? "a tensor" : "None"; };
    check(a.k2 && a.v2 && a.ranges2, op, ": k2: expected k2, v2 and ranges2 together, got ", given(a.k2), ", ",
          given(a.v2), " and ", given(a.ranges2));
    check_keys(op, q, "k2", *a.k2, "v2", *a.v2, a.k.size(2));
    check_ranges(op, "ranges2", *a.ranges2, q, "Tq", q.size(1));
  }
  if (a.bias) check_bias(op, *a.bias, a);
  check(a.activation == "softmax" || a.activation == "laplace" || a.activation == "relu2", op,
        ": activation: expected one of softmax, laplace, relu2, got '", a.activation, "'");
}

// ---- layout

int storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return static_cast<int>(Storage::float64);
    case ScalarType::BFloat16: return static_cast<int>(Storage::bfloat16);
    case ScalarType::Half: return static_cast<int>(Storage::float16);
    default: return static_cast<int>(Storage::float32);
  }
}

Tensor with_dense_rows(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }
Tensor in_one_piece(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

HeadView view(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

RangesView view_ranges(const Tensor& t) {  // contiguous
  const int64_t parts = t.size(2), size = parts * 2 * t.size(4);
  return {static_cast<const int32_t*>(t.const_data_ptr()), parts, t.size(0) == 1 ? 0 : t.size(1) * size,
          t.size(1) == 1 ? 0 : size};
}

// A call as the kernels take it, and the tensors that it points to.
struct Call {
  RangeAttention arguments = {};
  std::vector<Tensor> kept;
  ScalarType real;

  explicit Call(const Arguments& a) : real(real_of(a.q.scalar_type())) {
    RangeAttention& k = arguments;
    k.B = a.q.size(0), k.Tq = a.q.size(1), k.H = a.q.size(2), k.D = a.q.size(3), k.Hk = a.k.size(2);
    k.scale = a.scale ? *a.scale : 1 / std::sqrt(static_cast<double>(k.D));
    k.activation = a.activation == "softmax"   ? Activation::softmax
                   : a.activation == "laplace" ? Activation::laplace
                                               : Activation::relu2;
    k.q = rows(a.q);
    k.sources = a.k2 ? 2 : 1;
    k.source[0] = source(a.k, a.v, a.ranges);
    if (a.k2) k.source[1] = source(*a.k2, *a.v2, *a.ranges2);
    if (!a.bias) return;
    const Tensor& bias = keep(*dense(a.bias, real));
    k.bias = bias.const_data_ptr();
    k.bias_by_distance = bias.dim() == 2;
    k.bias_places = k.bias_by_distance ? (bias.size(1) + 1) / 2 : bias.size(1);
    k.bias_head = bias.size(0) == 1 ? 0 : k.bias_size();
    k.bias_start = k.source[0].ranges.data;
  }

  const Tensor& keep(const Tensor& t) {
    kept.push_back(t);
    return kept.back();
  }
  HeadView rows(const Tensor& t) { return view(keep(with_dense_rows(t))); }
  KeySource source(const Tensor& k, const Tensor& v, const Tensor& ranges) {
    KeySource s = {};
    s.steps = k.size(1), s.k = rows(k), s.v = rows(v), s.ranges = view_ranges(keep(in_one_piece(ranges)));
    return s;
  }
};

Tensor output_like(const Tensor& t) {
  return new_output(t, Sizes(t.sizes().begin(), t.sizes().end()), t.scalar_type());
}

// ---- the work

constexpr int64_t WORK_OF_THREAD = 1 << 20;  // multiplications: less is not worth waking another thread

// At most: how many keys are seen only the ranges say.
int64_t workers_for(const RangeAttention& k, int64_t tasks) {
  int64_t keys = 0;
  for (int n = 0; n < k.sources; ++n) keys += k.source[n].ranges.parts * k.source[n].steps;
  const double work = 2.0 * k.B * k.H * k.Tq * keys * k.D;
  const int64_t useful = work < 1e15 ? static_cast<int64_t>(work) / WORK_OF_THREAD : tasks;
  return std::clamp<int64_t>(std::min(useful, tasks), 1, torch::stable::get_num_threads());
}

void run(const RangeAttention& k, int64_t tasks, RangeAttentionPass pass, int64_t real_bytes) {
  if (tasks == 0) return;
  const int64_t size = (k.scratch_size() * real_bytes + 63) / 64 * 64;
  const int64_t workers = workers_for(k, tasks);
  const Scratch scratch(workers * size);
  alignas(64) int64_t next = 0;
  const auto work = [&](int64_t worker) {
    void* own = static_cast<char*>(scratch.get()) + worker * size;
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      pass(k, task, own);
    }
  };
  if (workers == 1) return work(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

const RangeAttentionKernels::Passes& passes(ScalarType dtype) { return kernels().of[storage_of(dtype)]; }
int64_t bytes_of(ScalarType real) { return real == ScalarType::Double ? 8 : 4; }

// ---- forward

std::tuple<Tensor, Tensor> range_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ranges,
                                           Optional k2, Optional v2, Optional ranges2, Optional bias,
                                           std::optional<double> scale, std::string activation) {
  const Arguments a = {q, k, v, ranges, k2, v2, ranges2, bias, scale, activation};
  check_arguments("range_attention", a);
  Tensor o = output_like(q);
  Tensor lse = new_output(q, {q.size(0), q.size(2), q.size(1)}, real_of(q.scalar_type()));
  Call call(a);
  call.arguments.o = view(o), call.arguments.lse = lse.mutable_data_ptr();
  run(call.arguments, call.arguments.forward_tasks(), passes(q.scalar_type()).forward, bytes_of(call.real));
  return {o, lse};
}

// ---- backward

// [H, size] -> [heads, size]: in the order of heads.
template <class T>
void sum_heads(const std::vector<double>& sums, int64_t H, int64_t heads, int64_t size, T* out) {
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t each = h; each < H; each += heads) sum += sums[each * size + i];
      out[h * size + i] = static_cast<T>(sum);
    }
  }
}

void check_like(const char* op, const char* name, const Optional& t, const Tensor& q, ScalarType dtype,
                const char* letters, std::initializer_list<int64_t> sizes) {
  if (!t) return;
  check_device(op, name, *t, "q", q);
  check_type(op, name, *t, {dtype});
  check_shape(op, name, *t, letters, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> range_attention_backward(
    Optional grad_o, Optional grad_lse, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& ranges, const Tensor& seen, Optional k2, Optional v2, Optional ranges2,
    Optional seen2, Optional bias, std::optional<double> scale, std::string activation, bool bias_gradient) {
  const char* op = "range_attention_backward";
  const Arguments a = {q, k, v, ranges, k2, v2, ranges2, bias, scale, activation};
  check_arguments(op, a);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3);
  check_like(op, "grad_o", grad_o, q, q.scalar_type(), "[B, Tq, H, D]", {B, T, H, D});
  check_like(op, "grad_lse", grad_lse, q, real_of(q.scalar_type()), "[B, H, Tq]", {B, H, T});
  check_like(op, "o", o, q, q.scalar_type(), "[B, Tq, H, D]", {B, T, H, D});
  check_like(op, "lse", lse, q, real_of(q.scalar_type()), "[B, H, Tq]", {B, H, T});
  check_ranges(op, "seen", seen, q, "Tk", k.size(1));
  check(seen2.has_value() == k2.has_value(), op, ": seen2: expected one where there is k2, got ",
        seen2 ? "a tensor" : "None");
  if (k2) check_ranges(op, "seen2", *seen2, q, "S", k2->size(1));

  Call call(a);
  Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  Tensor dk2 = k2 ? output_like(*k2) : new_output(q, {0}, q.scalar_type());
  Tensor dv2 = v2 ? output_like(*v2) : new_output(q, {0}, q.scalar_type());
  RangeAttention& arguments = call.arguments;
  if (grad_o) arguments.grad_o = call.rows(*grad_o);
  if (grad_lse) arguments.grad_lse = call.keep(in_one_piece(*grad_lse)).const_data_ptr();
  arguments.o = call.rows(o);
  arguments.lse = const_cast<void*>(call.keep(in_one_piece(lse)).const_data_ptr());
  arguments.dq = view(dq);
  KeySource* source = arguments.source;
  source[0].dk = view(dk), source[0].dv = view(dv), source[0].seen = view_ranges(call.keep(in_one_piece(seen)));
  if (k2)
    source[1].dk = view(dk2), source[1].dv = view(dv2), source[1].seen = view_ranges(call.keep(in_one_piece(*seen2)));
  const int64_t bytes = bytes_of(call.real);
  const Scratch sums(B * H * 2 * T * bytes);
  arguments.sums = sums.get();
  const bool wanted = bias && bias_gradient;
  std::vector<double> dbias_sums(wanted ? H * arguments.bias_size() : 0, 0.0);
  arguments.dbias = wanted ? dbias_sums.data() : nullptr;

  const RangeAttentionKernels::Passes& pass = passes(q.scalar_type());
  run(arguments, wanted ? H : arguments.query_tasks(), pass.queries, bytes);
  run(arguments, arguments.key_tasks(), pass.keys, bytes);
  Tensor dbias = new_output(q, wanted ? Sizes(bias->sizes().begin(), bias->sizes().end()) : Sizes{0}, call.real);
  if (wanted) {
    void* out = dbias.mutable_data_ptr();
    const int64_t heads = bias->size(0), size = arguments.bias_size();
    call.real == ScalarType::Double ? sum_heads(dbias_sums, H, heads, size, static_cast<double*>(out))
                                    : sum_heads(dbias_sums, H, heads, size, static_cast<float*>(out));
    dbias = as_type(dbias, bias->scalar_type());
  }
  return {dq, dk, dv, dk2, dv2, dbias};
}

}  // namespace
}  // namespace seqops

#define OPTIONS "*, float? scale=None, str activation='softmax'"

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "range_attention(Tensor q, Tensor k, Tensor v, Tensor ranges, Tensor? k2=None, Tensor? v2=None, "
      "Tensor? ranges2=None, Tensor? bias=None, " OPTIONS ") -> (Tensor o, Tensor lse)");
  m.def(
      "range_attention_backward(Tensor? grad_o, Tensor? grad_lse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, "
      "Tensor ranges, Tensor seen, Tensor? k2, Tensor? v2, Tensor? ranges2, Tensor? seen2, Tensor? bias, " OPTIONS
      ", bool bias_gradient=True) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dk2, Tensor dv2, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("range_attention", TORCH_BOX(&seqops::range_attention));
  m.impl("range_attention_backward", TORCH_BOX(&seqops::range_attention_backward));
}
