// fft_conv on the CPU: what the host (fft_conv.cpp) hands to the kernels (fft_conv_kernel.cpp).
//
//   B batch rows · T time steps · D channels · N kernels a channel · L taps · M of them that matter: min(T, L), at least 1
//   with skip, which is added to the first tap
//   S storage type · Real what it is computed in · c = d * N + n an output channel, of D * N
//
// A *segment* is a piece of a batch row: `step` outputs, which depend on `span` = step + M - 1 inputs at most. A *group*
// is as many channels as a vector has lanes. A *task* is a group and a chunk of the segments; with N kernels a channel,
// the task has N groups of output channels, of which lane i of number g has channel d = (g * lanes + i) / N of the task.
#pragma once

#include <stdint.h>

#include "../common/isa.h"
#include "../common/sequence.h"

namespace seqops {

constexpr int FFT_LEVELS = 24;

// A transform of `n` complex numbers: the values of a polynomial, modulo z^n - i, at the roots of that.
struct FftPlan {
  int64_t n;       // 0: there is none, the products are summed one by one
  int64_t levels;  // of blocks: a block of level l is split into radix[l] blocks of level l + 1
  int64_t radix[FFT_LEVELS];
  const void* twiddles[FFT_LEVELS];  // [blocks of the level, radix - 1] complex, in Real
};

constexpr int64_t MOST_RESIDENT = 8;

struct FftConv {
  int64_t B, T, D, N, L, M;
  int64_t segments, step, span;  // of a batch row; with one segment `lead` is 0
  int64_t lead;                  // inputs before the first output of a segment
  FftPlan plan;
  Sequence u;        // [B, T, D] in S
  Sequence y;        // [B, T, D * N] in S, written; backward: dy
  Sequence du;       // [B, T, D] in S; null: not wanted
  const void* k;     // [D * N, L]
  bool k_is_stored;  // in S, else in Real
  const void* skip;  // [D] in Real, or null: zeros
  void* dk;          // [chunks, D * N, M] in Real; null: not wanted

  int64_t resident;        // segments of a task whose transforms are kept for all its N groups
  int64_t groups, chunks;  // tasks: groups * chunks
  int64_t* next;           // starts at 0: each worker takes the next task until none is left
  void* scratch;           // [workers, scratch_bytes]
  int64_t scratch_bytes;
};

// Buffers of a worker, and the numbers that each of them holds for every lane.
static inline int64_t fft_conv_buffers(const FftConv& a, bool backward) {
  const bool in_place = a.plan.n > 0 && a.N == 1;
  return backward ? 3 + a.resident + (in_place ? 0 : a.resident) : 1 + a.resident + (in_place ? 0 : 1);
}
static inline int64_t fft_conv_numbers(const FftConv& a) { return a.plan.n > 0 ? 2 * a.plan.n : a.span; }

// The sums of the chunks of dk, and the gradient of skip, which is that of the first taps.
struct FftConvTaps {
  int64_t D, N, L, M, chunks;
  const void* partial;  // [chunks, D * N, M] in Real
  void* dk;             // [D * N, L]: in S, or in Real where k_is_stored is false; zero from tap M on
  bool k_is_stored;
  void* dskip;  // [D] in Real, or null
};

struct FftConvKernels {
  int64_t lanes[4], max_radix;
  int64_t direct_taps;  // up to so many, summing products beats transforms
  void (*forward[4])(const FftConv&, int64_t worker);
  void (*backward[4])(const FftConv&, int64_t worker);
  void (*taps[4])(const FftConvTaps&, int64_t begin, int64_t end);  // of D
};

#define SEQOPS_DECLARE(isa)                     \
  namespace isa {                               \
  extern const FftConvKernels fft_conv_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
