// causal_conv1d on the CPU: what the host (causal_conv1d.cpp) hands to the kernels (causal_conv1d_kernel.cpp).
//
//   B batch rows · T steps · D channels · W taps, k = 0 the oldest · S = (W - 1) dilation steps of state
//   E storage type of sequences · Real what it computes in (float for 16-bit storage)
//
//   z_t = bias + sum_k weight_k x_{t - (W - 1 - k) dilation}, where x_{-S} .. x_{-1} are the state
//
// The steps t, t + dilation, t + 2 dilation, ... are a *class*: a convolution by itself, without dilation.
#pragma once

#include <stdint.h>

#include "../common/isa.h"
#include "../common/sequence.h"

namespace seqops {

// Steps first .. first + steps - 1 of a row, for some of its channels.
struct ConvTask {
  int64_t row, first, steps;
  int64_t channel, channels;
  int64_t slot;  // of sums
};

struct CausalConv1d {
  const Row* rows;
  // The tasks of unit u are units[u] .. units[u + 1] - 1; each worker takes the next unit until none is left.
  const ConvTask* tasks;
  const int64_t* units;
  int64_t count;
  int64_t* next;          // starts at 0
  int64_t run;            // a class is followed for so many steps of time before the next one: a multiple of dilation
  int64_t most_channels;  // of a task

  int64_t D, W, dilation;
  bool silu;
  Sequence x;           // [B, T, D] in E
  Sequence y;           // [B, T, D] in E, written by the forward
  const void* weight;   // [W, D] in Real
  const void* bias;     // [D] in Real
  const void* initial;  // [rows, S, D] in E, or null: zeros
  void* scratch;        // [workers, scratch_bytes]
  int64_t scratch_bytes;

  // backward
  Sequence dy;         // [B, T, D] in E; null: zeros
  Sequence dx;         // [B, T, D] in E, written
  const void* dfinal;  // [rows, S, D] in E, or null: zeros
  void* dinitial;      // [rows, S, D] in E, written, or null
  void* sums;          // [slots, W + 1, D] in Real, zero on entry: gradients of the taps, then of the bias
  int64_t kept;        // steps of dz that a worker keeps, where there is an activation
};

// A worker's share of the units.
using CausalConv1dKernel = void (*)(const CausalConv1d&, int64_t worker);

enum class Storage { float32, float64, bfloat16, float16 };

struct CausalConv1dKernels {
  CausalConv1dKernel forward[4], backward[4];  // by Storage
  int64_t outputs;                             // of one class that are computed together
};

#define SEQOPS_DECLARE(isa)                               \
  namespace isa {                                         \
  extern const CausalConv1dKernels causal_conv1d_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
