// Fourier transforms of LANES sequences at once: a register holds the same point of all of them.
//
// Not modulo z^n - 1, as usual, but modulo z^n - i: then n complex numbers x_t + i x_{t+n} are a real sequence of 2n, of
// which one product gives the convolution up to a sign where it wraps around: no weights, no packing of conjugates.
// A block is a polynomial modulo z^m - e^{ia}. It splits into R of degree q = m / R, modulo z^q - e^{i(a + 2 pi k) / R}:
//
//   child k has at j the sum over s < R of x[j + q s] e^{ias / R} w^{ks}, w = e^{2 pi i / R}
//
// so all butterflies of a block share their R - 1 twiddles. Blocks lie where their parent was: values come out in the
// order of the splits, and the inverse undoes these from the smallest blocks up. Nothing is ever reordered.
#pragma once

#include "../common/vector.h"
#include "fft_conv.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
struct Complex {
  Vector<T> re, im;
};

template <class T>
SEQOPS_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
SEQOPS_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
SEQOPS_INLINE Complex<T> operator*(Complex<T> a, T b) {
  return {a.re * b, a.im * b};
}

// a times b, or times conj(b).
template <bool CONJUGATE, class T>
SEQOPS_INLINE Complex<T> multiply(Complex<T> a, Complex<T> b) {
  if constexpr (CONJUGATE) return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
  return {a.re * b.re - a.im * b.im, a.im * b.re + a.re * b.im};
}

// a times i, or in the inverse times -i.
template <bool INVERSE, class T>
SEQOPS_INLINE Complex<T> quarter(Complex<T> a) {
  if constexpr (INVERSE) return {a.im, -a.re};
  return {-a.im, a.re};
}

// Points lie one after the other, real parts before imaginary ones.
template <class T>
constexpr int64_t POINT = 2 * LANES<T>;

template <class T>
SEQOPS_INLINE Complex<T> load_point(const T* x) {
  return {load(x), load(x + LANES<T>)};
}
template <class T>
SEQOPS_INLINE void store_point(T* x, Complex<T> value) {
  store<T>(x, value.re);
  store<T>(x + LANES<T>, value.im);
}

// ---- transforms of R points in registers: a[k] becomes the sum of a[i] w^{ik}, w = e^{2 pi i / R}, inverse e^{-2 pi i / R}

template <bool INVERSE, class T>
SEQOPS_INLINE void butterfly(Complex<T> (&a)[2]) {
  const Complex<T> sum = a[0] + a[1];
  a[1] = a[0] - a[1];
  a[0] = sum;
}

template <bool INVERSE, class T>
SEQOPS_INLINE void butterfly(Complex<T> (&a)[3]) {
  constexpr T SINE = static_cast<T>(0.86602540378443864676);  // sin(2 pi / 3)
  const Complex<T> sum = a[1] + a[2], side = quarter<INVERSE>((a[1] - a[2]) * SINE);
  const Complex<T> middle = a[0] - sum * static_cast<T>(0.5);
  a[0] = a[0] + sum;
  a[1] = middle + side;
  a[2] = middle - side;
}

template <bool INVERSE, class T>
SEQOPS_INLINE void butterfly(Complex<T> (&a)[4]) {
  const Complex<T> even = a[0] + a[2], even_rest = a[0] - a[2];
  const Complex<T> odd = a[1] + a[3], odd_rest = quarter<INVERSE>(a[1] - a[3]);
  a[0] = even + odd;
  a[1] = even_rest + odd_rest;
  a[2] = even - odd;
  a[3] = even_rest - odd_rest;
}

template <bool INVERSE, class T>
SEQOPS_INLINE void butterfly(Complex<T> (&a)[5]) {
  // cosines and sines of 2 pi / 5 and 4 pi / 5
  constexpr T C1 = static_cast<T>(0.30901699437494742410), C2 = static_cast<T>(-0.80901699437494742410);
  constexpr T S1 = static_cast<T>(0.95105651629515357212), S2 = static_cast<T>(0.58778525229247312917);
  const Complex<T> sum1 = a[1] + a[4], rest1 = a[1] - a[4], sum2 = a[2] + a[3], rest2 = a[2] - a[3];
  const Complex<T> middle1 = a[0] + sum1 * C1 + sum2 * C2, middle2 = a[0] + sum1 * C2 + sum2 * C1;
  const Complex<T> side1 = quarter<INVERSE>(rest1 * S1 + rest2 * S2), side2 = quarter<INVERSE>(rest1 * S2 - rest2 * S1);
  a[0] = a[0] + sum1 + sum2;
  a[1] = middle1 + side1;
  a[2] = middle2 + side2;
  a[3] = middle2 - side2;
  a[4] = middle1 - side1;
}

template <bool INVERSE, class T>
SEQOPS_INLINE void butterfly(Complex<T> (&a)[8]) {
  constexpr T HALF_ROOT = static_cast<T>(0.70710678118654752440);
  Complex<T> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
  butterfly<INVERSE>(even);
  butterfly<INVERSE>(odd);
  odd[1] = (odd[1] + quarter<INVERSE>(odd[1])) * HALF_ROOT;  // (1 + i) / sqrt(2)
  odd[2] = quarter<INVERSE>(odd[2]);
  odd[3] = (quarter<INVERSE>(odd[3]) - odd[3]) * HALF_ROOT;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    a[k] = even[k] + odd[k];
    a[k + 4] = even[k] - odd[k];
  }
}

// ---- passes: all butterflies of `count` blocks of R * q points each, or their inverses

template <int R, bool INVERSE, class T>
SEQOPS_INLINE void turn(Complex<T> (&a)[R], const T* twiddles) {
#pragma GCC unroll 8
  for (int i = 1; i < R; ++i) {
    const Complex<T> w = {Vector<T>{} + twiddles[2 * i - 2], Vector<T>{} + twiddles[2 * i - 1]};
    a[i] = multiply<INVERSE>(a[i], w);
  }
}

template <int R, bool INVERSE, class T>
void pass(T* x, int64_t count, int64_t q, const T* twiddles) {
  for (int64_t block = 0; block < count; ++block, twiddles += 2 * (R - 1), x += R * q * POINT<T>) {
    for (int64_t j = 0; j < q; ++j) {
      T* at = x + j * POINT<T>;
      Complex<T> a[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) a[i] = load_point(at + i * q * POINT<T>);
      if constexpr (!INVERSE) turn<R, false>(a, twiddles);
      butterfly<INVERSE>(a);
      if constexpr (INVERSE) turn<R, true>(a, twiddles);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) store_point(at + i * q * POINT<T>, a[i]);
    }
  }
}

template <bool INVERSE, class T>
void pass(int64_t radix, T* x, int64_t count, int64_t q, const T* twiddles) {
  switch (radix) {
    case 2: return pass<2, INVERSE>(x, count, q, twiddles);
    case 3: return pass<3, INVERSE>(x, count, q, twiddles);
    case 4: return pass<4, INVERSE>(x, count, q, twiddles);
    case 5: return pass<5, INVERSE>(x, count, q, twiddles);
    default: return pass<8, INVERSE>(x, count, q, twiddles);
  }
}

// ---- whole transforms

// What stays in the first cache while all its levels pass over it.
template <class T>
constexpr int64_t NEAR_POINTS = (24 << 10) / (POINT<T> * sizeof(T));

template <class T>
const T* twiddles_of(const FftPlan& plan, int64_t level, int64_t block) {
  return static_cast<const T*>(plan.twiddles[level]) + block * 2 * (plan.radix[level] - 1);
}

// A block of m points, number `block` of its level: all splits from there on, one part after the other.
template <class T>
void transform(const FftPlan& plan, T* x, int64_t level, int64_t block, int64_t m) {
  if (level == plan.levels) return;
  if (m <= NEAR_POINTS<T>) {
    for (int64_t count = 1; level < plan.levels; ++level) {
      const int64_t radix = plan.radix[level];
      m /= radix;
      pass<false>(radix, x, count, m, twiddles_of<T>(plan, level, block));
      count *= radix, block *= radix;
    }
    return;
  }
  const int64_t radix = plan.radix[level], q = m / radix;
  pass<false>(radix, x, 1, q, twiddles_of<T>(plan, level, block));
  for (int64_t k = 0; k < radix; ++k) transform(plan, x + k * q * POINT<T>, level + 1, block * radix + k, q);
}

// Its inverse, n times too large.
template <class T>
void restore(const FftPlan& plan, T* x, int64_t level, int64_t block, int64_t m) {
  if (level == plan.levels) return;
  if (m <= NEAR_POINTS<T>) {
    int64_t count = 1, q = m, last = plan.levels;
    for (int64_t l = level; l < last; ++l) count *= plan.radix[l], block *= plan.radix[l];
    q = 1;
    for (int64_t l = last - 1; l >= level; --l) {
      const int64_t radix = plan.radix[l];
      count /= radix, block /= radix;
      pass<true>(radix, x, count, q, twiddles_of<T>(plan, l, block));
      q *= radix;
    }
    return;
  }
  const int64_t radix = plan.radix[level], q = m / radix;
  for (int64_t k = 0; k < radix; ++k) restore(plan, x + k * q * POINT<T>, level + 1, block * radix + k, q);
  pass<true>(radix, x, 1, q, twiddles_of<T>(plan, level, block));
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
