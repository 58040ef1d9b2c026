// Merging of two parts of a softmax on the CPU: what the host hands to the kernels.
//
//   lse = log(e^lse1 + e^lse2)     w_n = exp(lse_n - lse)     o = w_1 o_1 + w_2 o_2
//
//   B batch rows · T time steps · H heads · D channels · S storage type of o · Real what it computes in
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

struct MergedRows {  // [B, T, H, D], dense along D; null: zeros
  void* data;
  int64_t batch, step, head;  // strides, in elements
};

struct MergedSums {  // [B, H, T] in Real; null: zeros
  void* data;
  int64_t batch, head, step;
};

struct MergeAttention {
  static constexpr int64_t STEPS = 16;  // of a task, which is some steps of one batch row, with all heads

  int64_t B, T, H, D;
  MergedRows o1, o2, o;
  MergedSums lse1, lse2, lse;

  // backward
  MergedRows grad_o, do1, do2;
  MergedSums grad_lse, dlse1, dlse2;

  int64_t tasks() const { return B * ((T + STEPS - 1) / STEPS); }
};

using MergeAttentionPass = void (*)(const MergeAttention&, int64_t task);

struct MergeAttentionKernels {
  MergeAttentionPass forward[4], backward[4];  // float32, float64, bfloat16, float16
};

#define SEQOPS_DECLARE(isa)                                   \
  namespace isa {                                             \
  extern const MergeAttentionKernels merge_attention_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
