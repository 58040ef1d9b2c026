// Keys that are held while they change little, on the CPU: what the host hands to the kernels.
//
//   h_t = k_t where |k_t - h_{t-1}| > threshold, else h_{t-1}     h_{-1} = 0
//
//   B batch rows · T time steps · Hk heads · D channels · S storage type · Real what differences are computed in
//
// Either each channel is held by itself, or a row of D as a whole, by the 2-norm of its change. `held` tells where
// something moved: where it differs from the step before. (Equal infinities differ by nothing; NaN is moved to, and from.)
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

struct HeldRows {  // [B, T, Hk, D], dense along D
  void* data;
  int64_t batch, step, head;  // strides, in elements
};

struct HeldKeys {
  int64_t B, T, Hk, D;
  double threshold;
  bool by_row;
  HeldRows k, held;
  HeldRows grad, dk;  // backward
};

// One head of a batch row: `task` of B Hk. `buffer`: D of Real, for the backward.
using HeldKeysPass = void (*)(const HeldKeys&, int64_t task, void* buffer);

struct HeldKeysKernels {
  HeldKeysPass forward[4], backward[4];  // float32, float64, bfloat16, float16
};

#define SEQOPS_DECLARE(isa)                       \
  namespace isa {                                 \
  extern const HeldKeysKernels held_keys_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
