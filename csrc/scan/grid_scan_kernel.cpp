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

SEQOPS_INLINE void write(float* p, float value) { *p = value; }
SEQOPS_INLINE void write(double* p, double value) { *p = value; }
template <class S>
SEQOPS_INLINE void write(S* p, float value) {
  p->bits = narrow(S{}, Vector<float>{} + value)[0];
}

// One row of nodes.
template <class E>
struct Line {
  E* data = nullptr;
  int64_t y = 0, h = 0;

  Line() = default;
  Line(const Nodes& nodes, int64_t b, int64_t i) : y(nodes.y), h(nodes.h) {
    if (nodes.data != nullptr) data = static_cast<E*>(nodes.data) + (b * nodes.b + i * nodes.x);
  }
  SEQOPS_INLINE E* at(int64_t j, int64_t head) const { return data + (j * y + head * h); }
  SEQOPS_INLINE explicit operator bool() const { return data != nullptr; }
};

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
      enter_row(b, i);
      if (strip > 0) wait_until(progress - 8, i + 1);
      for (int64_t head = first_head; head < last_head; ++head) {
        const T* from = strip > 0 ? handed(b, strip - 1, i, head) : BACKWARD ? nullptr : top_.at(0, head);
        copy(up_ + head * k_.D, from);
      }
      for (int64_t j = first; j < last; ++j) {
        for (int64_t head = first_head; head < last_head; ++head) {
          const Gates gates = gates_of(j, head);
          if (gates.cut) {
            node<true>(gates, i, j, head);
          } else {
            node<false>(gates, i, j, head);
          }
        }
      }
      for (int64_t head = first_head; head < last_head; ++head) {
        T* to = strip + 1 < k_.strips ? handed(b, strip, i, head) : BACKWARD ? end_.at(0, head) : nullptr;
        if (to != nullptr) copy(to, up_ + head * k_.D);
      }
      if (strip + 1 < k_.strips) __atomic_store_n(progress, i + 1, __ATOMIC_RELEASE);
    }
  }

  void enter_row(int64_t b, int64_t i) {
    rl_ = {k_.t_rl, b, i}, ru_ = {k_.t_ru, b, i}, dl_ = {k_.t_dl, b, i}, du_ = {k_.t_du, b, i};
    in_r_ = {k_.in_r, b, i}, in_d_ = {k_.in_d, b, i};
    out_r_ = {k_.out_r, b, i}, out_d_ = {k_.out_d, b, i};
    left_ = {k_.left, b, 0}, top_ = {k_.top, b, i}, carry_ = {k_.carry, b, 0}, end_ = {k_.end, b, i};
    if constexpr (BACKWARD) {
      r_ = {k_.r, b, i + 1}, d_ = {k_.d, b, i};
      drl_ = {k_.dt_rl, b, i}, dru_ = {k_.dt_ru, b, i}, ddl_ = {k_.dt_dl, b, i}, ddu_ = {k_.dt_du, b, i};
    } else if (WIDE) {
      before_ = {k_.out_r, b, i - 1};
    }
  }

  T* handed(int64_t b, int64_t strip, int64_t i, int64_t head) const {
    return static_cast<T*>(k_.hand_over) + (((b * k_.strips + strip) * k_.X + i) * k_.H + head) * k_.D;
  }

  void copy(T* to, const T* from) const {
    for (int64_t c = 0; c < k_.D; ++c) to[c] = from == nullptr ? 0 : from[c];
  }

  SEQOPS_INLINE Gates gates_of(int64_t j, int64_t head) const {
    const auto value = [&](const Line<const G>& gate) __attribute__((always_inline)) -> T {
      return gate ? static_cast<T>(scalar(gate.at(j, head))) : 0;
    };
    const Gates g = {value(rl_), value(ru_), value(dl_), value(du_), false};
    return {g.rl, g.ru, g.dl, g.du, g.rl == 0 || g.ru == 0 || g.dl == 0 || g.du == 0};
  }

  template <bool CUT>
  void node(const Gates& gates, int64_t i, int64_t j, int64_t head) {
    if constexpr (BACKWARD) {
      if (wants_gates_) {
        node_backward<CUT, true>(gates, i, j, head);
      } else {
        node_backward<CUT, false>(gates, i, j, head);
      }
    } else {
      node_forward<CUT>(gates, i, j, head);
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
  void node_forward(const Gates& gates, int64_t i, int64_t j, int64_t head) {
    const S *x_r = in_r_.at(j, head), *x_d = in_d_.at(j, head);
    S *r = out_r_.at(j, head), *d = out_d_.at(j, head);
    T *up = up_ + head * k_.D, *carry = carry_.at(j, head);
    const T* left = carry;
    if constexpr (WIDE) left = before_.at(j, head);
    if (i == 0) left = left_.at(j, head);
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
  void node_backward(const Gates& gates, int64_t i, int64_t j, int64_t head) {
    const S *dr = in_r_ ? in_r_.at(j, head) : nullptr, *dd = in_d_ ? in_d_.at(j, head) : nullptr;
    S *dx_r = out_r_.at(j, head), *dx_d = out_d_.at(j, head);
    T *next_up = up_ + head * k_.D, *next_left = carry_.at(j, head);
    // l and u of this node: of the nodes that the walk comes to next, or the initial states, which are in T.
    const S *left = r_.at(j, head), *up = d_.at(j + 1, head);
    const T* initial_left = i + 1 == k_.X ? left_.at(j, head) : nullptr;
    const T* initial_up = j + 1 == k_.Y ? top_.at(0, head) : nullptr;
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
      if (drl_) write(drl_.at(j, head), static_cast<Compute<G>>(sums.rl));
      if (dru_) write(dru_.at(j, head), static_cast<Compute<G>>(sums.ru));
      if (ddl_) write(ddl_.at(j, head), static_cast<Compute<G>>(sums.dl));
      if (ddu_) write(ddu_.at(j, head), static_cast<Compute<G>>(sums.du));
    }
  }

  const GridScan& k_;
  T* up_;  // [H, D]: of the node before in this row
  const bool wants_gates_;
  // The row that the walk is in.
  Line<const G> rl_, ru_, dl_, du_;
  Line<const S> in_r_, in_d_, r_, d_;
  Line<S> out_r_, out_d_;
  Line<const T> left_, top_, before_;
  Line<T> carry_, end_;
  Line<G> drl_, dru_, ddl_, ddu_;
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
