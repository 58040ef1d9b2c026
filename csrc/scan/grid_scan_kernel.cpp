// Scan over a grid:  r = t_rl l + t_ru u + x_r,  d = t_dl l + t_du u + x_d,  with l = r(x-1, y) and u = d(x, y-1).
// Backward, with P and Q what comes from (x+1, y) and (x, y+1):
//
//   g_r = dr + P, g_d = dd + Q;  P = t_rl g_r + t_dl g_d, Q = t_ru g_r + t_du g_d for the nodes before this one
//
// A walk goes along a row of nodes and, inside a node, through heads and their channels: every stream of memory is
// sequential. The row before is in cache, the node before in a buffer. A gate of exactly 0 lets nothing pass, whatever
// is on the other side: 0 * NaN is not formed.
#include "grid_scan.h"

#include "../common/team.h"
#include "walk.h"

namespace seqops::SEQOPS_ISA {
namespace {

// By bits: without SSE4.1 GCC 12 fails on the conditional operator where masks of 64 bits have been combined.
template <class T>
SEQOPS_INLINE Vector<T> keep(Bits<T> mask, Vector<T> v) {
  return (Vector<T>)(mask & (Bits<T>)v);
}

SEQOPS_INLINE float scalar(const float* p) { return *p; }
SEQOPS_INLINE double scalar(const double* p) { return *p; }
SEQOPS_INLINE float scalar(const bfloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
SEQOPS_INLINE float scalar(const float16* p) {
  Halves halves = {};
  halves[0] = p->bits;
  return widen(float16{}, halves)[0];
}

template <class E>
SEQOPS_INLINE E* at(const Nodes& nodes, int64_t b, int64_t i, int64_t j, int64_t head) {
  E* data = static_cast<E*>(nodes.data);
  return data == nullptr ? nullptr : data + (b * nodes.b + i * nodes.x + j * nodes.y + head * nodes.h);
}

template <class T>
struct Sums {
  T rl, ru, dl, du;
};

// The sums of four vectors' lanes, all at once where there are four lanes.
template <class T>
SEQOPS_INLINE Sums<T> lane_sums_of(Vector<T> rl, Vector<T> ru, Vector<T> dl, Vector<T> du) {
  if constexpr (LANES<T> < 4) {
    return {lane_sums<T>(rl)[0], lane_sums<T>(ru)[0], lane_sums<T>(dl)[0], lane_sums<T>(du)[0]};
  } else {
    // Two vectors into one: even lanes hold sums of neighbours in the first, odd ones in the second.
    const Bits<T> lane = lane_numbers<T>();
    const auto fold = [&](Vector<T> a, Vector<T> b, int distance) __attribute__((always_inline)) {
      const Bits<T> first = (lane & distance) == 0;
      const Vector<T> own = (Vector<T>)((first & (Bits<T>)a) | (~first & (Bits<T>)b));
      const Vector<T> other = (Vector<T>)((first & (Bits<T>)b) | (~first & (Bits<T>)a));
      return own + permute<T>(other, lane ^ distance);
    };
    Vector<T> all = fold(fold(rl, ru, 1), fold(dl, du, 1), 2);
#pragma GCC unroll 4
    for (int half = LANES<T> / 2; half >= 4; half /= 2) all += permute<T>(all, lane ^ half);
    return {all[0], all[1], all[2], all[3]};
  }
}

template <class S, class G, bool BACKWARD>
class Worker {
  using T = Compute<S>;
  using V = Vector<T>;
  static constexpr int64_t L = LANES<T>;
  static constexpr bool WIDE = sizeof(S) == sizeof(T);  // storage is as precise as the state

  struct Gates {
    T rl, ru, dl, du;
    bool cut;  // one of them is 0
  };

 public:
  Worker(const GridScan& k, int64_t worker)
      : k_(k), up_(static_cast<T*>(k.buffer) + worker * k.H * k.D), wants_gates_(BACKWARD && k.r.data != nullptr) {}

  void operator()() {
    const int64_t tasks = k_.B * k_.parts * k_.strips;
    for (;;) {
      const int64_t task = __atomic_fetch_add(k_.next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      const int64_t strip = task % k_.strips, part = task / k_.strips % k_.parts, b = task / k_.strips / k_.parts;
      walk(b, k_.H * part / k_.parts, k_.H * (part + 1) / k_.parts, strip, k_.progress + task * 8);
    }
  }

 private:
  void walk(int64_t b, int64_t first_head, int64_t last_head, int64_t strip, int64_t* progress) {
    const int64_t first = k_.Y * strip / k_.strips, last = k_.Y * (strip + 1) / k_.strips;
    for (int64_t i = 0; i < k_.X; ++i) {
      if (strip > 0) wait_until(progress - 8, i + 1);
      for (int64_t head = first_head; head < last_head; ++head) {
        const T* from = strip > 0  ? handed(b, strip - 1, i, head)
                        : BACKWARD ? nullptr
                                   : at<const T>(k_.top, b, i, 0, head);
        copy(up_ + head * k_.D, from);
      }
      for (int64_t j = first; j < last; ++j) {
        for (int64_t head = first_head; head < last_head; ++head) {
          const Gates gates = gates_of(b, i, j, head);
          if (gates.cut) {
            node<true>(gates, b, i, j, head);
          } else {
            node<false>(gates, b, i, j, head);
          }
        }
      }
      for (int64_t head = first_head; head < last_head; ++head) {
        T* to = strip + 1 < k_.strips ? handed(b, strip, i, head) : BACKWARD ? at<T>(k_.end, b, i, 0, head) : nullptr;
        if (to != nullptr) copy(to, up_ + head * k_.D);
      }
      if (strip + 1 < k_.strips) __atomic_store_n(progress, i + 1, __ATOMIC_RELEASE);
    }
  }

  T* handed(int64_t b, int64_t strip, int64_t i, int64_t head) const {
    return static_cast<T*>(k_.hand_over) + (((b * k_.strips + strip) * k_.X + i) * k_.H + head) * k_.D;
  }

  void copy(T* to, const T* from) const {
    for (int64_t c = 0; c < k_.D; ++c) to[c] = from == nullptr ? 0 : from[c];
  }

  Gates gates_of(int64_t b, int64_t i, int64_t j, int64_t head) const {
    const auto value = [&](const Nodes& gate) -> T {
      const G* p = at<const G>(gate, b, i, j, head);
      return p == nullptr ? 0 : static_cast<T>(scalar(p));
    };
    const Gates g = {value(k_.t_rl), value(k_.t_ru), value(k_.t_dl), value(k_.t_du), false};
    return {g.rl, g.ru, g.dl, g.du, g.rl == 0 || g.ru == 0 || g.dl == 0 || g.du == 0};
  }

  template <bool CUT>
  void node(const Gates& gates, int64_t b, int64_t i, int64_t j, int64_t head) {
    if constexpr (BACKWARD) {
      if (wants_gates_) {
        node_backward<CUT, true>(gates, b, i, j, head);
      } else {
        node_backward<CUT, false>(gates, b, i, j, head);
      }
    } else {
      node_forward<CUT>(gates, b, i, j, head);
    }
  }

  // A gate beside its mask: all ones, or zeros where the gate is 0.
  template <bool CUT>
  struct Gate {
    V value;
    Bits<T> mask;

    explicit SEQOPS_INLINE Gate(T gate) : value(V{} + gate), mask(V{} + gate != V{}) {}
    SEQOPS_INLINE V times(V v) const { return value * (CUT ? keep<T>(mask, v) : v); }
    // v times w, what a gate's gradient sums; nothing where an infinite or NaN v did not pass.
    SEQOPS_INLINE V gradient(V v, V w) const {
      if constexpr (!CUT) return v * w;
      return keep<T>(mask | (v - v == V{}), v * w);
    }
  };

  template <bool CUT>
  void node_forward(const Gates& gates, int64_t b, int64_t i, int64_t j, int64_t head) {
    const S *x_r = at<const S>(k_.in_r, b, i, j, head), *x_d = at<const S>(k_.in_d, b, i, j, head);
    S *r = at<S>(k_.out_r, b, i, j, head), *d = at<S>(k_.out_d, b, i, j, head);
    T *up = up_ + head * k_.D, *carry = WIDE ? nullptr : at<T>(k_.carry, b, 0, j, head);
    const T* left = carry;
    if constexpr (WIDE) left = at<const T>(k_.out_r, b, i - 1, j, head);
    if (i == 0) left = at<const T>(k_.left, b, 0, j, head);
    const Gate<CUT> rl(gates.rl), ru(gates.ru), dl(gates.dl), du(gates.du);
    const auto vector = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const V l = load(left + c, n), u = load(up + c, n);
      const V next_r = rl.times(l) + (ru.times(u) + load(x_r + c, n));
      const V next_d = dl.times(l) + (du.times(u) + load(x_d + c, n));
      store<S>(r + c, next_r, n);
      store<S>(d + c, next_d, n);
      store<T>(up + c, next_d, n);
      if constexpr (!WIDE) store<T>(carry + c, next_r, n);
    };
    int64_t c = 0;
    for (; c + L <= k_.D; c += L) vector(c, L);
    if (c < k_.D) vector(c, k_.D - c);
  }

  template <bool CUT, bool GATES>
  void node_backward(const Gates& gates, int64_t b, int64_t i, int64_t j, int64_t head) {
    const S *dr = at<const S>(k_.in_r, b, i, j, head), *dd = at<const S>(k_.in_d, b, i, j, head);
    S *dx_r = at<S>(k_.out_r, b, i, j, head), *dx_d = at<S>(k_.out_d, b, i, j, head);
    T *next_up = up_ + head * k_.D, *next_left = at<T>(k_.carry, b, 0, j, head);
    // l and u of this node: of the nodes that the walk comes to next, or the initial states, which are in T.
    const S* left = at<const S>(k_.r, b, i + 1, j, head);
    const S* up = at<const S>(k_.d, b, i, j + 1, head);
    const T* initial_left = i + 1 == k_.X ? at<const T>(k_.left, b, 0, j, head) : nullptr;
    const T* initial_up = j + 1 == k_.Y ? at<const T>(k_.top, b, i, 0, head) : nullptr;
    const Gate<CUT> rl(gates.rl), ru(gates.ru), dl(gates.dl), du(gates.du);
    V sum_rl = {}, sum_ru = {}, sum_dl = {}, sum_du = {};
    const auto vector = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const V g_r = (dr == nullptr ? V{} : load(dr + c, n)) + (i == 0 ? V{} : load(next_left + c, n));
      const V g_d = (dd == nullptr ? V{} : load(dd + c, n)) + load(next_up + c, n);
      store<S>(dx_r + c, g_r, n);
      store<S>(dx_d + c, g_d, n);
      store<T>(next_left + c, rl.times(g_r) + dl.times(g_d), n);
      store<T>(next_up + c, ru.times(g_r) + du.times(g_d), n);
      if constexpr (GATES) {
        const V l = initial_left == nullptr ? load(left + c, n) : load(initial_left + c, n);
        const V u = initial_up == nullptr ? load(up + c, n) : load(initial_up + c, n);
        sum_rl += rl.gradient(l, g_r);
        sum_ru += ru.gradient(u, g_r);
        sum_dl += dl.gradient(l, g_d);
        sum_du += du.gradient(u, g_d);
      }
    };
    int64_t c = 0;
    for (; c + L <= k_.D; c += L) vector(c, L);
    if (c < k_.D) vector(c, k_.D - c);
    if constexpr (GATES) {
      const Sums<T> sums = lane_sums_of<T>(sum_rl, sum_ru, sum_dl, sum_du);
      write(k_.dt_rl, b, i, j, head, sums.rl);
      write(k_.dt_ru, b, i, j, head, sums.ru);
      write(k_.dt_dl, b, i, j, head, sums.dl);
      write(k_.dt_du, b, i, j, head, sums.du);
    }
  }

  static SEQOPS_INLINE void write(const Nodes& gradient, int64_t b, int64_t i, int64_t j, int64_t head, T value) {
    if (G* p = at<G>(gradient, b, i, j, head)) store<G>(p, Vector<Compute<G>>{} + static_cast<Compute<G>>(value), 1);
  }

  const GridScan& k_;
  T* up_;  // [H, D]: of the node before in this row
  const bool wants_gates_;
};

template <class S, class G, bool BACKWARD>
void grid_scan(const GridScan& k, int64_t worker) {
  Worker<S, G, BACKWARD> run(k, worker);
  run();
}

}  // namespace

#define SEQOPS_PASSES(backward)                                                       \
  {                                                                                   \
      grid_scan<float, float, backward>,       grid_scan<double, double, backward>,   \
      grid_scan<bfloat16, bfloat16, backward>, grid_scan<float16, float16, backward>, \
      grid_scan<bfloat16, float, backward>,    grid_scan<float16, float, backward>}

extern const GridScanKernels grid_scan_kernels = {SEQOPS_PASSES(false), SEQOPS_PASSES(true)};

}  // namespace seqops::SEQOPS_ISA
