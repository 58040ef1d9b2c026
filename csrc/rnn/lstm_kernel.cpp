// LSTM:  c = sigmoid(p_f) c_before + sigmoid(p_i) tanh(p_g);  h = sigmoid(p_o) tanh(c);  p = wx + r h_before + b.
// Gates i, f, g, o; states h, c. The backward reads p and c: a saturated gate in bfloat16 would have no bits left in 1-σ.
#include "recurrence.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Lstm {
  static constexpr int GATES = 4;
  static constexpr bool CARRIES = false;
  enum { I, F, G, O };

  template <class S>
  static SEQOPS_INLINE void forward(const Forward& a, const Place<Compute<S>>& at, const Compute<S>* y) {
    using Real = Compute<S>;
    Vector<Real> p[GATES];
    for (int gate = 0; gate < GATES; ++gate) {
      p[gate] = load(y + gate * LANES<Real>) + bias<S>(a, at, gate) + input_projection<S>(a, at, gate);
    }
    const Vector<Real> c = sigmoid<Real>(p[F]) * state<Real>(a.state, 1, at) + sigmoid<Real>(p[I]) * tanh<Real>(p[G]);
    set_state<Real>(a.state, 1, at, c);
    emit_h<S>(a, at, sigmoid<Real>(p[O]) * tanh<Real>(c));
    if (a.cache != nullptr) {
      for (int gate = 0; gate < GATES; ++gate) emit_cache<S>(a.cache, at, GATES, gate, p[gate]);
      emit_cache<S>(a.cache_state, at, 1, 0, c);
    }
  }

  template <class S>
  static SEQOPS_INLINE void backward(const Backward& a, const Place<Compute<S>>& at, Vector<Compute<S>> e) {
    using Real = Compute<S>;
    const Vector<Real> i = sigmoid<Real>(cached<S>(a.cache, at, GATES, I));
    const Vector<Real> f = sigmoid<Real>(cached<S>(a.cache, at, GATES, F));
    const Vector<Real> g = tanh<Real>(cached<S>(a.cache, at, GATES, G));
    const Vector<Real> o = sigmoid<Real>(cached<S>(a.cache, at, GATES, O));
    const Vector<Real> s = tanh<Real>(cached<S>(a.cache_state, at, 1, 0));
    const Vector<Real> c_before = previous<S>(at, a.cache_state, 1, 0, a.initial[1]);
    const Vector<Real> dc = state<Real>(a.dstate, 1, at) + e * o * (1 - s * s);
    const Vector<Real> dp[GATES] = {dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g),
                                    e * s * o * (1 - o)};
    for (int gate = 0; gate < GATES; ++gate) {
      emit_dwx<S>(a, at, GATES, gate, dp[gate]);
      emit_dy<S>(a, at, gate, dp[gate]);
    }
    set_state<Real>(a.dstate, 1, at, dc * f);
  }

  template <class S>
  static SEQOPS_INLINE void finish(const Backward&, const Place<Compute<S>>&) {}
};

}  // namespace

extern const CellKernels lstm_kernels = SEQOPS_CELL_KERNELS(Lstm);
extern const Tiles rnn_tiles = {
    LANES<float>, LANES<double>, PAIRS<bfloat16>, {ROWS_OF[0], ROWS_OF[1], ROWS_OF[2], ROWS_OF[3], ROWS_OF[4]}};

}  // namespace seqops::SEQOPS_ISA
