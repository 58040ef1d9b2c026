// Attention over ranges on the CPU: what the host (range_attention.cpp) hands to the kernels (range_attention_kernel.cpp).
//
//   s_ij = scale <q_i, k_j> + bias     lse_i = log sum_j exp s_ij     o_i = sum_j exp(s_ij - lse_i) v_j
//
// summed over the ranges first <= j < end of key positions that query i has in each part, and in each of two sources.
//
//   B batch rows · Tq queries · Tk keys of a source · H query heads · Hk key heads · D channels · P parts of a pattern
//   S storage type of q, k, v, o · Real what it computes in (float for 16-bit storage)
//
// A task owns a tile of rows of one head: queries, for o, lse and dq; keys, for dk and dv. They are the lanes of vectors,
// and the other side's rows are streamed past them. So every result is summed by one task, in one order.
#pragma once

#include <stdint.h>

#include "../common/heads.h"
#include "../common/isa.h"

namespace seqops {

enum class Storage { float32, float64, bfloat16, float16 };
enum class Activation { softmax, laplace, relu2 };

struct RangesView {  // int32 [B or 1, H or 1, parts, 2, rows]
  const int32_t* data;
  int64_t parts, batch, head;  // strides are 0 where one pattern serves all
};

struct KeySource {
  int64_t steps;
  HeadView k, v, dk, dv;
  RangesView ranges;  // of each query: keys
  RangesView seen;    // of each key: queries
};

struct RangeAttention {
  static constexpr int64_t TILE = 64;

  int64_t B, Tq, H, Hk, D;
  double scale;
  Activation activation;
  int sources;  // 1 or 2
  KeySource source[2];
  HeadView q, o;
  void* lse;  // [B, H, Tq] in Real: written by the forward, read by the backward

  // [heads, 2 C - 1] by distance, or [heads, C, C], in Real; null: none. Places count from the start of the first range.
  const void* bias;
  int64_t bias_places;  // C
  int64_t bias_head;    // stride; 0: one for all heads
  bool bias_by_distance;
  const int32_t* bias_start;  // [Tq]

  // backward
  HeadView grad_o, dq;
  const void* grad_lse;  // [B, H, Tq] in Real, or null
  void* sums;     // [B, H, 2, Tq] in Real: lse and delta = <do, o> - dlse, by the pass of queries for that of keys
  double* dbias;  // [H, bias_size()], zeros at first; null: not wanted

  int64_t bias_size() const { return bias_by_distance ? 2 * bias_places - 1 : bias_places * bias_places; }
  static int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }
  static int64_t tiles(int64_t rows) { return (rows + TILE - 1) / TILE; }
  int64_t query_tasks() const { return B * H * tiles(Tq); }
  // In the forward the queries of several heads share a tile where they are few, see the same ranges and read the same
  // keys: so many heads.
  int64_t heads_at_a_time() const {
    if (bias != nullptr || Tq == 0 || 2 * Tq > TILE) return 1;
    for (int n = 0; n < sources; ++n) {
      if (source[n].ranges.head != 0) return 1;
    }
    return H / Hk < TILE / Tq ? H / Hk : TILE / Tq;
  }
  int64_t slices() const { return (H / Hk + heads_at_a_time() - 1) / heads_at_a_time(); }  // of a group of heads
  int64_t forward_tasks() const { return B * Hk * slices() * tiles(Tq); }
  int64_t key_tasks() const {
    int64_t count = 0;
    for (int n = 0; n < sources; ++n) count += B * Hk * tiles(source[n].steps);
    return count;
  }
  // Numbers of Real in a worker's buffers.
  int64_t scratch_size() const { return 9 * TILE * padded(D) + TILE * (4 * TILE + 32) + 2 * TILE * TILE; }
};

using RangeAttentionPass = void (*)(const RangeAttention&, int64_t task, void* scratch);

struct RangeAttentionKernels {
  // queries: dq and, for the pass of keys, `sums`. With dbias a task is a head, else a tile.
  struct Passes {
    RangeAttentionPass forward, queries, keys;
  } of[4];
};

#define SEQOPS_DECLARE(isa)                                   \
  namespace isa {                                             \
  extern const RangeAttentionKernels range_attention_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
