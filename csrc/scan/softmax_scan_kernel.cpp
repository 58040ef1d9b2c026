// Softmax scan: with weights e^s, the running average of v. State (m, u, o): the largest s so far, u = sum e^(s - m), o.
//
//   m' = max(m, s)   u' = u e^(m - m') + e^(s - m')   p = e^(s - m') / u'   alpha = u e^(m - m') / u'   o' = alpha o + p v
//
// backward, from the last step to the first, R and r carried as alpha R and alpha r:
//   R = do + alpha_next R_next   r = <do, o> - dlse + alpha_next r_next   dv = p R   ds = p (<R, v> - r)
//
// alpha and p are computed once a head and step, then used for the D values of the head. A score of -inf is absent: its v
// does not enter even if it is NaN, and p is then -0. Where nothing came before, alpha is -0: nothing passes backwards. A
// weight that is merely too small is +0, and 0 * NaN is NaN.
#include "walk.h"

namespace seqops::SEQOPS_ISA {
namespace {

enum class Pass { forward, forward_reduce, backward, backward_reduce };

template <class T>
constexpr T TINY = sizeof(T) == 4 ? static_cast<T>(1.17549435e-38) : static_cast<T>(2.2250738585072014e-308);

template <class T>
constexpr T INF = static_cast<T>(__builtin_inf());

template <class T>
struct Weights {
  Vector<T> alpha, p;
};

// Whether a weight is -0: of nothing.
template <class T>
SEQOPS_INLINE Bits<T> is_nothing(Vector<T> weight) {
  return (Bits<T>)weight == (Bits<T>)(-Vector<T>{});
}

// Quotients, not products with 1 / u: alpha must be 1 exactly where a step adds nothing, or o would fade.
template <class T>
SEQOPS_INLINE Weights<T> shares(Vector<T> u_before, Vector<T> s, Vector<T> past, Vector<T> now, Vector<T> u) {
  const Vector<T> nothing = -Vector<T>{};
  return {u_before == static_cast<T>(0) ? nothing : past / u, s == -INF<T> ? nothing : now / u};
}

// One step of the state: (m, u) become (m', u').
template <class T>
SEQOPS_INLINE Weights<T> advance(Vector<T>& m, Vector<T>& u, Vector<T> s) {
  using V = Vector<T>;
  const Bits<T> larger = s > m;
  const V low = larger ? m - s : s - m;  // of the smaller against the larger; NaN where both are infinite
  const V e = exp<T>(low);
  const V past = larger ? u * e : u;
  const V now = larger ? constant<T>(1) : (s == -INF<T> ? V{} : e);
  const V u_before = u;
  u = past + now;
  m = larger ? s : m;
  return shares<T>(u_before, s, past, now, u);
}

// The same weights from the states before and after the step.
template <class T>
SEQOPS_INLINE Weights<T> between(Vector<T> m_before, Vector<T> u_before, Vector<T> m, Vector<T> u, Vector<T> s) {
  using V = Vector<T>;
  const V past = m_before == m ? u_before : u_before * exp<T>(m_before - m);
  const V now = s == m ? constant<T>(1) : exp<T>(s - m);
  return shares<T>(u_before, s, past, now, u);
}

template <class S, class G, Pass PASS>
class Worker {
  using T = Compute<S>;
  using V = Vector<T>;
  static constexpr int64_t L = LANES<T>;
  static constexpr bool BACKWARD = PASS == Pass::backward || PASS == Pass::backward_reduce;

 public:
  Worker(const SoftmaxScan& k, int64_t worker) : k_(k) {
    T* scratch = reinterpret_cast<T*>(static_cast<char*>(k.scratch) + worker * k.scratch_bytes);
    alpha_ = scratch;
    p_ = alpha_ + k.block * k.H;
    dot_o_ = p_ + k.block * k.H;
    dot_v_ = dot_o_ + k.block * k.H;
  }

  void operator()(const Task& task) {
    const Walk walk(k_, task);
    for (int64_t i = 0; i < task.steps; i += k_.block) {
      const int64_t steps = task.steps - i < k_.block ? task.steps - i : k_.block;
      for (int64_t head = 0; head < task.channels; head += L) {
        const int64_t n = task.channels - head < L ? task.channels - head : L;
        if constexpr (BACKWARD) {
          weights_backward(task, walk, i, steps, task.channel + head, n);
        } else {
          weights(task, walk, i, steps, task.channel + head, n);
        }
      }
      for (int64_t head = 0; head < task.channels; ++head) {  // through memory as the walk goes
        values(task, walk, i, steps, task.channel + (k_.descending ? task.channels - 1 - head : head));
      }
      if constexpr (BACKWARD) {
        for (int64_t head = 0; head < task.channels; head += L) {
          const int64_t n = task.channels - head < L ? task.channels - head : L;
          scores_backward(task, walk, i, steps, task.channel + head, n);
        }
      }
    }
  }

 private:
  T* carry(void* data, const Task& task, int64_t head) const { return static_cast<T*>(data) + task.slot * k_.H + head; }

  // alpha and p of a few steps of `n` heads, and what the forward stores of them.
  void weights(const Task& task, const Walk& walk, int64_t i, int64_t steps, int64_t head, int64_t n) {
    T *carry_m = carry(k_.carry_m, task, head), *carry_u = carry(k_.carry_u, task, head);
    V m = load(carry_m, n), u = load(carry_u, n);
    for (int64_t j = 0; j < steps; ++j) {
      const Weights<T> w = advance<T>(m, u, load(walk.at<const G>(k_.s, i + j, 1) + head, n));
      store<T>(alpha_ + j * k_.H + head, w.alpha, n);
      store<T>(p_ + j * k_.H + head, w.p, n);
      if constexpr (PASS == Pass::forward) {
        const V lse = u == static_cast<T>(0) ? constant<T>(-INF<T>) : m + log<T>(u);
        store<T>(walk.at<T>(k_.lse, i + j, 1) + head, lse, n);
        if (k_.m.data != nullptr) {
          store<T>(walk.at<T>(k_.m, i + j, 1) + head, m, n);
          store<T>(walk.at<T>(k_.u, i + j, 1) + head, u, n);
        }
      }
    }
    store<T>(carry_m, m, n);
    store<T>(carry_u, u, n);
  }

  void weights_backward(const Task& task, const Walk& walk, int64_t i, int64_t steps, int64_t head, int64_t n) {
    const int64_t last = k_.rows[task.row].steps - 1 - task.begin;  // where the walk meets the initial state
    for (int64_t j = 0; j < steps; ++j) {
      const bool first_step = i + j == last;
      const T* m_before =
          first_step ? static_cast<const T*>(k_.initial_m) + task.row * k_.H : walk.at<const T>(k_.m, i + j + 1, 1);
      const T* u_before =
          first_step ? static_cast<const T*>(k_.initial_u) + task.row * k_.H : walk.at<const T>(k_.u, i + j + 1, 1);
      const V m = load(walk.at<const T>(k_.m, i + j, 1) + head, n),
              u = load(walk.at<const T>(k_.u, i + j, 1) + head, n);
      const Weights<T> w = between<T>(load(m_before + head, n), load(u_before + head, n), m, u,
                                      load(walk.at<const G>(k_.s, i + j, 1) + head, n));
      store<T>(alpha_ + j * k_.H + head, w.alpha, n);
      store<T>(p_ + j * k_.H + head, w.p, n);
    }
  }

  // What the values of one head need of a few steps, looked up once: stores of vectors could alias anything.
  struct Lines {
    const S *v[STEPS], *o[STEPS], *grad_o[STEPS];
    S* y[STEPS];  // o, or dv
    V alpha[STEPS], p[STEPS];
  };

  // The D values of one head.
  void values(const Task& task, const Walk& walk, int64_t i, int64_t steps, int64_t head) {
    Lines at;
    for (int64_t j = 0; j < steps; ++j) {
      const int64_t channel = head * k_.D;
      at.v[j] = walk.at<const S>(k_.v, i + j, 1) + channel;
      at.alpha[j] = alpha_[j * k_.H + head] - V{};  // 0 + -0 would be 0
      at.p[j] = p_[j * k_.H + head] - V{};
      if constexpr (PASS == Pass::forward) at.y[j] = walk.at<S>(k_.o, i + j, 1) + channel;
      if constexpr (BACKWARD) {
        at.o[j] = walk.at<const S>(k_.o, i + j, 1) + channel;
        at.grad_o[j] = k_.grad_o.data == nullptr ? nullptr : walk.at<const S>(k_.grad_o, i + j, 1) + channel;
      }
      if constexpr (PASS == Pass::backward) at.y[j] = walk.at<S>(k_.dv, i + j, 1) + channel;
    }
    T* state = static_cast<T*>(k_.carry) + (task.slot * k_.H + head) * k_.D;
    V sum_o[STEPS], sum_v[STEPS];
    for (int64_t j = 0; j < steps; ++j) sum_o[j] = sum_v[j] = V{};
    const int64_t D = k_.D;
    const int64_t whole = D / L * L;
    if (!k_.descending) {
      for (int64_t d = 0; d < whole; d += L) vector(at, steps, state, d, L, sum_o, sum_v);
      if (whole < D) vector(at, steps, state, whole, D - whole, sum_o, sum_v);
    } else {
      if (whole < D) vector(at, steps, state, whole, D - whole, sum_o, sum_v);
      for (int64_t d = whole - L; d >= 0; d -= L) vector(at, steps, state, d, L, sum_o, sum_v);
    }
    if constexpr (BACKWARD) {
      for (int64_t j = 0; j < steps; ++j) {
        dot_o_[j * k_.H + head] = lane_sums<T>(sum_o[j])[0];
        dot_v_[j * k_.H + head] = lane_sums<T>(sum_v[j])[0];
      }
    }
  }

  static SEQOPS_INLINE void vector(const Lines& at, int64_t steps, T* state, int64_t d, int64_t n, V (&sum_o)[STEPS],
                                   V (&sum_v)[STEPS]) {
    V carry = load(state + d, n);
#pragma GCC unroll 4
    for (int64_t j = 0; j < steps; ++j) {
      const V alpha = at.alpha[j], p = at.p[j];
      const Bits<T> absent = is_nothing<T>(p);
      if constexpr (!BACKWARD) {
        const V v = load(at.v[j] + d, n);
        carry = alpha * carry + (absent ? V{} : p * v);
        if constexpr (PASS == Pass::forward) store<S>(at.y[j] + d, carry, n);
      } else {
        const V dy = at.grad_o[j] == nullptr ? V{} : load(at.grad_o[j] + d, n);
        const V R = carry + dy;
        sum_o[j] += dy * load(at.o[j] + d, n);
        if constexpr (PASS == Pass::backward) {
          sum_v[j] += R * load(at.v[j] + d, n);
          store<S>(at.y[j] + d, absent ? V{} : p * R, n);
        }
        carry = is_nothing<T>(alpha) ? V{} : alpha * R;
      }
    }
    store<T>(state + d, carry, n);
  }

  void scores_backward(const Task& task, const Walk& walk, int64_t i, int64_t steps, int64_t head, int64_t n) {
    T* carry_r = carry(k_.carry_m, task, head);
    V r = load(carry_r, n);
    for (int64_t j = 0; j < steps; ++j) {
      const V alpha = load(alpha_ + j * k_.H + head, n), p = load(p_ + j * k_.H + head, n);
      const T* grad_lse = walk.at<const T>(k_.grad_lse, i + j, 1);
      r += load(dot_o_ + j * k_.H + head, n);
      if (grad_lse != nullptr) r -= load(grad_lse + head, n);
      if constexpr (PASS == Pass::backward) {
        const V ds = p * (load(dot_v_ + j * k_.H + head, n) - r);
        store<G>(walk.at<G>(k_.ds, i + j, 1) + head, is_nothing<T>(p) ? V{} : ds, n);
      } else {
        T* product = carry(k_.carry_u, task, head);
        const V before = load(product, n), factor = before * alpha;
        const V kept = factor < TINY<T> ? constant<T>(TINY<T>) : factor;  // 0 only where nothing came before
        store<T>(product, is_nothing<T>(alpha) | (before == static_cast<T>(0)) ? V{} : kept, n);
      }
      r = is_nothing<T>(alpha) ? V{} : alpha * r;
    }
    store<T>(carry_r, r, n);
  }

  const SoftmaxScan& k_;
  T *alpha_, *p_, *dot_o_, *dot_v_;  // [block, H] each
};

template <class S, class G, Pass PASS>
void softmax_scan(const SoftmaxScan& k, int64_t worker) {
  Worker<S, G, PASS> run(k, worker);
  for_each_task(k, run);
}

}  // namespace

#define SEQOPS_PASSES(pass)                                                                                           \
  {softmax_scan<float, float, pass>,     softmax_scan<double, double, pass>,  softmax_scan<bfloat16, bfloat16, pass>, \
   softmax_scan<float16, float16, pass>, softmax_scan<bfloat16, float, pass>, softmax_scan<float16, float, pass>}

extern const SoftmaxScanKernels softmax_scan_kernels = {
    SEQOPS_PASSES(Pass::forward), SEQOPS_PASSES(Pass::forward_reduce), SEQOPS_PASSES(Pass::backward),
    SEQOPS_PASSES(Pass::backward_reduce)};

}  // namespace seqops::SEQOPS_ISA
