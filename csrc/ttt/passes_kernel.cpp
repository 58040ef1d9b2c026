// Passes of test-time training over large chunks, compiled once per instruction set. See passes.h.
#include "../common/vector.h"
#include "passes.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
T* row_of(const Matrices& m, int64_t n, int64_t r) {
  return static_cast<T*>(m.data) + n * m.batch + r * m.row;
}

template <class T>
struct Gate {
  Vector<T> s, s1;  // silu and its slope
  Vector<T> sg, x;

  explicit SEQOPS_INLINE Gate(Vector<T> y) : sg(sigmoid<T>(y)), x(y) {
    s = x * sg;
    s1 = sg * (x * (static_cast<T>(1) - sg) + static_cast<T>(1));
  }
  SEQOPS_INLINE Vector<T> s2() const {
    const Vector<T> other = static_cast<T>(1) - sg;
    return sg * other * (x * (other - sg) + static_cast<T>(2));
  }
};

template <class T>
SEQOPS_INLINE T sum_of(Vector<T> v) {
  T sum = 0;
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES<T>; ++lane) sum += v[lane];
  return sum;
}

template <class T>
void gate(const TokenPass& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / k.C, c = row % k.C;
    const T *y0 = row_of<T>(k.y0, n, c), *y2 = row_of<T>(k.y2, n, c);
    T* h = row_of<T>(k.h, n, c);
    for (int64_t f = 0; f < k.F; f += LANES<T>) {
      const int64_t valid = k.F - f;
      store(h + f, Gate<T>(load(y0 + f, valid)).s * load(y2 + f, valid), valid);
    }
  }
}

template <class T>
void gate_backward(const TokenPass& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / k.C, c = row % k.C;
    const T *y0 = row_of<T>(k.y0, n, c), *y2 = row_of<T>(k.y2, n, c), *dh = row_of<T>(k.p1, n, c);
    T *dy0 = row_of<T>(k.dy0, n, c), *dy2 = row_of<T>(k.dy2, n, c), *h = row_of<T>(k.h, n, c);
    for (int64_t f = 0; f < k.F; f += LANES<T>) {
      const int64_t valid = k.F - f;
      const Gate<T> gate(load(y0 + f, valid));
      const Vector<T> linear = load(y2 + f, valid), d = load(dh + f, valid);
      store(dy0 + f, d * linear * gate.s1, valid);
      store(dy2 + f, d * gate.s, valid);
      store(h + f, gate.s * linear, valid);
    }
  }
}

template <class T>
void learn(const TokenPass& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / k.C, c = row % k.C;
    const T *y0 = row_of<T>(k.y0, n, c), *y2 = row_of<T>(k.y2, n, c), *p_g = row_of<T>(k.g, n, c);
    const T* rates = row_of<T>(k.rates, n, c);
    const T rate0 = rates[0], rate1 = rates[1], rate2 = rates[2];
    T *e0 = row_of<T>(k.e0, n, c), *h = row_of<T>(k.h, n, c), *e2 = row_of<T>(k.e2, n, c);
    for (int64_t f = 0; f < k.F; f += LANES<T>) {
      const int64_t valid = k.F - f;
      const Gate<T> gate(load(y0 + f, valid));
      const Vector<T> linear = load(y2 + f, valid), g = load(p_g + f, valid);
      store(e0 + f, rate0 * (g * linear * gate.s1), valid);
      store(h + f, rate1 * (gate.s * linear), valid);
      store(e2 + f, rate2 * (g * gate.s), valid);
    }
  }
}

template <class T>
void learn_backward(const TokenPass& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / k.C, c = row % k.C;
    const T *y0 = row_of<T>(k.y0, n, c), *y2 = row_of<T>(k.y2, n, c), *p_g = row_of<T>(k.g, n, c);
    const T *p0 = row_of<T>(k.p0, n, c), *p1 = row_of<T>(k.p1, n, c), *p2 = row_of<T>(k.p2, n, c);
    const T* rates = row_of<T>(k.rates, n, c);
    const T rate0 = rates[0], rate1 = rates[1], rate2 = rates[2];
    T *dy0 = row_of<T>(k.dy0, n, c), *dy2 = row_of<T>(k.dy2, n, c), *dg = row_of<T>(k.dg, n, c);
    T *e0 = row_of<T>(k.e0, n, c), *h = row_of<T>(k.h, n, c), *e2 = row_of<T>(k.e2, n, c);
    Vector<T> drate0 = {}, drate1 = {}, drate2 = {};
    for (int64_t f = 0; f < k.F; f += LANES<T>) {
      const int64_t valid = k.F - f;
      const Gate<T> gate(load(y0 + f, valid));
      const Vector<T> linear = load(y2 + f, valid), g = load(p_g + f, valid);
      const Vector<T> q0 = load(p0 + f, valid), q1 = load(p1 + f, valid), q2 = load(p2 + f, valid);
      const Vector<T> own0 = g * linear * gate.s1, own1 = gate.s * linear, own2 = g * gate.s;
      drate0 += own0 * q0, drate1 += own1 * q1, drate2 += own2 * q2;
      const Vector<T> a0 = rate0 * q0, a1 = rate1 * q1, a2 = rate2 * q2, bent = a0 * gate.s1;
      store(dg + f, a2 * gate.s + bent * linear, valid);
      store(dy2 + f, a1 * gate.s + bent * g, valid);
      store(dy0 + f, (a1 * linear + a2 * g) * gate.s1 + a0 * g * linear * gate.s2(), valid);
      store(e0 + f, rate0 * own0, valid);
      store(h + f, rate1 * own1, valid);
      store(e2 + f, rate2 * own2, valid);
    }
    T* drates = row_of<T>(k.drates, n, c);
    drates[0] = sum_of<T>(drate0), drates[1] = sum_of<T>(drate1), drates[2] = sum_of<T>(drate2);
  }
}

template <class T>
T root(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
  return __builtin_sqrt(x);
}

// What a row of this norm is divided by; NaN stays.
template <class T>
T divisor(T norm) {
  return norm < static_cast<T>(LEAST_NORM) ? static_cast<T>(LEAST_NORM) : norm;
}

template <class T>
void renew(const WeightPass& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / k.R, r = row % k.R;
    const T *w = row_of<T>(k.w, n, r), *d = row_of<T>(k.d, n, r);
    T* out = row_of<T>(k.out, n, r);
    Vector<T> squares = {};
    for (int64_t x = 0; x < k.X; x += LANES<T>) {
      const int64_t valid = k.X - x;
      const Vector<T> value = load(w + x, valid) + load(d + x, valid);
      squares += value * value;
      store(out + x, value, valid);
    }
    if (k.norms0.data == nullptr) continue;
    const T norm = root<T>(sum_of<T>(squares)), scale = *row_of<T>(k.norms0, n, r) / divisor<T>(norm);
    *row_of<T>(k.norms, n, r) = norm;
    for (int64_t x = 0; x < k.X; x += LANES<T>) {
      const int64_t valid = k.X - x;
      store(out + x, load(out + x, valid) * scale, valid);
    }
  }
}

template <class T>
T dot(const T* a, const T* b, int64_t size) {
  Vector<T> sum = {};
  for (int64_t i = 0; i < size; i += LANES<T>) sum += load(a + i, size - i) * load(b + i, size - i);
  return sum_of<T>(sum);
}

// With n0 and n of a row, u = w / |w|:  dn0 += <w, dw> / n0;  dw <- n0 / n (dw - u <u, dw>). What is left of a short row
// is little beside its rounding along w, so that is taken away once more.
template <class T>
void renew_backward(const WeightPass& k, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / k.R, r = row % k.R;
    const T norm0 = *row_of<T>(k.norms0, n, r), norm = *row_of<T>(k.norms, n, r);
    const T* w = row_of<T>(k.w, n, r);
    T* dw = row_of<T>(k.out, n, r);
    const T square = dot<T>(w, w, k.X), scale = norm0 / divisor<T>(norm);
    T along = dot<T>(w, dw, k.X);
    *row_of<T>(k.dnorms0, n, r) += norm0 == 0 ? static_cast<T>(0) : along / norm0;
    const bool keep = square == 0 || norm < static_cast<T>(LEAST_NORM);
    for (int times = 0; times < 2; ++times) {
      const T back = keep ? static_cast<T>(0) : along / square, factor = times == 0 ? static_cast<T>(1) : scale;
      for (int64_t x = 0; x < k.X; x += LANES<T>) {
        const int64_t valid = k.X - x;
        store(dw + x, (load(dw + x, valid) - load(w + x, valid) * back) * factor, valid);
      }
      if (times == 0) along = dot<T>(w, dw, k.X);
    }
  }
}

template <class T>
constexpr PassKernels::OfType PASSES = {gate<T>,           gate_backward<T>, learn<T>,
                                        learn_backward<T>, renew<T>,         renew_backward<T>};

}  // namespace

extern const PassKernels large_chunk_ttt_passes = {{PASSES<float>, PASSES<double>}};

}  // namespace seqops::SEQOPS_ISA
