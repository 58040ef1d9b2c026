// Scans on the CPU: what the host (linear_scan.cpp, softmax_scan.cpp) hands to the kernels (*_kernel.cpp).
//
//   B batch rows · T time steps · C channels (every dimension after time, flattened) · H heads · D values of a head
//   S storage type of sequences · Real what it computes in (float for 16-bit storage): states and sums
//
// A *row* is one sequence: a batch row, or one of the packed sequences. A *walk* goes through its steps first to last,
// or last to first. A *task* is the part of one walk that one thread does at a time: all steps of a row, or a chunk of
// them, for all channels or some. What a walk carries from step to step is in `carry`, a buffer of its slot.
#pragma once

#include <stdint.h>

#include "../common/isa.h"
#include "../common/sequence.h"

namespace seqops {

constexpr int64_t STEPS = 8;  // most steps taken together

struct Task {
  int64_t row;
  int64_t begin, steps;       // counted along the walk
  int64_t channel, channels;  // softmax_scan: of heads
  int64_t slot;               // of its buffers
};

// The tasks of one parallel region; each worker takes the next one until none is left.
struct Tasks {
  const Row* rows;
  const Task* tasks;
  int64_t count;
  int64_t* next;  // starts at 0
  bool descending;
  int64_t block;  // steps taken together, a power of two up to STEPS
};

// h_t = a_t h_{t-1} + x_t, and its backward: g_t = dh_t + conj(a_{t+1}) g_{t+1}, dx_t = g_t, da_t = g_t conj(h_{t-1}).
struct LinearScan : Tasks {
  int64_t C;
  bool pairs;                  // two channels are the parts of a complex number, whose gate is real
  int64_t gate_div, gate_mod;  // channel c has gate (c / gate_div) % gate_mod
  Sequence x;                  // [B, T, C] in S; backward: dh
  Sequence a;                  // [B, T, gate_mod]; strides of 0 where one gate serves all rows or steps
  Sequence y;                  // [B, T, C] in S, written; backward: dx
  void* carry;                 // [slots, C] in Real: of h on entry and exit; backward: of conj(a) g
  void* product;               // [slots, C] in Real, reducing only: product of the gates
  void* scratch;               // [workers, scratch_bytes]
  int64_t scratch_bytes;

  // backward, where the gate's gradient is wanted
  Sequence h;           // [B, T, C] in S
  const void* initial;  // [rows, C] in Real, or null: zeros
  Sequence da;          // [B, T, gate_mod] in the type of a, where gates differ between steps
  void* da_sum;         // [slots, gate_mod] in Real, zero on entry, where one gate serves all steps
};

struct SoftmaxScan : Tasks {
  int64_t H, D;
  Sequence s;     // [B, T, H]
  Sequence v;     // [B, T, H, D] in S
  Sequence o;     // [B, T, H, D] in S, written by the forward
  Sequence lse;   // [B, T, H] in Real; written by the forward
  Sequence m, u;  // [B, T, H] in Real; the forward writes them where they are not null
  void* carry;    // [slots, H, D] in Real: o; backward: alpha R
  void* carry_m;  // [slots, H] in Real: m; backward: alpha r
  void* carry_u;  // [slots, H] in Real: u; backward: product of alpha, of reduced chunks
  void* scratch;  // [workers, scratch_bytes]
  int64_t scratch_bytes;

  // backward
  Sequence grad_o;        // [B, T, H, D] in S
  Sequence grad_lse;      // [B, T, H] in Real
  Sequence ds;            // [B, T, H] in the type of s
  Sequence dv;            // [B, T, H, D] in S
  const void* initial_m;  // [rows, H] in Real: m and u before the first step
  const void* initial_u;
};

// A worker's share of the tasks.
using LinearScanKernel = void (*)(const LinearScan&, int64_t worker);
using SoftmaxScanKernel = void (*)(const SoftmaxScan&, int64_t worker);

// Types of (x, a) or (v, s) that have kernels of their own; others are converted.
enum class Pair { float32, float64, bfloat16, float16, bfloat16_float32, float16_float32, complex64, complex128 };
constexpr int REAL_PAIRS = 6, PAIRS = 8;

struct LinearScanKernels {
  LinearScanKernel forward[PAIRS], forward_reduce[PAIRS], backward[PAIRS], backward_reduce[PAIRS];
};

struct SoftmaxScanKernels {
  SoftmaxScanKernel forward[REAL_PAIRS], forward_reduce[REAL_PAIRS], backward[REAL_PAIRS], backward_reduce[REAL_PAIRS];
};

#define SEQOPS_DECLARE(isa)                             \
  namespace isa {                                       \
  extern const LinearScanKernels linear_scan_kernels;   \
  extern const SoftmaxScanKernels softmax_scan_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
