// Rows by index on the CPU: what the host (slots.cpp) hands to slots_kernel.cpp.
//
//   B batch · T rows · S slots · H heads of slots · Hk heads of rows (each of H / Hk heads of slots in turn) · D channels
//
// A slot is an entry of an index list: it names one of T rows, or none. Sums over the slots of a row go through inverse
// lists, which have them ascending: every row has one owner and one order of summation, whatever the number of threads.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

// Of each (b, h) an order [S] of its slots: those of row t at order[starts[t]] to order[starts[t + 1] - 1], those that
// name no row from order[starts[T]] on. Strides are 0 where lists are shared.
struct InverseLists {
  const int32_t* order;
  const int32_t* starts;  // [T + 1]
  int64_t order_b, order_h, starts_b, starts_h;
};

enum class Reduce : int64_t { mean, sum, last };  // last: of the largest slot alone

// y[b, t, hk] = the sum of x over the slots of t in all heads of hk; its mean, or its last one.
// lse[b, h, t] = log sum exp of the slots' lse, or the last one; where there are any (then H = Hk). In double where x is,
// else in float.
struct SlotSums {
  int64_t B, T, S, H, Hk, D;
  Reduce reduce;
  InverseLists lists;
  const void* x;          // [B, S, H, D]: the last dimension dense
  int64_t x_b, x_s, x_h;  // strides in elements
  void* y;                // [B, T, Hk, D]
  const void* slot_lse;   // [B, H, S]
  void* lse;              // [B, H, T], or null
  int64_t rows_a_task;    // of B * T
  int64_t* next;          // task; starts at 0
};

// The gradient of that with H = Hk: dx of every slot from dy of its row, dslot_lse from dlse.
struct SlotSpread {
  int64_t B, T, S, H, D;
  Reduce reduce;
  InverseLists lists;
  const void* dy;  // [B, T, H, D]: the last dimension dense; null: zeros
  int64_t dy_b, dy_t, dy_h;
  void* dx;              // [B, S, H, D]
  const void* slot_lse;  // [B, H, S]
  const void* dlse;      // [B, H, T], or null
  void* dslot_lse;       // [B, H, S]
  int64_t rows_a_task;   // of B * (T + 1): the last row stands for slots that name none
  int64_t* next;
};

// By storage type: float, double, bfloat16, float16.
struct SlotKernels {
  void (*sum[4])(const SlotSums&);
  void (*spread[4])(const SlotSpread&);
};

#define SEQOPS_DECLARE(name)             \
  namespace name {                       \
  extern const SlotKernels slot_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
