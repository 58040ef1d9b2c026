// pointer_scores on the CPU: what the host (pointer_scores.cpp) hands to pointer_scores_kernel.cpp.
//
//   B batch · Tq queries · Tk keys · A channels · a *block* is 2 vectors of channels
//
//   additive     s_ij = sum_a w_a tanh(x_ija) with x = query_i + key_j
//                With r = 1 / (1 + e^{2x}), tanh(x) = 1 - 2 r and tanh'(x) = 4 r (1 - r), and e^{2x} is a product of
//                what queries and keys give: no exponential for a pair, one division for two channels of it. Rows
//                with a number beyond CALM are *wild*, and their tanh is computed as such.
//   clipped dot  s_ij = clip tanh(<query_i, key_j> / sqrt A)
//
// log_p_ij = s_ij - log sum_j e^{s_ij} over j < length. With G_i = sum_j g_ij: ds_ij = g_ij - e^{log_p_ij} G_i, of which
// the sum over j is 0; so dw_a = sum_ij ds_ij tanh(x_ija) = -2 sum_ij ds_ij r_ija.
//
// Tasks do not depend on the number of workers, and each worker takes the next one until none is left.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

// [B, T, A] with a dense last dimension: strides in numbers.
struct PointerView {
  const void* data;
  int64_t stride_b, stride_t;
};

// S is the storage type, T what it is computed in.
struct PointerScores {
  int64_t B, Tq, Tk, A;
  double clip;
  PointerView query, key;
  const void* weight;      // additive: [blocks, 2 LANES] T, filled up with zeros
  bool wild_weight;        // some are too large: every pair is wild
  const int64_t* lengths;  // [B], from 0 to Tk
  int64_t blocks;

  // Of queries and keys: [B, blocks, Tq or Tk, 2 LANES] T, e^{2x} or, for the clipped dot, x itself.
  void *queries, *keys;
  uint8_t *wild_queries, *wild_keys;  // [B, Tq], [B, Tk]

  void* log_p;  // forward: [B, Tq, Tk] S
  void* exact;  // forward: the same in float; null where it is not wanted

  PointerView grad;     // backward: [B, Tq, Tk] S
  const void* saved;    // backward: log_p [B, Tq, Tk] T
  void* ds;             // backward: [B, Tq, Tk] T; for the clipped dot the gradient of the dot product
  void *dquery, *dkey;  // backward: [B, Tq, A], [B, Tk, A] S
  void* dweight;        // backward, additive: [B, A] T

  void* scratch;  // [workers, scratch_bytes]: of the forward a row of scores, of the backward a block of dkey
  int64_t scratch_bytes;
  int64_t* next;  // task; starts at 0
};

constexpr int64_t ROWS_OF_TASK = 8;

struct PointerScoresKernels {
  int64_t lanes[4];  // of float32, float64, bfloat16, float16
  // Of these types, for additive scores and for the clipped dot:
  void (*prepare[4][2])(const PointerScores&);
  void (*forward[4][2])(const PointerScores&, int64_t worker);
  void (*score_gradient[4][2])(const PointerScores&, int64_t worker);
  void (*backward[4][2])(const PointerScores&, int64_t worker);
};

#define SEQOPS_DECLARE(isa)                                 \
  namespace isa {                                           \
  extern const PointerScoresKernels pointer_scores_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
