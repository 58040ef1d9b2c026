// memory on the CPU: schemas, checks, allocation, and how items are shared out among threads.
#include "memory.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "../common/rows.h"

namespace seqops {
namespace {

const MemoryKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::memory_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("memory: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

struct Arguments {
  const char* op;
  const Tensor &q, &k, &v, &lr;
  const Optional &decay, &momentum;
  const Tensor& w1;
  const Optional &w2, &s1, &s2;
  int64_t chunk_size;
  const std::string& loss;
  int64_t window;

  ScalarType dtype() const { return q.scalar_type(); }
  ScalarType real() const { return real_of(dtype()); }
  int64_t B() const { return q.size(0); }
  int64_t T() const { return q.size(1); }
  int64_t H() const { return q.size(2); }
  int64_t D() const { return q.size(3); }
  int64_t F() const { return w2 ? w1.size(2) : 0; }
  const char* first_letters() const { return w2 ? "[B, H, F, D]" : "[B, H, D, D]"; }
  Sizes sequence() const { return {B(), T(), H(), D()}; }
  Sizes gate() const { return {B(), T(), H()}; }
  Sizes first() const { return {B(), H(), w2 ? F() : D(), D()}; }
  Sizes second() const { return {B(), H(), D(), F()}; }
};

// A tensor beside q, in its dtype or in what that is computed in; none passes.
void check_like(const Arguments& a, const char* name, const Optional& t, const char* letters, const Sizes& sizes) {
  if (!t) return;
  check_device(a.op, name, *t, "q", a.q);
  check_type(a.op, name, *t, {a.dtype(), a.real()});
  if (sizes.size() == 3) return check_shape(a.op, name, *t, letters, {sizes[0], sizes[1], sizes[2]});
  check_shape(a.op, name, *t, letters, {sizes[0], sizes[1], sizes[2], sizes[3]});
}

void check_second(const Arguments& a, const char* name, const Optional& t) {
  check(a.w2 || !t, a.op, ": ", name, ": expected None without w2, got a tensor");
  if (t) check_like(a, name, t, "[B, H, D, F]", a.second());
}

void check_arguments(const Arguments& a) {
  using enum ScalarType;
  const char* op = a.op;
  check(a.q.dim() == 4, op, ": q: expected 4 dimensions [B, T, H, D], got shape ", shape_text(a.q));
  check_type(op, "q", a.q, {Float, Double, BFloat16, Half});
  check(a.H() >= 1 && a.D() >= 1, op, ": q: expected at least 1 head and 1 channel, got shape ", shape_text(a.q));
  const auto check_sequence = [&](const char* name, const Tensor& t) {
    check_device(op, name, t, "q", a.q);
    check_type(op, name, t, {a.dtype()});
    check_shape(op, name, t, "[B, T, H, D]", {a.B(), a.T(), a.H(), a.D()});
  };
  check_sequence("k", a.k), check_sequence("v", a.v);
  check_like(a, "lr", a.lr, "[B, T, H]", a.gate());
  check_like(a, "decay", a.decay, "[B, T, H]", a.gate());
  check_like(a, "momentum", a.momentum, "[B, T, H]", a.gate());
  if (a.w2) {
    const std::string shape = shape_text(a.w1);
    check(a.w1.dim() == 4, op, ": w1: expected 4 dimensions [B, H, F, D], got shape ", shape);
    check(a.F() >= 1, op, ": w1: expected at least 1 hidden channel, got shape ", shape);
  }
  check_like(a, "w1", a.w1, a.first_letters(), a.first());
  check_second(a, "w2", a.w2);
  check_like(a, "s1", a.s1, a.first_letters(), a.first());
  check_second(a, "s2", a.s2);
  check(a.chunk_size >= 1, op, ": chunk_size: expected an integer >= 1, got ", a.chunk_size);
  check(a.loss == "l2" || a.loss == "dot", op, ": loss: expected one of l2, dot, got '", a.loss, "'");
  check(a.window >= 1, op, ": window: expected an integer >= 1, got ", a.window);
}

// ---- layout

MemoryStorage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return MemoryStorage::float64;
    case ScalarType::BFloat16: return MemoryStorage::bfloat16;
    case ScalarType::Half: return MemoryStorage::float16;
    default: return MemoryStorage::float32;
  }
}

Tensor with_dense_heads(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }

HeadView view(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// A call as the kernels take it, and the tensors that it points to.
struct Call {
  Tensor q, k, v;
  Optional gates[3], weights[4];
  Memory arguments = {};

  explicit Call(const Arguments& a)
      : q(with_dense_heads(a.q)),
        k(with_dense_heads(a.k)),
        v(with_dense_heads(a.v)),
        gates{dense(a.lr, a.real()), dense(a.decay, a.real()), dense(a.momentum, a.real())},
        weights{dense(a.w1, a.real()), dense(a.w2, a.real()), dense(a.s1, a.real()), dense(a.s2, a.real())} {
    Memory& k_ = arguments;
    k_.B = a.B(), k_.T = a.T(), k_.H = a.H(), k_.D = a.D(), k_.F = a.F();
    k_.C = std::clamp<int64_t>(a.chunk_size, 1, std::max<int64_t>(k_.T, 1));
    k_.window = std::min(a.window, k_.C);
    k_.segment = Memory::segment_of(a.chunk_size);
    k_.l2 = a.loss == "l2", k_.carries = a.momentum.has_value();
    k_.q = view(q), k_.k = view(k), k_.v = view(v);
    k_.lr = data(gates[0]), k_.decay = data(gates[1]), k_.momentum = data(gates[2]);
    for (int i = 0; i < 2; ++i) k_.w[i] = data(weights[i]), k_.s[i] = data(weights[2 + i]);
  }
};

// ---- the work

constexpr int64_t WORK_OF_THREAD = 1 << 20;  // multiplications: less is not worth waking another thread

void run(const Memory& k, const MemoryKernels::Pass& pass) {
  const int64_t items = k.B * k.H, work = items * k.T * k.layer_size() * (k.linear() ? 3 : 7);
  const int64_t most = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t workers = std::clamp<int64_t>(work / WORK_OF_THREAD, 1, std::max<int64_t>(most, 1));
  const int64_t bytes = (pass.buffers_size(k) + 63) / 64 * 64;
  const Scratch scratch(workers * bytes);
  alignas(64) int64_t next = 0;
  const auto work_off = [&](int64_t worker) {
    char* const buffers = static_cast<char*>(scratch.get()) + worker * bytes;
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      pass.run(k, item, buffers);
    }
  };
  if (workers == 1) return work_off(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work_off(worker);
  });
}

int index(const Arguments& a) { return static_cast<int>(storage_of(a.dtype())); }

// ---- forward

struct Results {
  Tensor o, w1, w2, s1, s2, states;
};

Results forward(const Arguments& a, bool training) {
  check_arguments(a);
  const auto weight = [&](bool there, const Sizes& sizes) {
    return new_output(a.q, there ? sizes : Sizes{0}, a.real());
  };
  Call call(a);
  Memory& k = call.arguments;
  Results r = {new_output(a.q, a.sequence(), a.dtype()), weight(true, a.first()),
               weight(!k.linear(), a.second()),          weight(true, a.first()),
               weight(!k.linear(), a.second()),          weight(training, {k.B, k.H, k.segments(), k.state_size()})};
  k.o = view(r.o);
  k.w_out[0] = r.w1.mutable_data_ptr(), k.w_out[1] = r.w2.mutable_data_ptr();
  k.s_out[0] = r.s1.mutable_data_ptr(), k.s_out[1] = r.s2.mutable_data_ptr();
  k.states = training ? r.states.mutable_data_ptr() : nullptr;
  run(k, kernels().forward[index(a)]);
  return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> memory(const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const Tensor& lr, Optional decay, Optional momentum,
                                                          const Tensor& w1, Optional w2, Optional s1, Optional s2,
                                                          int64_t chunk_size, std::string loss, int64_t window) {
  const Results r = forward({"memory", q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss, window}, false);
  return {r.o, r.w1, r.w2, r.s1, r.s2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, Optional decay, Optional momentum,
    const Tensor& w1, Optional w2, Optional s1, Optional s2, int64_t chunk_size, std::string loss, int64_t window) {
  const Results r =
      forward({"memory_forward", q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss, window}, true);
  return {r.o, r.w1, r.w2, r.s1, r.s2, r.states};
}

// ---- backward

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// null: zeros, or not wanted
void pass_on(const void* from, int64_t bytes, void* to) {
  if (to == nullptr) return;
  if (from == nullptr) {
    std::memset(to, 0, bytes);
  } else {
    std::memcpy(to, from, bytes);
  }
}

Gradients memory_backward(Optional grad_o, Optional grad_w1, Optional grad_w2, Optional grad_s1, Optional grad_s2,
                          const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, Optional decay,
                          Optional momentum, const Tensor& w1, Optional w2, Optional s1, Optional s2,
                          const Tensor& states, int64_t chunk_size, std::string loss, int64_t window) {
  const Arguments a = {"memory_backward", q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss, window};
  check_arguments(a);
  if (grad_o) {
    check_device(a.op, "grad_o", *grad_o, "q", q);
    check_type(a.op, "grad_o", *grad_o, {a.dtype()});
    check_shape(a.op, "grad_o", *grad_o, "[B, T, H, D]", {a.B(), a.T(), a.H(), a.D()});
  }
  check_like(a, "grad_w1", grad_w1, a.first_letters(), a.first());
  check_second(a, "grad_w2", grad_w2);
  check_like(a, "grad_s1", grad_s1, a.first_letters(), a.first());
  check_second(a, "grad_s2", grad_s2);
  Call call(a);
  Memory& k_ = call.arguments;
  check_device(a.op, "states", states, "q", q);
  check_type(a.op, "states", states, {a.real()});
  check_shape(a.op, "states", states, "[B, H, segments, N]", {k_.B, k_.H, k_.segments(), k_.state_size()});

  const Optional kept = dense(states, a.real());
  const Optional upstream = grad_o ? Optional(with_dense_heads(*grad_o)) : grad_o;
  const Optional of_weights[4] = {dense(grad_w1, a.real()), dense(grad_w2, a.real()), dense(grad_s1, a.real()),
                                  dense(grad_s2, a.real())};
  k_.states = const_cast<void*>(data(kept));
  if (upstream) k_.grad_o = view(*upstream);
  for (int i = 0; i < 2; ++i) k_.grad_w[i] = data(of_weights[i]), k_.grad_s[i] = data(of_weights[2 + i]);

  const auto sequence = [&] { return new_output(q, a.sequence(), a.dtype()); };
  Tensor dq = sequence(), dk = sequence(), dv = sequence();
  k_.dq = view(dq), k_.dk = view(dk), k_.dv = view(dv);
  const auto like = [&](const Optional& t, const Sizes& sizes, void*& at) {
    Tensor gradient = new_output(q, t ? sizes : Sizes{0}, a.real());
    at = t ? gradient.mutable_data_ptr() : nullptr;
    return gradient;
  };
  Tensor dlr = like(lr, a.gate(), k_.dlr), ddecay = like(decay, a.gate(), k_.ddecay);
  Tensor dmomentum = like(momentum, a.gate(), k_.dmomentum);
  Tensor dw1 = like(w1, a.first(), k_.dw[0]), dw2 = like(w2, a.second(), k_.dw[1]);
  Tensor ds1 = like(s1, a.first(), k_.ds[0]), ds2 = like(s2, a.second(), k_.ds[1]);
  if (k_.T > 0) {
    run(k_, kernels().backward[index(a)]);
  } else {  // results are copies of the arguments
    const int64_t bytes = k_.B * k_.H * k_.layer_size() * (a.real() == ScalarType::Double ? 8 : 4);
    for (int i = 0; i < 2; ++i) {
      pass_on(k_.grad_w[i], bytes, k_.dw[i]);
      pass_on(k_.grad_s[i], bytes, k_.ds[i]);
    }
  }

  const auto typed = [](const Tensor& gradient, const Optional& t) {
    return t ? as_type(gradient, t->scalar_type()) : gradient;
  };
  return {dq,
          dk,
          dv,
          typed(dlr, lr),
          typed(ddecay, decay),
          typed(dmomentum, momentum),
          typed(dw1, w1),
          typed(dw2, w2),
          typed(ds1, s1),
          typed(ds2, s2)};
}

}  // namespace
}  // namespace seqops

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "memory(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? decay, Tensor? momentum, Tensor w1, Tensor? w2, "
      "Tensor? s1, Tensor? s2, int chunk_size, *, str loss='l2', int window=1) "
      "-> (Tensor o, Tensor w1, Tensor w2, Tensor s1, Tensor s2)");
  m.def(
      "memory_forward(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? decay, Tensor? momentum, Tensor w1, Tensor? w2, "
      "Tensor? s1, Tensor? s2, int chunk_size, *, str loss='l2', int window=1) "
      "-> (Tensor o, Tensor w1, Tensor w2, Tensor s1, Tensor s2, Tensor states)");
  m.def(
      "memory_backward(Tensor? grad_o, Tensor? grad_w1, Tensor? grad_w2, Tensor? grad_s1, Tensor? grad_s2, Tensor q, "
      "Tensor k, Tensor v, Tensor lr, Tensor? decay, Tensor? momentum, Tensor w1, Tensor? w2, Tensor? s1, Tensor? s2, "
      "Tensor states, int chunk_size, *, str loss='l2', int window=1) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlr, "
      "Tensor ddecay, Tensor dmomentum, Tensor dw1, Tensor dw2, Tensor ds1, Tensor ds2)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("memory", TORCH_BOX(&seqops::memory));
  m.impl("memory_forward", TORCH_BOX(&seqops::memory_forward));
  m.impl("memory_backward", TORCH_BOX(&seqops::memory_backward));
}
