// held_keys on the CPU: see held_keys.h for the notation.
#include "held_keys.h"

#include "../common/vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Head {
  int64_t batch, head;

  Head(const HeldKeys& k, int64_t task) : batch(task / k.Hk), head(task % k.Hk) {}

  template <class S>
  SEQOPS_INLINE S* at(const HeldRows& rows, int64_t t) const {
    return static_cast<S*>(rows.data) + batch * rows.batch + t * rows.step + head * rows.head;
  }
};

SEQOPS_INLINE int64_t valid(const HeldKeys& k, int64_t d, int lanes) { return k.D - d < lanes ? k.D - d : lanes; }

template <class S, bool BY_ROW>
SEQOPS_INLINE void hold(const HeldKeys& k, const Head& head) {
  using Real = Compute<S>;
  using V = Vector<Real>;
  constexpr int L = LANES<Real>;
  const Real threshold = static_cast<Real>(k.threshold);
  for (int64_t t = 0; t < k.T; ++t) {
    const S *row = head.at<S>(k.k, t), *before = t == 0 ? nullptr : head.at<S>(k.held, t - 1);
    S* held = head.at<S>(k.held, t);
    const auto change = [&](V now, V past) { return (now == past) ? V{} : now - past; };
    const auto past = [&](int64_t d, int64_t n) { return before == nullptr ? V{} : load(before + d, n); };
    if constexpr (BY_ROW) {
      V squares = {};
      for (int64_t d = 0; d < k.D; d += L) {
        const int64_t n = valid(k, d, L);
        const V by = change(load(row + d, n), past(d, n));
        squares += by * by;
      }
      Real sum = 0;
      for (int lane = 0; lane < L; ++lane) sum += squares[lane];
      const Real size = sizeof(Real) == 8 ? __builtin_sqrt(sum) : __builtin_sqrtf(sum);
      const bool still = size <= threshold;
      for (int64_t d = 0; d < k.D; d += L) {
        const int64_t n = valid(k, d, L);
        store(held + d, still ? past(d, n) : load(row + d, n), n);
      }
    } else {
      for (int64_t d = 0; d < k.D; d += L) {
        const int64_t n = valid(k, d, L);
        const V now = load(row + d, n), old = past(d, n), by = change(now, old);
        store(held + d, (by <= threshold && -by <= threshold) ? old : now, n);
      }
    }
  }
}

template <class S>
void forward(const HeldKeys& k, int64_t task, void*) {
  const Head head(k, task);
  k.by_row ? hold<S, true>(k, head) : hold<S, false>(k, head);
}

// dk_t = the sum of the gradients from t up to the next move where t moved, else 0.
template <class S>
void backward(const HeldKeys& k, int64_t task, void* buffer) {
  using Real = Compute<S>;
  using V = Vector<Real>;
  constexpr int L = LANES<Real>;
  const Head head(k, task);
  Real* sums = static_cast<Real*>(buffer);
  for (int64_t d = 0; d < k.D; ++d) sums[d] = 0;
  for (int64_t t = k.T - 1; t >= 0; --t) {
    const S *held = head.at<S>(k.held, t), *before = t == 0 ? nullptr : head.at<S>(k.held, t - 1);
    const S* grad = head.at<S>(k.grad, t);
    S* dk = head.at<S>(k.dk, t);
    const auto moved = [&](int64_t d, int64_t n) {
      return load(held + d, n) != (before == nullptr ? V{} : load(before + d, n));
    };
    Bits<Real> any = {};
    if (k.by_row) {
      for (int64_t d = 0; d < k.D; d += L) any |= moved(d, valid(k, d, L));
      Bits<Real> all = {};
      for (int lane = 0; lane < L; ++lane) all |= any[lane] == 0 ? Bits<Real>{} : ~Bits<Real>{};
      any = all;
    }
    for (int64_t d = 0; d < k.D; d += L) {
      const int64_t n = valid(k, d, L);
      const V sum = load(sums + d, n) + load(grad + d, n);
      const Bits<Real> go = k.by_row ? any : moved(d, n);
      store(dk + d, (go != 0) ? sum : V{}, n);
      store(sums + d, (go != 0) ? V{} : sum, n);
    }
  }
}

}  // namespace

extern const HeldKeysKernels held_keys_kernels = {
    {forward<float>, forward<double>, forward<bfloat16>, forward<float16>},
    {backward<float>, backward<double>, backward<bfloat16>, backward<float16>},
};

}  // namespace seqops::SEQOPS_ISA
