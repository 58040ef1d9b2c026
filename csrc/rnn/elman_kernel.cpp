// Elman's network:  h = tanh(p) or max(p, 0);  p = wx + r h_before + b.  One gate, state h. The backward reads only h.
#include "recurrence.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Elman {
  static constexpr int GATES = 1;
  static constexpr bool CARRIES = false;

  template <class S>
  static SEQOPS_INLINE void forward(const Forward& a, const Place<Compute<S>>& at, const Compute<S>* y) {
    using Real = Compute<S>;
    const Vector<Real> p = load(y) + bias<S>(a, at, 0) + input_projection<S>(a, at, 0);
    emit_h<S>(a, at, a.relu ? at_least<Real>(p, 0) : tanh<Real>(p));
  }

  template <class S>
  static SEQOPS_INLINE void backward(const Backward& a, const Place<Compute<S>>& at, Vector<Compute<S>> e) {
    using Real = Compute<S>;
    const Vector<Real> h = cached<S>(a.h, at, 1, 0);
    const Vector<Real> dp = a.relu ? (h <= static_cast<Real>(0) ? Vector<Real>{} : e) : e * (1 - h * h);
    emit_dwx<S>(a, at, GATES, 0, dp);
    emit_dy<S>(a, at, 0, dp);
  }

  template <class S>
  static SEQOPS_INLINE void finish(const Backward&, const Place<Compute<S>>&) {}
};

}  // namespace

extern const CellKernels elman_kernels = SEQOPS_CELL_KERNELS(Elman);

}  // namespace seqops::SEQOPS_ISA
