// merge_attention on the CPU: see merge_attention.h for the notation.
#include "merge_attention.h"

#include "../common/vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

using K = MergeAttention;
constexpr int64_t STEPS = K::STEPS;

struct Steps {
  int64_t batch, first, count;

  Steps(const K& k, int64_t task) {
    const int64_t each = (k.T + STEPS - 1) / STEPS;
    batch = task / each, first = task % each * STEPS;
    count = k.T - first < STEPS ? k.T - first : STEPS;
  }
};

template <class S>
SEQOPS_INLINE S* row(const MergedRows& rows, const Steps& steps, int64_t i, int64_t head) {
  S* data = static_cast<S*>(rows.data);
  return data == nullptr ? nullptr : data + steps.batch * rows.batch + (steps.first + i) * rows.step + head * rows.head;
}

template <class Real>
SEQOPS_INLINE Real* sum(const MergedSums& sums, const Steps& steps, int64_t i, int64_t head) {
  return static_cast<Real*>(sums.data) + steps.batch * sums.batch + head * sums.head + (steps.first + i) * sums.step;
}

// `run(d, n)` for the vectors of D channels: n is a constant in all but the last, which may be shorter.
template <class Real, class Run>
SEQOPS_INLINE void for_each_vector(int64_t D, Run run) {
  constexpr int64_t L = LANES<Real>;
  int64_t d = 0;
  for (; d + L <= D; d += L) run(d, L);
  if (d < D) run(d, D - d);
}

// What is known of the steps of a task, in one head.
template <class Real>
struct Weights {
  alignas(64) Real first[STEPS], second[STEPS];  // w_1, w_2
  alignas(64) Real lse[STEPS];
  bool has_first[STEPS], has_second[STEPS];  // whether the set has keys
};

template <class Real>
SEQOPS_INLINE void weigh(const K& k, const Steps& steps, int64_t head, Weights<Real>& w) {
  constexpr Real INF = __builtin_inf();
  for (int64_t i = 0; i < STEPS; ++i) {
    const bool there = i < steps.count;
    w.first[i] = there ? *sum<Real>(k.lse1, steps, i, head) : -INF;
    w.second[i] = there ? *sum<Real>(k.lse2, steps, i, head) : -INF;
    w.has_first[i] = w.first[i] != -INF, w.has_second[i] = w.second[i] != -INF;
  }
  using V = Vector<Real>;
  for (int64_t i = 0; i < STEPS; i += LANES<Real>) {
    const V a = load(w.first + i), b = load(w.second + i);
    const V most = (a > b) ? a : ((a == a) ? b : a);  // NaN of either
    const V shift = (most == -INF) ? V{} : most;
    const V first = exp<Real>(a - shift), second = exp<Real>(b - shift), total = first + second;
    const V divisor = (total == V{}) ? constant<Real>(1) : total;
    store(w.first + i, first / divisor), store(w.second + i, second / divisor);
    // The larger of the two is 1, so the logarithm is of a number in [1, 2], or of NaN.
    const V lse = shift + log<Real>(divisor);
    store(w.lse + i, (total == V{}) ? constant<Real>(-INF) : lse);
  }
}

template <class S>
void forward(const K& k, int64_t task) {
  using Real = Compute<S>;
  using V = Vector<Real>;
  const Steps steps(k, task);
  Weights<Real> w;
  for (int64_t h = 0; h < k.H; ++h) {
    weigh(k, steps, h, w);
    for (int64_t i = 0; i < steps.count; ++i) {
      *sum<Real>(k.lse, steps, i, h) = w.lse[i];
      const S *o1 = row<S>(k.o1, steps, i, h), *o2 = row<S>(k.o2, steps, i, h);
      S* o = row<S>(k.o, steps, i, h);
      const bool both = w.has_first[i] && w.has_second[i];
      if (both) {
        for_each_vector<Real>(k.D, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
          store(o + d, w.first[i] * load(o1 + d, n) + w.second[i] * load(o2 + d, n), n);
        });
        continue;
      }
      const S* only = w.has_first[i] ? o1 : w.has_second[i] ? o2 : nullptr;
      const Real weight = w.has_first[i] ? w.first[i] : w.second[i];
      for (int64_t d = 0; d < k.D; d += LANES<Real>) {
        const int64_t n = k.D - d < LANES<Real> ? k.D - d : LANES<Real>;
        store(o + d, only == nullptr ? V{} : weight * load(only + d, n), n);
      }
    }
  }
}

// do_n = w_n do     dlse_1 = w_1 w_2 <do, o_1 - o_2> + w_1 dlse, and dlse_2 the same with 1 and 2 exchanged
template <class S>
void backward(const K& k, int64_t task) {
  using Real = Compute<S>;
  using V = Vector<Real>;
  const Steps steps(k, task);
  Weights<Real> w;
  for (int64_t h = 0; h < k.H; ++h) {
    weigh(k, steps, h, w);
    for (int64_t i = 0; i < steps.count; ++i) {
      const S *o1 = row<S>(k.o1, steps, i, h), *o2 = row<S>(k.o2, steps, i, h), *grad = row<S>(k.grad_o, steps, i, h);
      S *do1 = row<S>(k.do1, steps, i, h), *do2 = row<S>(k.do2, steps, i, h);
      const bool both = w.has_first[i] && w.has_second[i];
      V dots = {};
      if (both && grad != nullptr) {
        for_each_vector<Real>(k.D, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
          const V g = load(grad + d, n);
          dots += g * (load(o1 + d, n) - load(o2 + d, n));
          store(do1 + d, w.first[i] * g, n);
          store(do2 + d, w.second[i] * g, n);
        });
      } else {
        for (int64_t d = 0; d < k.D; d += LANES<Real>) {
          const int64_t n = k.D - d < LANES<Real> ? k.D - d : LANES<Real>;
          const V g = grad == nullptr ? V{} : load(grad + d, n);
          store(do1 + d, w.has_first[i] && grad != nullptr ? w.first[i] * g : V{}, n);
          store(do2 + d, w.has_second[i] && grad != nullptr ? w.second[i] * g : V{}, n);
        }
      }
      Real dot = 0;
      for (int lane = 0; lane < LANES<Real>; ++lane) dot += dots[lane];
      const Real grad_lse = k.grad_lse.data == nullptr ? 0 : *sum<Real>(k.grad_lse, steps, i, h);
      const Real apart = both && grad != nullptr ? w.first[i] * w.second[i] * dot : 0;
      *sum<Real>(k.dlse1, steps, i, h) = w.has_first[i] ? apart + w.first[i] * grad_lse : 0;
      *sum<Real>(k.dlse2, steps, i, h) = w.has_second[i] ? w.second[i] * grad_lse - apart : 0;
    }
  }
}

}  // namespace

extern const MergeAttentionKernels merge_attention_kernels = {
    {forward<float>, forward<double>, forward<bfloat16>, forward<float16>},
    {backward<float>, backward<double>, backward<bfloat16>, backward<float16>},
};

}  // namespace seqops::SEQOPS_ISA
