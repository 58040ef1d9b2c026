// Sequences as kernels take them.
#pragma once

#include <stdint.h>

namespace seqops {

// One sequence: a batch row, or one of the packed sequences.
struct Row {
  int64_t batch, first, steps;  // steps first .. first + steps - 1 of this batch row
};

struct Sequence {  // [B, T, ...], dense inside a step; null: zeros, or not wanted
  void* data;
  int64_t row, step;  // strides, in elements (complex ones count as one)
};

}  // namespace seqops
