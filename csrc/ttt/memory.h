// A memory whose weights learn while they read, on the CPU: what the host (memory.cpp) hands to the kernels
// (memory_kernel.cpp).
//
//   linear   f(x) = W1 x                     W1 [D, D]
//   MLP      f(x) = x + W2 silu(W1 x)        W1 [F, D], W2 [D, F]
//   S_t = momentum_t S_{t-1} - sum of lr_i u_i over the last `window` tokens of the chunk     u_i: gradient of token i's
//   M_t = (1 - decay_t) M_{t-1} + S_t;  o_t = f(M_t; q_t)                                     loss at the chunk's M
//
//   B batch rows · T tokens · H heads · D channels · F hidden channels · C tokens of a chunk
//   S storage type of q, k, v, o · Real what it computes in (float for 16-bit storage): weights, momentum, gates
//
// An *item* is one head of one batch row, and the work of one thread, from its first chunk to its last.
#pragma once

#include <stdint.h>

#include "../common/heads.h"
#include "../common/isa.h"

namespace seqops {

enum class MemoryStorage { float32, float64, bfloat16, float16 };

struct Memory {
  static constexpr int64_t ROWS = 64;  // tokens of a chunk whose coefficients are in buffers at a time

  int64_t B, T, H, D, F;  // F = 0: linear
  int64_t C, window;      // at most T; at least 1
  int64_t segment;        // chunks between two saved states
  bool l2;                // else "dot"
  HeadView q, k, v, o;
  bool carries;                       // there is momentum (whose data may be null where it is empty)
  const void *lr, *decay, *momentum;  // [B, T, H] in Real, dense; decay, momentum null: 0
  const void *w[2], *s[2];            // [B, H, ...] in Real, dense; w[1] null: linear; s null: zeros
  void *w_out[2], *s_out[2];          // the same after the last token
  void* states;  // null, or [B, H, segments, state_size()] in Real: W1 | W2 | S1 | S2 before a segment, rows as in w; S
                 // with momentum alone. Written by a forward, read by the backward

  // backward; null: zeros, or of an argument that is none
  HeadView grad_o, dq, dk, dv;
  const void *grad_w[2], *grad_s[2];  // [B, H, ...] in Real, dense: of w_out, s_out
  void *dlr, *ddecay, *dmomentum;     // [B, T, H] in Real, dense
  void *dw[2], *ds[2];                // [B, H, ...] in Real, dense: of w, s

  // How many chunks of `chunk_size` tokens there are between two saved states.
  static int64_t segment_of(int64_t chunk_size) {
    const int64_t chunks = 128 / chunk_size + (128 % chunk_size != 0);
    return chunks < 8 ? 8 : chunks;
  }
  bool linear() const { return F == 0; }
  int64_t layers() const { return linear() ? 1 : 2; }
  int64_t layer_size() const { return (linear() ? D : F) * D; }  // of W1, and of W2
  int64_t state_size() const { return layer_size() * layers() * (carries ? 2 : 1); }
  int64_t chunks() const { return (T + C - 1) / C; }
  int64_t segments() const { return (chunks() + segment - 1) / segment; }
};

struct MemoryKernels {
  struct Pass {
    int64_t (*buffers_size)(const Memory&);  // bytes, of a thread
    void (*run)(const Memory&, int64_t item, void* buffers);
  };
  Pass forward[4], backward[4];  // by MemoryStorage
};

#define SEQOPS_DECLARE(isa)                  \
  namespace isa {                            \
  extern const MemoryKernels memory_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
