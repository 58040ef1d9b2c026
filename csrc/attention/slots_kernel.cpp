// Sums over the slots of a row, and their gradient. See slots.h.
#include "../common/vector.h"
#include "slots.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class A>
SEQOPS_INLINE A least(A a, A b) {
  return a < b ? a : b;
}

// The slots of one row: `count` of them from `first` on.
struct Slots {
  const int32_t* first;
  int64_t count;
};

SEQOPS_INLINE Slots slots_of(const InverseLists& lists, int64_t b, int64_t h, int64_t t) {
  const int32_t* starts = lists.starts + b * lists.starts_b + h * lists.starts_h;
  return {lists.order + b * lists.order_b + h * lists.order_h + starts[t], int64_t{starts[t + 1]} - starts[t]};
}

SEQOPS_INLINE Slots last_of(Slots slots) { return slots.count > 1 ? Slots{slots.first + slots.count - 1, 1} : slots; }

// VECTORS vectors of a row of y, of which the last has n channels.
template <class S, int VECTORS>
SEQOPS_INLINE void sum_channels(const SlotSums& k, int64_t b, int64_t t, int64_t hk, int64_t d, int64_t n) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  const int64_t group = k.H / k.Hk;
  Vector<T> sums[VECTORS] = {};
  int64_t count = 0;
  for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
    Slots slots = slots_of(k.lists, b, h, t);
    if (k.reduce == Reduce::last) slots = last_of(slots);
    count += slots.count;
    const S* x = static_cast<const S*>(k.x) + b * k.x_b + h * k.x_h + d;
    for (int64_t i = 0; i < slots.count; ++i) {
      const S* p = x + slots.first[i] * k.x_s;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[v] += load(p + v * L, v + 1 < VECTORS ? L : n);
    }
  }
  S* y = static_cast<S*>(k.y) + ((b * k.T + t) * k.Hk + hk) * k.D + d;
  const bool divided = k.reduce == Reduce::mean && count > 1;
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    store(y + v * L, divided ? sums[v] / constant<T>(count) : sums[v], v + 1 < VECTORS ? L : n);
  }
}

// log sum exp over slots; -inf of none. What is infinite is not subtracted.
template <class T>
SEQOPS_INLINE double lse_of(const T* lse, Slots slots) {
  double most = -__builtin_inf();
  for (int64_t i = 0; i < slots.count; ++i) {
    const double value = lse[slots.first[i]];
    if (!(value <= most)) most = value;
  }
  if (slots.count == 1) return most;
  const double shift = __builtin_isfinite(most) ? most : 0.0;
  double total = 0;
  for (int64_t i = 0; i < slots.count; ++i) total += __builtin_exp(lse[slots.first[i]] - shift);
  return __builtin_log(total) + shift;
}

template <class S>
void sum(const SlotSums& k) {
  using R = Compute<S>;
  constexpr int64_t L = LANES<Compute<S>>;
  for (;;) {
    const int64_t first = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED) * k.rows_a_task;
    if (first >= k.B * k.T) return;
    for (int64_t row = first; row < least(first + k.rows_a_task, k.B * k.T); ++row) {
      const int64_t b = row / k.T, t = row % k.T;
      for (int64_t hk = 0; hk < k.Hk; ++hk) {
        int64_t d = 0;
        for (; d + 4 * L <= k.D; d += 4 * L) sum_channels<S, 4>(k, b, t, hk, d, L);
        for (; d < k.D; d += L) sum_channels<S, 1>(k, b, t, hk, d, least(L, k.D - d));
        if (k.lse == nullptr) continue;
        Slots slots = slots_of(k.lists, b, hk, t);
        if (k.reduce == Reduce::last) slots = last_of(slots);
        const R* lse = static_cast<const R*>(k.slot_lse) + (b * k.H + hk) * k.S;
        static_cast<R*>(k.lse)[(b * k.H + hk) * k.T + t] = static_cast<R>(lse_of(lse, slots));
      }
    }
  }
}

// dx of the slots of row t, of which `live` have a part in y; of none where t = T.
template <class S>
void spread_row(const SlotSpread& k, int64_t b, int64_t h, int64_t t, Slots slots, Slots live) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  S* dx = static_cast<S*>(k.dx) + (b * k.S * k.H + h) * k.D;
  const int64_t dead = live.count == 0 || k.dy == nullptr ? slots.count : live.first - slots.first;
  for (int64_t i = 0; i < dead; ++i) {
    __builtin_memset(dx + slots.first[i] * k.H * k.D, 0, k.D * sizeof(S));
  }
  if (dead == slots.count) return;
  const S* dy = static_cast<const S*>(k.dy) + b * k.dy_b + t * k.dy_t + h * k.dy_h;
  const bool divided = k.reduce == Reduce::mean && live.count > 1;
  for (int64_t d = 0; d < k.D; d += L) {
    const int64_t n = least(L, k.D - d);
    Vector<T> value = load(dy + d, n);
    if (divided) value = value / constant<T>(live.count);
    for (int64_t i = 0; i < live.count; ++i) store<S>(dx + live.first[i] * k.H * k.D + d, value, n);
  }
}

template <class S>
void spread(const SlotSpread& k) {
  using R = Compute<S>;
  const int64_t rows = k.B * (k.T + 1);
  for (;;) {
    const int64_t first = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED) * k.rows_a_task;
    if (first >= rows) return;
    for (int64_t row = first; row < least(first + k.rows_a_task, rows); ++row) {
      const int64_t b = row / (k.T + 1), t = row % (k.T + 1);
      for (int64_t h = 0; h < k.H; ++h) {
        const bool named = t < k.T;
        Slots slots;
        if (named) {
          slots = slots_of(k.lists, b, h, t);
        } else {
          const int32_t used = k.lists.starts[b * k.lists.starts_b + h * k.lists.starts_h + k.T];
          slots = {k.lists.order + b * k.lists.order_b + h * k.lists.order_h + used, k.S - used};
        }
        Slots live = slots;
        if (!named) live.count = 0;
        if (k.reduce == Reduce::last) live = last_of(live);
        spread_row<S>(k, b, h, t, slots, live);
        const int64_t head = b * k.H + h;
        const R* lse = static_cast<const R*>(k.slot_lse) + head * k.S;
        R* dlse = static_cast<R*>(k.dslot_lse) + head * k.S;
        for (int64_t i = 0; i < slots.count; ++i) dlse[slots.first[i]] = 0;
        if (live.count == 0 || k.dlse == nullptr) continue;
        const double total = lse_of(lse, live), from = static_cast<const R*>(k.dlse)[head * k.T + t];
        if (total == -__builtin_inf()) continue;
        for (int64_t i = 0; i < live.count; ++i) {
          const int32_t slot = live.first[i];
          dlse[slot] = static_cast<R>(live.count == 1 ? from : from * __builtin_exp(lse[slot] - total));
        }
      }
    }
  }
}

}  // namespace

extern const SlotKernels slot_kernels;
const SlotKernels slot_kernels = {{sum<float>, sum<double>, sum<bfloat16>, sum<float16>},
                                  {spread<float>, spread<double>, spread<bfloat16>, spread<float16>}};

}  // namespace seqops::SEQOPS_ISA
