// Vectors of one register, for kernel files: loads and stores of every storage type, and the functions that gates need.
//
// A kernel computes in T (float or double) and stores S (float, double, bfloat16, float16); Compute<S> is the T of S.
// Written with the compiler's vector extension, so one source serves SSE2, AVX2, AVX-512 and NEON. `a * b + c` becomes
// one fused instruction where the set has it. Comparisons are ordered so that NaN passes through every function here.
#pragma once

#include <stdint.h>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "isa.h"

#if defined(__AVX512F__)
#define SEQOPS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SEQOPS_VECTOR_BYTES 32
#else
#define SEQOPS_VECTOR_BYTES 16
#endif

#define SEQOPS_INLINE inline __attribute__((always_inline))

namespace seqops::SEQOPS_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SEQOPS_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(SEQOPS_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(SEQOPS_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(SEQOPS_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Bits = typename VectorOf<T>::bits;  // integers of the same width; also what a comparison gives
template <class T>
constexpr int LANES = SEQOPS_VECTOR_BYTES / sizeof(T);

typedef uint16_t Halves __attribute__((vector_size(SEQOPS_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(SEQOPS_VECTOR_BYTES)));

template <class T>
SEQOPS_INLINE Vector<T> constant(double value) {
  return Vector<T>{} + static_cast<T>(value);
}

// ---- 16-bit formats, rounding to nearest even

SEQOPS_INLINE Vector<float> widen(bfloat16, Halves halves) {
  return (Vector<float>)(__builtin_convertvector(halves, Words) << 16);
}

SEQOPS_INLINE Halves narrow(bfloat16, Vector<float> value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN's payload into Inf
  return __builtin_convertvector((value == value) ? rounded : nan, Halves);
}

#if defined(__F16C__) && SEQOPS_VECTOR_BYTES == 64
SEQOPS_INLINE Vector<float> widen(float16, Halves halves) { return (Vector<float>)_mm512_cvtph_ps((__m256i)halves); }
SEQOPS_INLINE Halves narrow(float16, Vector<float> value) { return (Halves)_mm512_cvtps_ph((__m512)value, 0); }
#elif defined(__F16C__)
SEQOPS_INLINE Vector<float> widen(float16, Halves halves) { return (Vector<float>)_mm256_cvtph_ps((__m128i)halves); }
SEQOPS_INLINE Halves narrow(float16, Vector<float> value) { return (Halves)_mm256_cvtps_ph((__m256)value, 0); }
#else
SEQOPS_INLINE Vector<float> widen(float16, Halves halves) {
  const Words half = __builtin_convertvector(halves, Words);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Words exponent = magnitude & (0x7c00u << 13);
  const Words normal = magnitude + (112u << 23);  // exponent bias 15 -> 127
  const Words special = normal + (112u << 23);    // Inf and NaN keep an exponent of all ones
  // a subnormal is an integer times 2^-24: let a float subtraction normalise it
  const Words subnormal = (Words)((Vector<float>)(normal + (1u << 23)) - (Vector<float>)(Words{} + (113u << 23)));
  const Words value = exponent == (0x7c00u << 13) ? special : (exponent == 0u ? subnormal : normal);
  return (Vector<float>)(value | ((half & 0x8000u) << 16));
}

SEQOPS_INLINE Halves narrow(float16, Vector<float> value) {
  const Words bits = (Words)value;
  const Words sign = bits & 0x80000000u;
  const Words magnitude = bits ^ sign;
  const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  const Words anchor = Words{} + (126u << 23);  // adding it leaves a subnormal's bits at the bottom, rounded
  const Words subnormal = (Words)((Vector<float>)magnitude + (Vector<float>)anchor) - anchor;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words half = magnitude >= (143u << 23) ? special : (magnitude < (113u << 23) ? subnormal : normal);
  return __builtin_convertvector(half | (sign >> 16), Halves);
}
#endif

// ---- memory: `n` valid elements, LANES or fewer; what lies past them is neither read nor written

#if defined(__AVX512F__)
SEQOPS_INLINE uint32_t first_lanes(int64_t n) { return (uint32_t{1} << n) - 1; }
#elif defined(__AVX2__)
template <class T>
SEQOPS_INLINE __m256i first_lanes(int64_t n) {
  Bits<T> lanes;
#pragma GCC unroll 8
  for (int i = 0; i < LANES<T>; ++i) lanes[i] = i;
  return (__m256i)(lanes < (Bits<T>{} + static_cast<decltype(lanes[0] + 0)>(n)));
}
#endif

template <class V, class S>
SEQOPS_INLINE V load_raw(const S* p, int64_t n) {
  V value = {};
  if (n * sizeof(S) >= sizeof(V)) {
    __builtin_memcpy(&value, p, sizeof(V));
    return value;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2 && sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi16(first_lanes(n), p);
  if constexpr (sizeof(S) == 2 && sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi16(first_lanes(n), p);
  if constexpr (sizeof(S) == 4) return (V)_mm512_maskz_loadu_ps(first_lanes(n), p);
  if constexpr (sizeof(S) == 8) return (V)_mm512_maskz_loadu_pd(first_lanes(n), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (V)_mm256_maskload_ps((const float*)p, first_lanes<float>(n));
  if constexpr (sizeof(S) == 8) return (V)_mm256_maskload_pd((const double*)p, first_lanes<double>(n));
#endif
  S lanes[sizeof(V) / sizeof(S)] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  __builtin_memcpy(&value, lanes, sizeof(V));
  return value;
}

template <class V, class S>
SEQOPS_INLINE void store_raw(S* p, V value, int64_t n) {
  if (n * sizeof(S) >= sizeof(V)) {
    __builtin_memcpy(p, &value, sizeof(V));
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2 && sizeof(V) == 32) {
    return _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)value);
  }
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)value);
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, first_lanes(n), (__m512d)value);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return _mm256_maskstore_ps((float*)p, first_lanes<float>(n), (__m256)value);
  if constexpr (sizeof(S) == 8) return _mm256_maskstore_pd((double*)p, first_lanes<double>(n), (__m256d)value);
#endif
  S lanes[sizeof(V) / sizeof(S)];
  __builtin_memcpy(lanes, &value, sizeof(V));
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

template <class S>
SEQOPS_INLINE Vector<Compute<S>> load(const S* p, int64_t n = LANES<Compute<S>>) {
  if constexpr (sizeof(S) == 2) {
    return widen(S{}, load_raw<Halves>(p, n));
  } else {
    return load_raw<Vector<S>>(p, n);
  }
}

template <class S>
SEQOPS_INLINE void store(S* p, Vector<Compute<S>> value, int64_t n = LANES<Compute<S>>) {
  if constexpr (sizeof(S) == 2) {
    store_raw(p, narrow(S{}, value), n);
  } else {
    store_raw(p, value, n);
  }
}

// The value that storage type S would give back.
template <class S>
SEQOPS_INLINE Vector<Compute<S>> rounded(Vector<Compute<S>> value) {
  if constexpr (sizeof(S) == 2) {
    return widen(S{}, narrow(S{}, value));
  } else {
    return value;
  }
}

// ---- lanes by number

template <class T>
SEQOPS_INLINE Vector<T> permute(Vector<T> v, Bits<T> from) {
#if defined(__clang__)
  Vector<T> result;
  for (int lane = 0; lane < LANES<T>; ++lane) result[lane] = v[from[lane]];
  return result;
#else
  return __builtin_shuffle(v, from);
#endif
}

// ---- transposing a square of LANES x LANES in registers: swap blocks of 1, 2, 4, ... lanes off the diagonal

template <class T, int BLOCK = 1>
SEQOPS_INLINE void transpose(Vector<T> (&rows)[LANES<T>]) {
  constexpr int L = LANES<T>;
  Bits<T> low, high;  // lanes of the pair (a, b), those of b numbered from L
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    low[lane] = lane & BLOCK ? L + lane - BLOCK : lane;
    high[lane] = lane & BLOCK ? L + lane : lane + BLOCK;
  }
#pragma GCC unroll 16
  for (int row = 0; row < L; ++row) {
    if (row & BLOCK) continue;
    const Vector<T> a = rows[row], b = rows[row + BLOCK];
#if defined(__clang__)
    for (int lane = 0; lane < L; ++lane) {
      rows[row][lane] = low[lane] < L ? a[low[lane]] : b[low[lane] - L];
      rows[row + BLOCK][lane] = high[lane] < L ? a[high[lane]] : b[high[lane] - L];
    }
#else
    rows[row] = __builtin_shuffle(a, b, low);
    rows[row + BLOCK] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (2 * BLOCK < L) transpose<T, 2 * BLOCK>(rows);
}

// ---- functions

template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int MANTISSA = 23;
  static constexpr int32_t ONE = 0x3f800000;
  static constexpr float LN2_HIGH = 0.693145751953125f, LN2_LOW = 1.42860677e-6f;  // n * LN2_HIGH is exact
  static constexpr float EXP_LEAST = -87.3f, EXP_MOST = 88.0f;
  static constexpr float TANH_MOST = 9.1f;  // tanh rounds to 1 above
  static constexpr int EXPM1_TERMS = 6, LOG1P_TERMS = 6;
  // expm1(x) / x on |x| <= ln(2)/2, error 5e-9; atanh(s) / s as a polynomial in s^2 on |s| <= 1/3, error 1e-10
  static constexpr float EXPM1[] = {1.0f, 0.5f, 0.16666505f, 0.041666465f, 0.0083691557f, 0.00139336500f};
  static constexpr float LOG1P[] = {1.0f, 0.33333340f, 0.19999356f, 0.14310104f, 0.10699280f, 0.12196954f};
};
template <>
struct Constants<double> {
  static constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int MANTISSA = 52;
  static constexpr int64_t ONE = 0x3ff0000000000000;
  static constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
  static constexpr double EXP_LEAST = -708.0, EXP_MOST = 709.0;
  static constexpr double TANH_MOST = 19.1;
  static constexpr int EXPM1_TERMS = 14, LOG1P_TERMS = 18;
  static constexpr double EXPM1[] = {
      1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,        1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
  static constexpr double LOG1P[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                                     1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23,
                                     1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33, 1.0 / 35};
};

template <class T, int TERMS>
SEQOPS_INLINE Vector<T> polynomial(const T (&coefficients)[TERMS], Vector<T> x) {
  Vector<T> sum = constant<T>(coefficients[TERMS - 1]);
#pragma GCC unroll 32
  for (int i = TERMS - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <class T>
SEQOPS_INLINE Vector<T> at_least(Vector<T> x, T bound) {
  return x < bound ? constant<T>(bound) : x;
}

template <class T>
SEQOPS_INLINE Vector<T> at_most(Vector<T> x, T bound) {
  return x > bound ? constant<T>(bound) : x;
}

// e^x = scale + scale * rest with scale = 2^n and |rest| < 0.42; x within [EXP_LEAST, EXP_MOST].
template <class T>
struct Power {
  Vector<T> scale, rest;
};

template <class T>
SEQOPS_INLINE Power<T> power(Vector<T> x) {
  using K = Constants<T>;
  const Vector<T> shifted = x * static_cast<T>(1.4426950408889634) + K::ROUND;
  const Vector<T> n = shifted - K::ROUND;
  const Vector<T> r = (x - n * K::LN2_HIGH) - n * K::LN2_LOW;
  const Bits<T> exponent = ((Bits<T>)shifted << K::MANTISSA) + K::ONE;
  return {(Vector<T>)exponent, r * polynomial<T>(K::EXPM1, r)};
}

template <class T>
SEQOPS_INLINE Vector<T> exp(Vector<T> x) {
  using K = Constants<T>;
  const Power<T> p = power<T>(at_most<T>(at_least<T>(x, K::EXP_LEAST), K::EXP_MOST));
  const Vector<T> value = p.scale + p.scale * p.rest;
  return x < K::EXP_LEAST ? Vector<T>{} : value;
}

// 1 / x for x in [1, 2^127], within 2 units in the last place: a division of 512 bits blocks the pipe for 10 to 16 cycles.
template <class T>
SEQOPS_INLINE Vector<T> reciprocal(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vector<T> estimate = (Vector<T>)_mm512_rcp14_ps((__m512)x);
    return estimate * (static_cast<T>(2) - x * estimate);
  }
#endif
  return static_cast<T>(1) / x;
}

template <class T>
SEQOPS_INLINE Vector<T> sigmoid(Vector<T> x) {
  using K = Constants<T>;
  const Power<T> p = power<T>(at_most<T>(at_least<T>(-x, K::EXP_LEAST), K::EXP_MOST));
  return reciprocal<T>((p.scale + p.scale * p.rest) + static_cast<T>(1));
}

template <class T>
SEQOPS_INLINE Vector<T> tanh(Vector<T> x) {
  using K = Constants<T>;
  const Vector<T> cut = at_most<T>(at_least<T>(x, -K::TANH_MOST), K::TANH_MOST);
  const Power<T> p = power<T>(cut + cut);
  const Vector<T> expm1 = (p.scale - static_cast<T>(1)) + p.scale * p.rest;
  return expm1 * reciprocal<T>(expm1 + static_cast<T>(2));
}

// log(sigmoid(x)) = min(x, 0) - log1p(e^-|x|), with log1p(u) = 2 atanh(u / (2 + u))
template <class T>
SEQOPS_INLINE Vector<T> log_sigmoid(Vector<T> x) {
  const Vector<T> negative = x > static_cast<T>(0) ? -x : x;
  const Vector<T> u = exp<T>(negative);
  const Vector<T> s = u / (u + static_cast<T>(2));
  const Vector<T> log1p = (s + s) * polynomial<T>(Constants<T>::LOG1P, s * s);
  return at_most<T>(x, static_cast<T>(0)) - log1p;
}

// For x in [1, most]: x = 2^n f with f in [sqrt(1/2), sqrt(2)), log(f) = 2 atanh((f - 1) / (f + 1)); NaN and Inf pass.
template <class T>
SEQOPS_INLINE Vector<T> log(Vector<T> x) {
  using K = Constants<T>;
  const Bits<T> bits = (Bits<T>)x;
  const Bits<T> half = (Bits<T>)constant<T>(0.70710678118654752);
  const Bits<T> n = (bits - half) >> K::MANTISSA;
  const Vector<T> f = (Vector<T>)(bits - (n << K::MANTISSA));
  const Vector<T> s = (f - static_cast<T>(1)) / (f + static_cast<T>(1));
  const Vector<T> exponent = __builtin_convertvector(n, Vector<T>);
  const Vector<T> value = exponent * K::LN2_HIGH + ((s + s) * polynomial<T>(K::LOG1P, s * s) + exponent * K::LN2_LOW);
  return (x - x) == static_cast<T>(0) ? value : x;
}

template <class T>
SEQOPS_INLINE Vector<T> clamp(Vector<T> x, T bound) {
  return at_most<T>(at_least<T>(x, -bound), bound);
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
