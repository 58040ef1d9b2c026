// Passes of test-time training over large chunks on the CPU: schemas, checks, and rows shared out among threads.
//
// seqops/ttt/composed_large_chunk_ttt.py calls them between matrix products. They write into their arguments and have
// neither gradients nor shapes without data, so they are no operators of seqops.
#include "passes.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/rows.h"

namespace seqops {
namespace {

const PassKernels::OfType& kernels(ScalarType dtype) {
  const int type = dtype == ScalarType::Double ? 1 : 0;
#define SEQOPS_ROW(name) \
  case Isa::name: return name::large_chunk_ttt_passes.types[type];
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("large_chunk_ttt: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// One pass: its name, and the tensor that gives dtype and shape.
struct Pass {
  const char* op;
  const Tensor& like;

  Pass(const char* op, const char* name, const Tensor& like) : op(op), like(like) {
    check(like.dim() == 3, op, ": ", name, ": expected 3 dimensions, got shape ", shape_text(like));
    check_type(op, name, like, {ScalarType::Float, ScalarType::Double});
  }

  // [N, rows, width], whose last dimension is dense.
  Matrices matrices(const char* name, const Tensor& t, int64_t width) const {
    check_type(op, name, t, {like.scalar_type()});
    check_shape(op, name, t, "[N, rows, width]", {like.size(0), like.size(1), width});
    check(width <= 1 || t.stride(2) == 1, op, ": ", name, ": expected a dense last dimension, got stride ",
          t.stride(2));
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
  }
  Matrices matrices(const char* name, const Tensor& t) const { return matrices(name, t, like.size(2)); }

  // [N, rows]
  Matrices numbers(const char* name, const Tensor& t) const {
    check_type(op, name, t, {like.scalar_type()});
    check_shape(op, name, t, "[N, rows]", {like.size(0), like.size(1)});
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
  }

  template <class Arguments>
  void run(const Arguments& arguments, void (*kernel)(const Arguments&, int64_t, int64_t)) const {
    constexpr int64_t NUMBERS_OF_THREAD = 1 << 14;  // less is not worth waking another thread
    if (like.numel() == 0) return;
    const int64_t grain = std::max<int64_t>(1, NUMBERS_OF_THREAD / like.size(2));
    torch::stable::parallel_for(0, like.size(0) * like.size(1), grain,
                                [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  }
};

void gate(const Tensor& y0, const Tensor& y2, Tensor out) {
  const Pass pass("gate", "y0", y0);
  TokenPass k = {y0.size(1), y0.size(2)};
  k.y0 = pass.matrices("y0", y0), k.y2 = pass.matrices("y2", y2), k.h = pass.matrices("out", out);
  pass.run(k, kernels(y0.scalar_type()).gate);
}

void gate_backward(const Tensor& y0, const Tensor& y2, const Tensor& dh, Tensor dy0, Tensor dy2, Tensor h) {
  const Pass pass("gate_backward", "y0", y0);
  TokenPass k = {y0.size(1), y0.size(2)};
  k.y0 = pass.matrices("y0", y0), k.y2 = pass.matrices("y2", y2), k.p1 = pass.matrices("dh", dh);
  k.dy0 = pass.matrices("dy0", dy0), k.dy2 = pass.matrices("dy2", dy2), k.h = pass.matrices("h", h);
  pass.run(k, kernels(y0.scalar_type()).gate_backward);
}

void learn(const Tensor& y0, const Tensor& y2, const Tensor& g, const Tensor& lr, Tensor e0, Tensor h, Tensor e2) {
  const Pass pass("learn", "y0", y0);
  TokenPass k = {y0.size(1), y0.size(2)};
  k.y0 = pass.matrices("y0", y0), k.y2 = pass.matrices("y2", y2), k.g = pass.matrices("g", g);
  k.rates = pass.matrices("lr", lr, 3);
  k.e0 = pass.matrices("e0", e0), k.h = pass.matrices("h", h), k.e2 = pass.matrices("e2", e2);
  pass.run(k, kernels(y0.scalar_type()).learn);
}

void learn_backward(const Tensor& y0, const Tensor& y2, const Tensor& g, const Tensor& lr, const Tensor& p0,
                    const Tensor& p1, const Tensor& p2, Tensor dy0, Tensor dy2, Tensor dg, Tensor e0, Tensor h,
                    Tensor e2, Tensor dlr) {
  const Pass pass("learn_backward", "y0", y0);
  TokenPass k = {y0.size(1), y0.size(2)};
  k.y0 = pass.matrices("y0", y0), k.y2 = pass.matrices("y2", y2), k.g = pass.matrices("g", g);
  k.p0 = pass.matrices("p0", p0), k.p1 = pass.matrices("p1", p1), k.p2 = pass.matrices("p2", p2);
  k.dy0 = pass.matrices("dy0", dy0), k.dy2 = pass.matrices("dy2", dy2), k.dg = pass.matrices("dg", dg);
  k.e0 = pass.matrices("e0", e0), k.h = pass.matrices("h", h), k.e2 = pass.matrices("e2", e2);
  k.rates = pass.matrices("lr", lr, 3), k.drates = pass.matrices("dlr", dlr, 3);
  pass.run(k, kernels(y0.scalar_type()).learn_backward);
}

void renew(const Tensor& w, const Tensor& d, Optional norms0, Tensor out, std::optional<Tensor> norms,
           std::optional<Tensor> copy) {
  const Pass pass("renew", "w", w);
  check(!norms0 || norms, pass.op, ": norms: expected a tensor beside norms0, got None");
  check(!copy, pass.op, ": copy: expected None on the CPU, got a tensor");
  WeightPass k = {w.size(1), w.size(2)};
  k.w = pass.matrices("w", w), k.d = pass.matrices("d", d), k.out = pass.matrices("out", out);
  if (norms0) k.norms0 = pass.numbers("norms0", *norms0), k.norms = pass.numbers("norms", *norms);
  pass.run(k, kernels(w.scalar_type()).renew);
}

void renew_backward(Tensor dw, const Tensor& w, const Tensor& norms0, const Tensor& norms, Tensor dnorms0) {
  const Pass pass("renew_backward", "w", w);
  WeightPass k = {w.size(1), w.size(2)};
  k.w = pass.matrices("w", w), k.out = pass.matrices("dw", dw);
  k.norms0 = pass.numbers("norms0", norms0), k.norms = pass.numbers("norms", norms);
  k.dnorms0 = pass.numbers("dnorms0", dnorms0);
  pass.run(k, kernels(w.scalar_type()).renew_backward);
}

}  // namespace
}  // namespace seqops

STABLE_TORCH_LIBRARY(seqops_passes, m) {
  m.def("gate(Tensor y0, Tensor y2, Tensor(a!) out) -> ()");
  m.def("gate_backward(Tensor y0, Tensor y2, Tensor dh, Tensor(a!) dy0, Tensor(b!) dy2, Tensor(c!) h) -> ()");
  m.def("learn(Tensor y0, Tensor y2, Tensor g, Tensor lr, Tensor(a!) e0, Tensor(b!) h, Tensor(c!) e2) -> ()");
  m.def(
      "learn_backward(Tensor y0, Tensor y2, Tensor g, Tensor lr, Tensor p0, Tensor p1, Tensor p2, Tensor(a!) dy0, "
      "Tensor(b!) dy2, Tensor(c!) dg, Tensor(d!) e0, Tensor(e!) h, Tensor(f!) e2, Tensor(g!) dlr) -> ()");
  m.def("renew(Tensor w, Tensor d, Tensor? norms0, Tensor(a!) out, Tensor(b!)? norms, Tensor(c!)? copy) -> ()");
  m.def("renew_backward(Tensor(a!) dw, Tensor w, Tensor norms0, Tensor norms, Tensor(b!) dnorms0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seqops_passes, CPU, m) {
  m.impl("gate", TORCH_BOX(&seqops::gate));
  m.impl("gate_backward", TORCH_BOX(&seqops::gate_backward));
  m.impl("learn", TORCH_BOX(&seqops::learn));
  m.impl("learn_backward", TORCH_BOX(&seqops::learn_backward));
  m.impl("renew", TORCH_BOX(&seqops::renew));
  m.impl("renew_backward", TORCH_BOX(&seqops::renew_backward));
}
