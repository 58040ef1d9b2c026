// Newton-Schulz iterations on the CPU: what the host (newton_schulz.cpp) hands to the kernels (newton_schulz_kernel.cpp).
//
//   A = X X^T     P = b A + c A A     X <- a X + P X     from X = x / (|x| + eps), x transposed if it is tall
//
//   M, N of a matrix · m, n the smaller and the larger of them · S storage type · Real what it computes in
//
// A and P are symmetric: their columns j .. j + 31 are computed from row j down, and mirrored. Backward, with Y the
// gradient of X, from the last step to the first:
//
//   T = Y X^T     V = b T + c A (T + T^T)     Q = V + V^T     Y <- a Y + P Y + Q X
//
// A call is a list of *passes* over each matrix, each made of independent tasks. One thread does all of a matrix, or all
// threads share the tasks of each pass: with the same results, bit by bit.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

enum class NewtonSchulzPass {
  norm,           // 1 task: |x|
  load,           // 32 rows of X_0
  gram,           // 32 columns of A
  polynomial,     // 32 columns of P
  advance,        // 32 columns of the next X
  store,          // 32 rows of X, as the result
  load_gradient,  // 32 rows of Y
  cross,          // 32 columns of T
  slope,          // 32 columns of V
  mirror,         // 32 columns of Q, and as many rows
  retreat,        // 32 columns of the Y before
  inner,          // 1 task: <X_0, Y>
  finish          // 32 rows of the gradient of x
};

struct NewtonSchulz {
  static constexpr int64_t PANEL = 32;  // columns or rows of a task

  int64_t M, N, m, n, steps;
  double eps;
  const double* coefficients;     // [steps, 3]
  bool keep;                      // whether every step's X, A and P stay
  const void *x, *grad;           // [items, M, N]
  void* out;                      // [items, M, N]
  int64_t x_row, a_row;           // of X, Y and of A, P, T, V, in elements
  int64_t x_size, a_size;         // of one, in elements
  int64_t numbers_size, buffers;  // what is kept of a matrix, in elements of Real

  // An odd number of cache lines, so that the same column of many rows falls into different sets of the cache.
  static int64_t row_of(int64_t columns, int64_t real) { return ((columns * real + 63) / 64 | 1) * 64 / real; }

  static int64_t tasks_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

  void lay_out(int64_t real, bool backward) {
    x_row = row_of(n, real), a_row = row_of(m, real);
    x_size = m * x_row, a_size = m * a_row, numbers_size = 64 / real;
    const int64_t kept = backward && steps > 1 ? steps : 1;
    keep = backward;
    buffers = numbers_size + kept * (x_size + 2 * a_size) + (backward ? x_size + 2 * a_size : 0);
  }

  int64_t panel_size() const { return n * PANEL; }  // packed operands of one task
  int64_t tasks(NewtonSchulzPass pass) const {
    switch (pass) {
      case NewtonSchulzPass::norm:
      case NewtonSchulzPass::inner: return 1;
      case NewtonSchulzPass::advance:
      case NewtonSchulzPass::retreat: return tasks_of(n);
      default: return tasks_of(m);
    }
  }
};

// One task of a pass of step `step` over matrix `item`. `own`: what is kept of the matrix; `panel`: of this thread.
using NewtonSchulzTask = void (*)(const NewtonSchulz&, int64_t item, NewtonSchulzPass pass, int64_t step, int64_t task,
                                  void* own, void* panel);

struct NewtonSchulzKernels {
  NewtonSchulzTask run[4];  // float32, float64, bfloat16, float16
};

#define SEQOPS_DECLARE(isa)                               \
  namespace isa {                                         \
  extern const NewtonSchulzKernels newton_schulz_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
