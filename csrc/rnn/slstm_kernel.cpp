// sLSTM (xLSTM, Beck et al. 2024): exponential input gate, logistic forget gate in the log domain, stabiliser m.
//   l = log sigmoid(p_f) + m_before;  m = max(l, p_i);  i = exp(p_i - m);  f = exp(l - m);  z = tanh(p_z)
//   c = f c_before + i z;  n = f n_before + i;  h = sigmoid(p_o) c / n          (c / n = 0 where n = 0)
// Gates i, f, z, o; states h, c, n, m. h does not depend on m, so inside a step m is a constant; only gradients given to
// the final states see it: `delta` follows the winner of the max from dm_n - (dc_n c_n + dn_n n_n) back to dm0.
#include "recurrence.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Slstm {
  static constexpr int GATES = 4;
  static constexpr bool CARRIES = false;
  enum { I, F, Z, O };
  // the cache: i; f, negative where p_i won the max; sigmoid(-p_f); p_z; p_o; c; n
  enum { CACHE_I, CACHE_F, CACHE_FORGET_SLOPE, CACHE_Z, CACHE_O, CACHE_C, CACHE_N, CACHES };

  template <class Real>
  static SEQOPS_INLINE Vector<Real> quotient(Vector<Real> c, Vector<Real> n) {
    return n == static_cast<Real>(0) ? Vector<Real>{} : c / n;
  }

  template <class S>
  static SEQOPS_INLINE void forward(const Forward& a, const Place<Compute<S>>& at, const Compute<S>* y) {
    using Real = Compute<S>;
    Vector<Real> p[GATES];
    for (int gate = 0; gate < GATES; ++gate) {
      p[gate] = load(y + gate * LANES<Real>) + bias<S>(a, at, gate) + input_projection<S>(a, at, gate);
    }
    const Vector<Real> l = log_sigmoid<Real>(p[F]) + state<Real>(a.state, 3, at);
    const Bits<Real> input_won = (p[I] >= l) | (p[I] != p[I]);  // NaN on either side wins over numbers
    const Vector<Real> m = input_won ? p[I] : l;
    const Bits<Real> nothing = m == constant<Real>(-__builtin_inf());  // both are -inf: their difference would be NaN
    const Vector<Real> i = nothing ? Vector<Real>{} : exp<Real>(p[I] - m);
    const Vector<Real> f = nothing ? Vector<Real>{} : exp<Real>(l - m);
    const Vector<Real> c = f * state<Real>(a.state, 1, at) + i * tanh<Real>(p[Z]);
    const Vector<Real> n = f * state<Real>(a.state, 2, at) + i;
    set_state<Real>(a.state, 1, at, c);
    set_state<Real>(a.state, 2, at, n);
    set_state<Real>(a.state, 3, at, m);
    emit_h<S>(a, at, sigmoid<Real>(p[O]) * quotient<Real>(c, n));
    if (a.cache != nullptr) {
      emit_cache<S>(a.cache, at, CACHES, CACHE_I, i);
      emit_cache<S>(a.cache, at, CACHES, CACHE_F, input_won ? -f : f);
      emit_cache<S>(a.cache, at, CACHES, CACHE_FORGET_SLOPE, sigmoid<Real>(-p[F]));
      emit_cache<S>(a.cache, at, CACHES, CACHE_Z, p[Z]);
      emit_cache<S>(a.cache, at, CACHES, CACHE_O, p[O]);
      emit_cache<S>(a.cache, at, CACHES, CACHE_C, c);
      emit_cache<S>(a.cache, at, CACHES, CACHE_N, n);
    }
  }

  template <class S>
  static SEQOPS_INLINE void backward(const Backward& a, const Place<Compute<S>>& at, Vector<Compute<S>> e) {
    using Real = Compute<S>;
    const Vector<Real> i = cached<S>(a.cache, at, CACHES, CACHE_I);
    const Vector<Real> marked_f = cached<S>(a.cache, at, CACHES, CACHE_F);
    const Bits<Real> input_won = (Bits<Real>)marked_f < 0;  // the sign bit, also of -0
    const Vector<Real> f = input_won ? -marked_f : marked_f;
    const Vector<Real> slope = cached<S>(a.cache, at, CACHES, CACHE_FORGET_SLOPE);
    const Vector<Real> z = tanh<Real>(cached<S>(a.cache, at, CACHES, CACHE_Z));
    const Vector<Real> o = sigmoid<Real>(cached<S>(a.cache, at, CACHES, CACHE_O));
    const Vector<Real> c = cached<S>(a.cache, at, CACHES, CACHE_C);
    const Vector<Real> n = cached<S>(a.cache, at, CACHES, CACHE_N);
    const Vector<Real> c_before = previous<S>(at, a.cache, CACHES, CACHE_C, a.initial[1]);
    const Vector<Real> n_before = previous<S>(at, a.cache, CACHES, CACHE_N, a.initial[2]);

    Vector<Real> dc = state<Real>(a.dstate, 1, at), dn = state<Real>(a.dstate, 2, at);
    Vector<Real> delta = state<Real>(a.dstate, 3, at);
    if (at.last) {
      const Vector<Real> c_n = load(static_cast<const Real*>(a.final[1]) + at.state, at.n);
      const Vector<Real> n_n = load(static_cast<const Real*>(a.final[2]) + at.state, at.n);
      delta -= dc * c_n + dn * n_n;
    }
    const Vector<Real> q = quotient<Real>(c, n);
    const Vector<Real> dq = quotient<Real>(e * o, n);  // times dn/dq = -q
    dc += dq;
    dn -= dq * q;
    const Vector<Real> nothing = {};
    const Vector<Real> dp[GATES] = {
        (dc * z + dn) * i + (input_won ? delta : nothing),
        ((dc * c_before + dn * n_before) * f + (input_won ? nothing : delta)) * slope,
        dc * i * (1 - z * z),
        e * q * o * (1 - o),
    };
    for (int gate = 0; gate < GATES; ++gate) {
      emit_dwx<S>(a, at, GATES, gate, dp[gate]);
      emit_dy<S>(a, at, gate, dp[gate]);
    }
    set_state<Real>(a.dstate, 1, at, dc * f);
    set_state<Real>(a.dstate, 2, at, dn * f);
    set_state<Real>(a.dstate, 3, at, input_won ? nothing : delta);
  }

  template <class S>
  static SEQOPS_INLINE void finish(const Backward& a, const Place<Compute<S>>& at) {
    using Real = Compute<S>;
    Vector<Real> dm0 = state<Real>(a.dstate, 3, at);
    for (int index = 1; index <= 2; ++index) {
      if (a.initial[index] == nullptr) continue;
      dm0 += state<Real>(a.dstate, index, at) * load(static_cast<const Real*>(a.initial[index]) + at.state, at.n);
    }
    set_state<Real>(a.dstate, 3, at, dm0);
  }
};

}  // namespace

extern const CellKernels slstm_kernels = SEQOPS_CELL_KERNELS(Slstm);

}  // namespace seqops::SEQOPS_ISA
