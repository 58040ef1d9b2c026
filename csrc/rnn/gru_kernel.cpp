// GRU:  r = sigmoid(p_r);  z = sigmoid(p_z);  n = tanh(wx_n + r y_n);  h = (1 - z) n + z h_before;  y = r_weights h_before + b.
// Gates r, z, n with the reset applied after the product; state h. The backward reads p and y_n.
#include "recurrence.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Gru {
  static constexpr int GATES = 3;
  static constexpr bool CARRIES = true;  // z e reaches the step before without the product
  enum { R, Z, N };

  template <class S>
  static SEQOPS_INLINE void forward(const Forward& a, const Place<Compute<S>>& at, const Compute<S>* sums) {
    using Real = Compute<S>;
    Vector<Real> y[GATES];
    for (int gate = 0; gate < GATES; ++gate) y[gate] = load(sums + gate * LANES<Real>) + bias<S>(a, at, gate);
    const Vector<Real> p_r = input_projection<S>(a, at, R) + y[R];
    const Vector<Real> p_z = input_projection<S>(a, at, Z) + y[Z];
    const Vector<Real> p_n = input_projection<S>(a, at, N) + sigmoid<Real>(p_r) * y[N];
    const Vector<Real> z = sigmoid<Real>(p_z);
    emit_h<S>(a, at, (1 - z) * tanh<Real>(p_n) + z * state<Real>(a.state, 0, at));
    if (a.cache != nullptr) {
      emit_cache<S>(a.cache, at, GATES, R, p_r);
      emit_cache<S>(a.cache, at, GATES, Z, p_z);
      emit_cache<S>(a.cache, at, GATES, N, p_n);
      emit_cache<S>(a.cache_state, at, 1, 0, y[N]);
    }
  }

  template <class S>
  static SEQOPS_INLINE void backward(const Backward& a, const Place<Compute<S>>& at, Vector<Compute<S>> e) {
    using Real = Compute<S>;
    const Vector<Real> r = sigmoid<Real>(cached<S>(a.cache, at, GATES, R));
    const Vector<Real> z = sigmoid<Real>(cached<S>(a.cache, at, GATES, Z));
    const Vector<Real> n = tanh<Real>(cached<S>(a.cache, at, GATES, N));
    const Vector<Real> y_n = cached<S>(a.cache_state, at, 1, 0);
    const Vector<Real> h_before = previous<S>(at, a.h, 1, 0, a.initial[0]);
    const Vector<Real> dp_n = e * (1 - z) * (1 - n * n);
    const Vector<Real> dp_z = e * (h_before - n) * z * (1 - z);
    const Vector<Real> dp_r = dp_n * y_n * r * (1 - r);
    emit_dwx<S>(a, at, GATES, R, dp_r);
    emit_dwx<S>(a, at, GATES, Z, dp_z);
    emit_dwx<S>(a, at, GATES, N, dp_n);
    emit_dy<S>(a, at, R, dp_r);
    emit_dy<S>(a, at, Z, dp_z);
    emit_dy<S>(a, at, N, r * dp_n);
    store(static_cast<S*>(a.dy) + at.pair * at.values + at.lane0, r * dp_n, at.n);
    set_state<Real>(a.dstate, 0, at, z * e);
  }

  template <class S>
  static SEQOPS_INLINE void finish(const Backward&, const Place<Compute<S>>&) {}
};

}  // namespace

extern const CellKernels gru_kernels = SEQOPS_CELL_KERNELS(Gru);

}  // namespace seqops::SEQOPS_ISA
