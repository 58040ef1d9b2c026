// Kernels of state-space models on the CPU: what the host (ssm.cpp) hands to ssm_kernel.cpp and cauchy_kernel.cpp.
//
//   H heads · N modes of a head · L length, or nodes · T the parts of a complex number (float or double)
//
// A task is one head and one stretch of the length, the same for every number of threads; each worker takes the next one
// until none is left. So results depend on neither.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

// K_l = 2 Re sum_n c_n e^{l z_n}. With l = first + C j + i, a *segment* is C rows j of C columns i.
struct SsmKernel {
  int64_t H, N, L;
  int64_t C;         // a power of two, 16 to MOST_COLUMNS
  int64_t segments;  // of a head: L / C^2, rounded up
  const void* z;     // [H, N] complex
  const void* c;     // [H, N] complex
  void* k;           // [H, L], written by the forward
  const void* dk;    // [H, L], read by the backward
  double* sums;      // [H, segments, N, 4], written by it: the parts of sum_l dk_l e^{l z}, and of sum_l l dk_l e^{l z}
  void* scratch;     // [workers, scratch_bytes]
  int64_t scratch_bytes;
  int64_t* next;  // task; starts at 0
};

// Modes of which tables are kept at a time, and columns of the longest rows: 64 KB of float tables.
constexpr int64_t MODES = 64, MOST_COLUMNS = 128;

// y_l = sum_n v_n / (w_l - p_n) + conj(v_n) / (w_l - conj(p_n)) for nodes w and poles p (`nodes` and `w` of the operator).
struct CauchyKernel {
  int64_t H, N, L;
  int64_t group;      // heads of a task: one in the forward
  int64_t stretches;  // of NODES nodes
  int64_t padded;     // L and what fills the last vector
  const void* nodes;  // [3, padded]: real parts, imaginary parts, and 0 where one was infinite (and is not now), else 1
  const void* v;      // [H, N] complex
  const void* w;      // [H, N] complex
  void* y;            // [H, L] complex, written by the forward
  const void* dy;     // [H, L] complex, read by the backward
  void* sums;         // [H, stretches, N, 4] written by it: the parts of dv, and of dw / conj(v)
  void* dnodes;       // [H / group, 2, L], written by it unless null: of the heads of a group
  int64_t* next;
};

constexpr int64_t NODES = 1024;

using SsmKernelPass = void (*)(const SsmKernel&, int64_t worker);
using CauchyKernelPass = void (*)(const CauchyKernel&);

struct SsmKernels {
  SsmKernelPass forward[2], backward[2];  // float, double
};

struct CauchyKernels {
  CauchyKernelPass forward[2], backward[2];
};

#define SEQOPS_DECLARE(isa)                  \
  namespace isa {                            \
  extern const SsmKernels ssm_kernels;       \
  extern const CauchyKernels cauchy_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
