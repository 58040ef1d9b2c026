// Element-wise passes of test-time training over large chunks, between the matrix products: structures that
// passes.cpp hands to the kernels.
//
//   f(x) = w1 (silu(y0) * y2), y0 = w0 x, y2 = w2 x;   s = silu(y0), s1 = silu'(y0), s2 = silu''(y0)
//
// Letters: N pairs of a batch row and a head, C tokens, F hidden channels, R rows of a weight and X numbers in each.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

// [N, rows, width], dense along its last dimension; strides in elements.
struct Matrices {
  void* data;
  int64_t batch, row;
};

// [N, C, F] each; an output may be one of the inputs. Rates [N, C, 3] belong to w0 | w1 | w2.
struct TokenPass {
  int64_t C, F;
  Matrices y0, y2, g;   // g = v w1
  Matrices p0, p1, p2;  // gradients by e0, h, e2; of gate_backward only p1
  Matrices rates;       // null: none
  Matrices dy0, dy2, dg;
  Matrices e0, h, e2;
  Matrices drates;
};

// [N, R, X]; norms [N, R] as matrices of rows of 1.
struct WeightPass {
  int64_t R, X;
  Matrices w, d, out;
  Matrices norms0, norms;  // of the rows that came first, null: no rescaling; of the rows before they were rescaled
  Matrices dnorms0;
};

constexpr double LEAST_NORM = 1e-5;  // a row is divided by at least this

using TokenKernel = void (*)(const TokenPass&, int64_t begin, int64_t end);    // rows, of all N C
using WeightKernel = void (*)(const WeightPass&, int64_t begin, int64_t end);  // rows, of all N R

struct PassKernels {
  struct OfType {
    TokenKernel gate, gate_backward, learn, learn_backward;
    WeightKernel renew, renew_backward;
  } types[2];  // float, double
};

#define SEQOPS_DECLARE(name)                       \
  namespace name {                                 \
  extern const PassKernels large_chunk_ttt_passes; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
