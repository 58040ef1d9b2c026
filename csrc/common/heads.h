// Tensors of several heads as kernels take them.
#pragma once

#include <stdint.h>

namespace seqops {

struct HeadView {  // [B, T, H, width], dense along its last dimension; null: zeros
  void* data;
  int64_t batch, step, head;  // strides, in elements; a step of 0 where one value serves all steps
};

}  // namespace seqops
