// linear_attention on the CPU: schema, checks, allocation, and how items and chunks are shared out among threads.
#include "linear_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "../common/rows.h"

namespace seqops {
namespace {

const LinearAttentionKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::linear_attention_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("linear_attention: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

struct Arguments {
  const Tensor &q, &k, &v;
  const Optional &log_decay, &initial_state;
  std::optional<double> scale;
  bool causal;
  std::optional<int64_t> window;
  const Optional& cu_seqlens;
};

void check_decay(const char* op, const Tensor& q, const Tensor& g) {
  using enum ScalarType;
  check_device(op, "log_decay", g, "q", q);
  if (q.scalar_type() == Double) {
    check_type(op, "log_decay", g, {BFloat16, Half, Float, Double});
  } else {
    check_type(op, "log_decay", g, {BFloat16, Half, Float});
  }
  const Sizes sizes(q.sizes().begin(), q.sizes().end()), by_step(sizes.begin(), sizes.begin() + 3),
      by_head = {sizes[2]};
  const auto is = [&](const Sizes& expected) {
    return std::equal(g.sizes().begin(), g.sizes().end(), expected.begin(), expected.end());
  };
  check(is(by_head) || is(by_step) || is(sizes), op, ": log_decay: expected [H] = ", list_text(by_head),
        ", [B, T, H] = ", list_text(by_step), " or [B, T, H, K] = ", list_text(sizes), ", got ", shape_text(g));
}

void check_state(const char* op, const char* name, const Optional& state, const Arguments& a, int64_t rows) {
  if (!state) return;
  check_device(op, name, *state, "q", a.q);
  check_shape(op, name, *state, a.cu_seqlens ? "[N, H, K, V]" : "[B, H, K, V]",
              {rows, a.q.size(2), a.q.size(3), a.v.size(3)});
  check_type(op, name, *state, {a.q.scalar_type(), real_of(a.q.scalar_type())});
}

std::vector<Row> check_arguments(const char* op, const Arguments& a) {
  using enum ScalarType;
  const Tensor &q = a.q, &k = a.k, &v = a.v;
  check(q.dim() == 4, op, ": q: expected 4 dimensions [B, T, H, K], got shape ", shape_text(q));
  check_type(op, "q", q, {Float, Double, BFloat16, Half});
  check(q.size(2) >= 1 && q.size(3) >= 1, op, ": q: expected at least 1 head and 1 channel, got shape ", shape_text(q));
  check_device(op, "k", k, "q", q);
  check_type(op, "k", k, {q.scalar_type()});
  check_shape(op, "k", k, "[B, T, H, K]", {q.size(0), q.size(1), q.size(2), q.size(3)});
  check_device(op, "v", v, "q", q);
  check_type(op, "v", v, {q.scalar_type()});
  check(v.dim() == 4, op, ": v: expected 4 dimensions [B, T, H, V], got shape ", shape_text(v));
  const Sizes front = {q.size(0), q.size(1), q.size(2)};
  check(std::equal(front.begin(), front.end(), v.sizes().begin()), op, ": v: expected [B, T, H] = ", list_text(front),
        " in front, got ", shape_text(v));
  check(v.size(3) >= 1, op, ": v: expected at least 1 channel, got shape ", shape_text(v));
  if (a.log_decay) check_decay(op, q, *a.log_decay);
  if (!a.causal) {
    check(!a.log_decay, op, ": log_decay: expected None where causal is False, got a tensor");
    check(!a.window, op, ": window: expected None where causal is False, got ", a.window.value_or(0));
  }
  if (a.window) {
    check(*a.window >= 1, op, ": window: expected an integer >= 1, got ", *a.window);
    check(!a.initial_state, op, ": initial_state: expected None with a window, got a tensor");
  }
  std::vector<Row> rows = rows_of(op, "q", q, a.cu_seqlens);
  check_state(op, "initial_state", a.initial_state, a, static_cast<int64_t>(rows.size()));
  return rows;
}

// ---- layout

Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: return Storage::float32;
  }
}

Tensor with_dense_heads(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }

// [B, T, H, width], or [B, T, H]; one number for all steps of a head: [H].
HeadView view(const Tensor& t) {
  void* data = const_cast<void*>(t.const_data_ptr());
  return t.dim() == 1 ? HeadView{data, 0, 0, t.stride(0)} : HeadView{data, t.stride(0), t.stride(1), t.stride(2)};
}

HeadView view(const Optional& t) { return t ? view(*t) : HeadView{}; }

// A call as the kernels take it, and the tensors that it points to.
struct Call {
  Tensor q, k, v;
  Optional g, initial;
  LinearAttention arguments = {};
  int64_t items, steps = 0;

  Call(const Arguments& a, const std::vector<Row>& rows)
      : q(with_dense_heads(a.q)),
        k(with_dense_heads(a.k)),
        v(with_dense_heads(a.v)),
        initial(dense(a.initial_state, real_of(a.q.scalar_type()))) {
    if (a.log_decay) g = a.log_decay->dim() == 4 ? with_dense_heads(*a.log_decay) : *a.log_decay;
    LinearAttention& k_ = arguments;
    k_.rows = rows.data();
    k_.H = q.size(2), k_.K = q.size(3), k_.V = v.size(3);
    k_.scale = a.scale ? *a.scale : 1 / std::sqrt(static_cast<double>(k_.K));
    k_.causal = a.causal;
    k_.decay = !g ? DecayKind::none : g->dim() == 4 ? DecayKind::channel : DecayKind::step;
    k_.decay_type = g ? storage_of(g->scalar_type()) : Storage::float32;
    k_.q = view(q), k_.k = view(k), k_.v = view(v), k_.g = view(g);
    k_.initial = data(initial);
    int64_t most = 0;
    for (const Row& row : rows) steps += row.steps, most = std::max(most, row.steps);
    k_.most_chunks = LinearAttention::chunks(most);
    k_.window = a.window && *a.window < most ? *a.window : 0;  // a longer one leaves nothing out
    items = static_cast<int64_t>(rows.size()) * k_.H;
  }
};

// ---- the work

constexpr int64_t WORK_OF_THREAD = 1 << 20;  // multiplications: less is not worth waking another thread

int64_t workers_for(const Call& call) {
  const LinearAttention& k = call.arguments;
  const int64_t work = call.steps * k.H * (k.K + LinearAttention::C) * (k.V + LinearAttention::C) / 2;
  return std::clamp<int64_t>(work / WORK_OF_THREAD, 1, torch::stable::get_num_threads());
}

using Passes = std::vector<LinearAttentionPass>;  // one after the other; the middle one of three joins the chunks

// Every item by one thread, or, where there are fewer items than threads, one item after the other by all of them.
void run(const Call& call, const std::vector<Row>& rows, const Passes& whole, const Passes& shared, bool slots_wanted,
         bool backward) {
  const LinearAttention& k = call.arguments;
  const int64_t real = call.q.scalar_type() == ScalarType::Double ? 8 : 4;
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t buffers = aligned(k.buffers_size() * real), slots = aligned(k.slots_size(backward) * real);
  const int64_t workers = workers_for(call);
  const auto parallel = [&](const std::function<void(int64_t worker)>& work) {
    if (workers == 1) return work(0);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  };
  alignas(64) int64_t next = 0;
  const auto chunks_of = [&](int64_t item) { return LinearAttention::chunks(rows[item / k.H].steps); };

  // Under a window the gradient of the decay is a sum from the last chunk to the first.
  const bool share = workers > 1 && call.items < workers && k.window == 0 && k.most_chunks >= 2 * workers;
  if (!share) {
    const int64_t own_slots = slots_wanted ? slots : 0;
    const Scratch scratch(workers * (buffers + own_slots));
    parallel([&](int64_t worker) {
      char* own = static_cast<char*>(scratch.get()) + worker * (buffers + own_slots);
      for (;;) {
        const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (item >= call.items) return;
        for (const LinearAttentionPass pass : whole) pass(k, item, 0, chunks_of(item), own, own + buffers);
      }
    });
    return;
  }
  const Scratch scratch(workers * buffers + slots);
  char* const first = static_cast<char*>(scratch.get());
  for (int64_t item = 0; item < call.items; ++item) {
    if (chunks_of(item) < 2) {
      for (const LinearAttentionPass pass : whole) pass(k, item, 0, chunks_of(item), first, first + workers * buffers);
      continue;
    }
    for (size_t i = 0; i < shared.size(); ++i) {
      if (i == 1) {
        shared[i](k, item, 0, chunks_of(item), first, first + workers * buffers);
        continue;
      }
      next = 0;
      parallel([&](int64_t worker) {
        for (;;) {
          const int64_t chunk = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (chunk >= chunks_of(item)) return;
          shared[i](k, item, chunk, chunk + 1, first + worker * buffers, first + workers * buffers);
        }
      });
    }
  }
}

// ---- forward

std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, Optional log_decay,
                                            Optional initial_state, std::optional<double> scale, bool causal,
                                            std::optional<int64_t> window, Optional cu_seqlens) {
  const Arguments a = {q, k, v, log_decay, initial_state, scale, causal, window, cu_seqlens};
  const std::vector<Row> rows = check_arguments("linear_attention", a);
  const ScalarType real = real_of(q.scalar_type());
  Tensor o = new_output(v, {v.size(0), v.size(1), v.size(2), v.size(3)}, v.scalar_type());
  Tensor final = new_output(q, {static_cast<int64_t>(rows.size()), q.size(2), q.size(3), v.size(3)}, real);
  Call call(a, rows);
  call.arguments.o = view(o), call.arguments.final = final.mutable_data_ptr();
  const auto& pass = kernels().forward[static_cast<int>(storage_of(q.scalar_type()))];
  const bool march = causal && call.arguments.window == 0;
  const Passes phases = {pass.states, pass.fold, pass.outputs};
  run(call, rows, march ? Passes{pass.march} : phases, phases, !march, false);
  return {o, final};
}

// ---- backward

// [rows, H, chunks] -> [H]: in a fixed order.
template <class T>
void sum_rows(const std::vector<double>& sums, int64_t rows, int64_t H, int64_t chunks, T* out) {
  for (int64_t h = 0; h < H; ++h) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < chunks; ++c) sum += sums[(row * H + h) * chunks + c];
    }
    out[h] = static_cast<T>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    Optional grad_o, Optional dfinal_state, const Tensor& q, const Tensor& k, const Tensor& v, Optional log_decay,
    Optional initial_state, std::optional<double> scale, bool causal, std::optional<int64_t> window,
    Optional cu_seqlens) {
  const char* op = "linear_attention_backward";
  const Arguments a = {q, k, v, log_decay, initial_state, scale, causal, window, cu_seqlens};
  const std::vector<Row> rows = check_arguments(op, a);
  const int64_t N = static_cast<int64_t>(rows.size()), H = q.size(2);
  const ScalarType real = real_of(q.scalar_type());
  if (grad_o) {
    check_device(op, "grad_o", *grad_o, "q", q);
    check_type(op, "grad_o", *grad_o, {v.scalar_type()});
    check_shape(op, "grad_o", *grad_o, "[B, T, H, V]", {v.size(0), v.size(1), v.size(2), v.size(3)});
  }
  check_state(op, "dfinal_state", dfinal_state, a, N);

  const auto like = [](const Tensor& t) {
    return new_output(t, Sizes(t.sizes().begin(), t.sizes().end()), t.scalar_type());
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  Tensor dinitial = new_output(q, {N, H, q.size(3), v.size(3)}, real);
  Call call(a, rows);
  LinearAttention& arguments = call.arguments;
  const bool sum_decay = log_decay && log_decay->dim() == 1;
  Tensor dg = !log_decay ? new_output(q, {0}, real) : sum_decay ? new_output(q, {H}, real) : like(*log_decay);
  std::vector<double> sums(sum_decay ? N * H * arguments.most_chunks : 0, 0.0);
  const Optional grad = grad_o ? Optional(with_dense_heads(*grad_o)) : grad_o, dfinal = dense(dfinal_state, real);
  arguments.grad_o = view(grad), arguments.dfinal = data(dfinal);
  arguments.dq = view(dq), arguments.dk = view(dk), arguments.dv = view(dv);
  arguments.dinitial = dinitial.mutable_data_ptr();
  arguments.sum_decay = sum_decay, arguments.dg_sums = sums.data();
  if (log_decay && !sum_decay) arguments.dg = view(dg);

  const auto& pass = kernels().backward[static_cast<int>(storage_of(q.scalar_type()))];
  const Passes phases = {pass.states, pass.fold, pass.gradients};
  run(call, rows, phases, phases, true, true);
  if (sum_decay) {
    void* out = dg.mutable_data_ptr();
    real == ScalarType::Double ? sum_rows(sums, N, H, arguments.most_chunks, static_cast<double*>(out))
                               : sum_rows(sums, N, H, arguments.most_chunks, static_cast<float*>(out));
    dg = as_type(dg, log_decay->scalar_type());
  }
  return {dq, dk, dv, dg, dinitial};
}

}  // namespace
}  // namespace seqops

#define OPTIONS "*, float? scale=None, bool causal=True, int? window=None, Tensor? cu_seqlens=None)"

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? initial_state=None, " OPTIONS
        " -> (Tensor o, Tensor final_state)");
  m.def(
      "linear_attention_backward(Tensor? grad_o, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, "
      "Tensor? log_decay, Tensor? initial_state, " OPTIONS
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&seqops::linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&seqops::linear_attention_backward));
}
