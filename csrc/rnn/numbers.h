// Numbers of the recurrent cells' CUDA kernels, and the functions that cells are made of. Constant: STORAGE, of sequences
// and weights.
#pragma once

#include "common/gpu.h"

using S = STORAGE;
using Number = Compute<S>;

constexpr bool NARROW = sizeof(S) == 2;  // multiplied by tensor cores

// Of 16-bit sequences the fast forms, to 4e-5 of the value; NaN stays NaN in all of them.
__device__ __forceinline__ float exponential(float x) { return NARROW ? exp2_approx(x * 1.44269504f) : expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float sigmoid(float x) {
  return NARROW ? reciprocal_approx(1 + exponential(-x)) : 1 / (1 + expf(-x));
}
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }
// tanh(x) = over / under
struct Tangent {
  float over, under;

  __device__ __forceinline__ explicit Tangent(float x) {
    const float e = exponential(-2 * fabsf(x));
    const bool small = fabsf(x) < 0.125f;  // where 1 - e would lose the digits
    over = small ? x - x * x * x * 0.33333333f : copysignf(1 - e, x);
    under = small ? 1 : 1 + e;
  }
};
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  if (!NARROW) return tanhf(x);
  const Tangent tangent(x);
  return tangent.over * reciprocal_approx(tangent.under);
}
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
// sigmoid(x) tanh(y): in 16 bit with one reciprocal, of which a multiprocessor computes few at a time.
__device__ __forceinline__ float gated_tangent(float x, float y) {
  if (!NARROW) return sigmoid(x) * tanhf(y);
  const Tangent tangent(y);
  return tangent.over * reciprocal_approx(tangent.under * (1 + exponential(-x)));
}
__device__ __forceinline__ double gated_tangent(double x, double y) { return sigmoid(x) * tanh(y); }
__device__ __forceinline__ float log_sigmoid(float x) { return (x < 0 ? x : 0) - log1pf(exponential(-fabsf(x))); }
__device__ __forceinline__ double log_sigmoid(double x) { return (x < 0 ? x : 0) - log1p(exp(-fabs(x))); }

__device__ __forceinline__ Number clamp(Number x, Number limit) { return x < -limit ? -limit : x > limit ? limit : x; }

__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }
