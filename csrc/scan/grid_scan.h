// Scan over a grid on the CPU: what the host (grid_scan.cpp) hands to the kernels (grid_scan_kernel.cpp).
//
//   B batch · X, Y sides of the grid · H heads · D values of a head
//   S storage type of x_r, x_d, r and d · Real what it computes in · G storage type of the gates
//
// A walk goes through the nodes (i, j) row by row, i < X and j < Y. Which way that is in memory is in the strides: a
// walk that descends has its first node last, and negative strides. The backward walks the other way.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

struct Nodes {         // [B, X, Y, H, D], or gates [B, X, Y, H]; null: zeros, or not wanted
  void* data;          // of the first node of the walk
  int64_t b, x, y, h;  // strides in elements; values of a head are neighbours
};

// Carried into a row or column, in Real: initial_left [B, Y, H, D] has x = 0, initial_top [B, X, H, D] y = 0.
using Border = Nodes;

struct GridScan {
  int64_t B, X, Y, H, D;
  Nodes t_rl, t_ru, t_dl, t_du;

  // Forward: x_r, x_d -> r, d. Backward: dr, dd -> dx_r, dx_d.
  Nodes in_r, in_d, out_r, out_d;
  Border left, top;  // Forward: initial, or one row of zeros with strides of 0.
  Border carry;  // [B, Y, H, D]: what goes from row to row. Forward: r, where S is not Real. Backward: the part of the
                 // next node, at the end the gradient of initial_left.
  Border end;    // Backward: [B, X, H, D], the gradient of initial_top.

  // Backward, where the gates' gradients are wanted: r, d, and where to write.
  Nodes r, d;
  Nodes dt_rl, dt_ru, dt_dl, dt_du;

  // The work: a task is one batch row, some of its heads, and a strip of columns. Tasks of a strip wait for those of
  // the one before, row by row; they are taken in this order, so what is waited for runs already.
  int64_t parts, strips;
  int64_t* next;      // task, starts at 0
  int64_t* progress;  // [B, parts, strips, 8]: rows done, start at 0
  void* hand_over;    // [B, strips, X, H, D] in Real, where there is more than one strip: what goes on to the next
  void* buffer;       // [workers, H, D] in Real
};

using GridScanKernel = void (*)(const GridScan&, int64_t worker);
constexpr int GRID_PAIRS = 6;  // of Pair, scan.h: the real ones

struct GridScanKernels {
  GridScanKernel forward[GRID_PAIRS], backward[GRID_PAIRS];
};

#define SEQOPS_DECLARE(isa)                       \
  namespace isa {                                 \
  extern const GridScanKernels grid_scan_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
