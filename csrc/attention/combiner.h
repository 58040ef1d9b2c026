// Summaries of combiner_attention on the CPU: what the host (combiner.cpp) hands to the kernels (combiner_kernel.cpp).
//
//   B batch · T time · H heads · D channels
//   S storage type of all tensors that are read, and of summaries · Real what is computed and summed in
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

struct HeadRows {  // [B, T, H, D]
  void* data;
  int64_t b, t, h;  // strides in elements; channels are neighbours
};

// A run of positions, and the row of its summary.
struct Span {
  int64_t first, end, row;
};

// Of a span, with pool the elementwise maximum or the mean:
//   khat = pool k_j        qhat = pool q_j        vhat = sum_j softmax_j(scale <qhat, k_j>) v_j
struct SpanSummaries {
  int64_t D;
  double scale;
  bool mean;
  HeadRows q, k, v;     // S
  HeadRows khat, vhat;  // S; in the backward their gradients
  HeadRows dq, dk, dv;  // Real
  bool add;             // to what dq, dk and dv hold

  // Of a worker's scratch, in numbers: scores and their gradients, and five rows.
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  static int64_t scratch_size(int64_t longest, int64_t D) { return 2 * padded(longest) + 6 * padded(D); }
};

// y_t = pool of x_t, x_{t - stride}, x_{t - 2 stride}, ..., or (reverse) of x_t, x_{t + stride}, ...
struct RunningPool {
  int64_t T, H, D, stride;
  bool mean, reverse;
  HeadRows x, y;    // S
  HeadRows dy, dx;  // S, in the backward
};

using SpanSummariesKernel = void (*)(const SpanSummaries&, int64_t b, int64_t h, const Span&, void* scratch);
// One column of the grid of rows of `stride` positions; scratch of H D numbers.
using RunningPoolKernel = void (*)(const RunningPool&, int64_t b, int64_t column, void* scratch);

struct CombinerKernels {  // float32, float64, bfloat16, float16
  SpanSummariesKernel summaries[4], summaries_backward[4];
  RunningPoolKernel pool[4], pool_backward[4];
};

#define SEQOPS_DECLARE(name)                     \
  namespace name {                               \
  extern const CombinerKernels combiner_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
