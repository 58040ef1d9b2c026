// Storage types of kernels, next to the types they compute in, and moving several elements as one access.
//
//   storage     bfloat16  float16  float  double  complex64  complex128
//   Compute<S>  float     float    float  double  complex64  complex128
//   Real<S>     float     float    float  double  float      double
//
// Conversions to 16 bits round to nearest even; NaN stays NaN. Complex numbers are pairs, as PyTorch stores them.
#pragma once

#include "common/ptx.h"

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class R>
struct alignas(2 * sizeof(R)) Complex {
  R re, im;
};
using complex64 = Complex<float>;
using complex128 = Complex<double>;

template <class S>
struct Types {
  using Compute = S;
  using Real = S;
  static constexpr bool COMPLEX = false;
};
template <>
struct Types<bfloat16> {
  using Compute = float;
  using Real = float;
  static constexpr bool COMPLEX = false;
};
template <>
struct Types<float16> {
  using Compute = float;
  using Real = float;
  static constexpr bool COMPLEX = false;
};
template <class R>
struct Types<Complex<R>> {
  using Compute = Complex<R>;
  using Real = R;
  static constexpr bool COMPLEX = true;
};

template <class S>
using Compute = typename Types<S>::Compute;
template <class S>
using Real = typename Types<S>::Real;

// ---- 16-bit numbers as bits

__device__ __forceinline__ float widen_float16(uint16_t bits) {
#if defined(SIMULATE)
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(float(1024 + fraction), exponent - 25) : ldexpf(float(fraction), -24));
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ __forceinline__ uint16_t narrow_float16(float value) {
#if defined(SIMULATE)
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
  // Below 2^-14 the result is a multiple of 2^-24, and adding 0.5 makes float32 round to just those.
  if (magnitude < 0x38800000u)
    return sign | uint16_t(__float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f));
  return sign | uint16_t((magnitude + 0xFFFu + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
#else
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#endif
}

__device__ __forceinline__ uint16_t narrow_bfloat16(float value) {
#if defined(SIMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
#else
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#endif
}

// ---- from storage to arithmetic and back

__device__ __forceinline__ float widen(bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float widen(float16 value) { return widen_float16(value.bits); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
template <class R>
__device__ __forceinline__ Complex<R> widen(Complex<R> value) {
  return value;
}

template <class S>
struct Narrow {
  static __device__ __forceinline__ S from(S value) { return value; }
};
template <>
struct Narrow<bfloat16> {
  static __device__ __forceinline__ bfloat16 from(float value) { return {narrow_bfloat16(value)}; }
};
template <>
struct Narrow<float16> {
  static __device__ __forceinline__ float16 from(float value) { return {narrow_float16(value)}; }
};

template <class S>
__device__ __forceinline__ S narrow(Compute<S> value) {
  return Narrow<S>::from(value);
}

// ---- limits

template <class R>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
};
template <>
struct Limits<double> {
  static constexpr double SMALLEST_NORMAL = 2.2250738585072014e-308;
};

// ---- several elements as one access

// N elements next to each other, at an address that is a multiple of their size (of 16 bytes, if they take more).
template <class S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Pack {
  static_assert((N & (N - 1)) == 0, "an access moves a power of two of bytes");
  S element[N];

  __device__ __forceinline__ S& operator[](int i) { return element[i]; }
  __device__ __forceinline__ const S& operator[](int i) const { return element[i]; }
};

template <int BYTES>
struct Word;  // the number, or vector of numbers, that one access of so many bytes moves
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// For memory that is read once or written once.
template <class S, int N>
__device__ __forceinline__ Pack<S, N> load(const S* address) {
  constexpr int BYTES = sizeof(S) * N < 16 ? sizeof(S) * N : 16;
  using Part = typename Word<BYTES>::type;
  Pack<S, N> pack;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack)) / BYTES; ++i) {
    const Part part = load_streaming(reinterpret_cast<const Part*>(address) + i);
    memcpy(reinterpret_cast<char*>(&pack) + i * BYTES, &part, BYTES);
  }
  return pack;
}

template <class S, int N>
__device__ __forceinline__ void store(S* address, const Pack<S, N>& pack) {
  constexpr int BYTES = sizeof(S) * N < 16 ? sizeof(S) * N : 16;
  using Part = typename Word<BYTES>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack)) / BYTES; ++i) {
    Part part;
    memcpy(&part, reinterpret_cast<const char*>(&pack) + i * BYTES, BYTES);
    store_streaming(reinterpret_cast<Part*>(address) + i, part);
  }
}

// Element i of a pack. Of two bfloat16 in a word, one is its upper half and the other one shift away.
template <class S, int N>
__device__ __forceinline__ Compute<S> widen(const Pack<S, N>& pack, int i) {
  return widen(pack[i]);
}
template <int N>
__device__ __forceinline__ float widen(const Pack<bfloat16, N>& pack, int i) {
  if constexpr (N == 1) {
    return widen(pack[i]);
  } else {
    uint32_t word;
    memcpy(&word, &pack.element[i / 2 * 2], sizeof word);
    return __uint_as_float(i % 2 ? word & 0xFFFF0000u : word << 16);
  }
}
