// Parts of prob_sparse_attention on the CPU: what the host (prob_sparse.cpp) hands to prob_sparse_kernel.cpp.
//
//   B batch · T time · H query heads · Hk key heads, each of H / Hk query heads · D channels · U samples of a query
//   N selected queries of a head
//
// A task is a key head of one row of the batch and a stretch of queries, or of channels; each worker takes the next one
// until none is left. What a task computes does not depend on how many there are, so results depend on neither.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

// [B, T, H, D] with dense channels: strides in numbers.
struct ProbSparseView {
  const void* data;
  int64_t stride_b, stride_t, stride_h;
};

// M_i = max_j <q_i, k_j> - (1/T) sum_j <q_i, k_j> over the samples j of i; -inf where there is none.
struct ProbSparseMeasure {
  int64_t B, T, H, Hk, D, U;
  int64_t stretches, steps;  // of a key head's queries: how many, and how long
  ProbSparseView q, k;
  const int32_t* samples;  // [T, U]: of each query first those that are positions
  const int32_t* counts;   // [T] of them
  void* measure;           // [B, H, T] float or double, written
  void* scratch;           // [workers, scratch_bytes]: keys [T + 1, D] and a query, rows filled up to whole vectors
  int64_t scratch_bytes;
  int64_t* next;  // task; starts at 0
};

// o_i = rows_n where i = index_n, else the mean of v or, if causal, the sum of v_j over j <= i. And its gradients.
struct ProbSparseFill {
  int64_t B, T, H, Hk, D, N;
  int64_t stretches, width;  // of the channels
  bool causal;
  const int64_t* index;  // [B, H, N], ascending
  ProbSparseView v;      // forward
  ProbSparseView rows;   // forward: [B, N, H, D]
  void* o;               // [B, T, H, D], written by the forward
  ProbSparseView grad;   // backward: do
  void* dv;              // [B, T, Hk, D], written by the backward
  void* drows;           // [B, N, H, D], written by it
  void* scratch;         // [workers, scratch_bytes]: two rows of channels, and a place for each head of a group
  int64_t scratch_bytes;
  int64_t* next;
};

constexpr int64_t MOST_LANES = 16;   // of a vector
constexpr int64_t BLOCK_STEPS = 64;  // added up before they join a longer sum

struct ProbSparseKernels {
  // float32, float64, bfloat16, float16
  void (*measure[4])(const ProbSparseMeasure&, int64_t worker);
  void (*fill[4])(const ProbSparseFill&, int64_t worker);
  void (*fill_backward[4])(const ProbSparseFill&, int64_t worker);
};

#define SEQOPS_DECLARE(isa)                           \
  namespace isa {                                     \
  extern const ProbSparseKernels prob_sparse_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
