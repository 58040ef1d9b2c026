// Linear attention on the CPU: what the host (linear_attention.cpp) hands to the kernels (linear_attention_kernel.cpp).
//
//   S_t = e^{g_t} S_{t-1} + k_t v_t^T     o_t = scale S_t^T q_t
//
//   B batch rows · T time steps · H heads · K key width · V value width · C steps of a chunk
//   S storage type of q, k, v, o · Real what it computes in (float for 16-bit storage): states and sums
//   K', V' the widths in buffers: whole vectors of any instruction set, filled up with zeros
//
// An *item* is one head of one sequence. Its steps are cut into chunks from the first on; every chunk says what it adds
// to the state ("states"), these are put together in the order of time ("fold"), then each chunk gives its outputs or
// gradients. One thread does all of an item, or all threads share the chunks of one: with the same results, bit by bit.
#pragma once

#include <stdint.h>

#include "../common/heads.h"
#include "../common/isa.h"
#include "../common/sequence.h"

namespace seqops {

enum class DecayKind { none, step, channel };  // one number a step (also [H]), or one for each key channel
enum class Storage { float32, float64, bfloat16, float16 };

struct LinearAttention {
  static constexpr int64_t C = 64;

  const Row* rows;
  int64_t H, K, V;
  double scale;
  bool causal;
  int64_t window;  // 0: none
  DecayKind decay;
  Storage decay_type;
  HeadView q, k, v, g, o;
  const void* initial;  // [rows, H, K, V] in Real, or null: zeros
  void* final;          // [rows, H, K, V] in Real, written

  // backward
  HeadView grad_o, dq, dk, dv, dg;
  const void* dfinal;  // as initial
  void* dinitial;      // as final
  bool sum_decay;      // dg is a sum over steps: dg_sums has one of every chunk instead
  double* dg_sums;     // [rows, H, most chunks]
  int64_t most_chunks;

  static int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }
  static int64_t chunks(int64_t steps) { return (steps + C - 1) / C; }
  int64_t state_size() const { return padded(K) * padded(V); }
  // Numbers of Real in a worker's buffers, and in what all chunks of an item hand on.
  int64_t buffers_size() const {
    return C * (26 * padded(K) + 12 * padded(V)) + 6 * C * C + 6 * state_size() + 32 * padded(K) + 1024;
  }
  int64_t slots_size(bool backward) const {
    const int64_t arrays = (backward ? 2 : 1) * (window > 0 ? 2 : 1);
    return (most_chunks + 2) * (arrays * state_size() + padded(K));
  }
};

// What a thread does: of item `item`, chunks begin .. end - 1. `buffers` are its own, `slots` belong to the item.
using LinearAttentionPass = void (*)(const LinearAttention&, int64_t item, int64_t begin, int64_t end, void* buffers,
                                     void* slots);

struct LinearAttentionKernels {
  // march: all of a forward whose chunks follow each other in one thread; else states, fold, outputs.
  struct Forward {
    LinearAttentionPass march, states, fold, outputs;
  } forward[4];
  struct Backward {
    LinearAttentionPass states, fold, gradients;
  } backward[4];
};

#define SEQOPS_DECLARE(isa)                                     \
  namespace isa {                                               \
  extern const LinearAttentionKernels linear_attention_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
