// Recurrent networks on the CPU: what the host (rnn.cpp) hands to the kernels (*_kernel.cpp).
//
//   B batch rows · T time steps · H heads · D units of a head · G gates of a cell
//   S storage type of sequences and weights · Real what it computes in (float for 16-bit storage): states, biases, sums
//
// Sequences are [B, T, *, H, D] contiguous inside a (row, step) pair; `Steps` says where a pair begins. Rows are sorted
// by length, longest first, so the rows still running at a step are a prefix; `position` counts in that order.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

// Host code and kernel files both use these: inlined always, so that no copy of one is shared between them.
#define SEQOPS_HOST_INLINE inline __attribute__((always_inline))

namespace seqops {

enum class Cell { lstm, gru, slstm, elman };
enum class Storage { float32, float64, bfloat16, float16 };

constexpr int MOST_GATES = 4, MOST_STATES = 4, STORAGES = 4;

// Pair (row, step) begins at row * stride_row + step * stride_step, in units of the tensor's elements a pair.
struct Steps {
  int64_t row, step;
};

// How the work is shared. A worker takes whole sequences of a block of rows, and no worker waits for another; or, with
// few rows, workers share the units of every row and meet once a step.
struct Plan {
  int64_t workers;
  int64_t row_blocks;  // blocks of rows; with split_units 1
  bool split_units;
  int64_t panel_width;  // vectors of units that one pass of the product computes; above 1 only when its gates are 1
  bool unpacked;        // forward of very few rows: dot products with r as it lies
  bool narrow_weights;  // packed weights keep their 16-bit storage
};

struct Recurrence {
  int64_t B, T, H, D;
  const int64_t* lengths;  // [B] by position
  const int64_t* rows;     // [B] position -> row
  bool reverse;            // step s is time T-1-s of a row (its own length - 1 - s)
  bool relu;               // Elman's nonlinearity
  Plan plan;
  int64_t* arrived;  // barrier, see common/team.h

  const void* r;  // [G, H, D, D] in S
  int64_t stride_r[4];
  void* packed;  // weights in the order the product reads them

  Steps steps;  // of every contiguous sequence below, h and dwx included
};

struct Forward : Recurrence {
  const void* wx;            // [B, T, G, H, D] in S
  int64_t stride_wx[4];      // b, t, g, h
  const void* b;             // [G, H, D] in Real, or null: zeros
  void* h;                   // [B, T, H, D] in S
  void* state[MOST_STATES];  // h, c, n, m: [B, H, D] in Real; initial on entry, final on exit
  void* cache;               // [B, T, caches, H, D] in S, or null: what the backward reads
  void* cache_state;         // LSTM's c, GRU's y_n: [B, T, H, D] in S, or null
  void* product_input;       // [2, H, B, D, padded]: h of the previous and of this step, rounded to S (type: Input<S>)
};

struct Backward : Recurrence {
  const void* dh;        // [B, T, H, D] in S, or null: zeros
  int64_t stride_dh[3];  // b, t, h
  void*
      dstate[MOST_STATES];  // gradients of h, c, n, m: [B, H, D] in Real; of the final on entry, of the initial on exit
  const void* cache;
  const void* cache_state;
  const void* h;                     // [B, T, H, D] in S (GRU, Elman)
  const void* initial[MOST_STATES];  // [B, H, D] in Real, or null: zeros
  const void* final[MOST_STATES];    // [B, H, D] in Real (sLSTM's c, n)
  double grad_clip;                  // negative: none
  void* dwx;                         // [B, T, G, H, D] in S
  void* dy;                          // GRU's gradient of y_n [B, T, H, D] in S
  void* product_input;               // [2, H, B, G * D, padded]: dy of the following and of this step
};

// One head's units, cut into panels of `width` vectors: the columns that one pass of the product computes. The last
// panel is as narrow as its units allow. Packed weights are [head][panel][k][gate][vector][lane], zero past the units.
struct Panels {
  int64_t units, lanes, width, gates, depth;  // depth: length of the product's sums, k

  SEQOPS_HOST_INLINE int64_t vectors() const { return (units + lanes - 1) / lanes; }
  SEQOPS_HOST_INLINE int64_t count() const { return (vectors() + width - 1) / width; }
  SEQOPS_HOST_INLINE int64_t width_of(int64_t panel) const {
    const int64_t left = vectors() - panel * width;
    return left >= width ? width : (left > 2 ? 4 : left);  // 1, 2 or 4
  }
  SEQOPS_HOST_INLINE int64_t offset(int64_t panel) const { return panel * width * lanes * gates * depth; }
  SEQOPS_HOST_INLINE int64_t head_size() const {
    return offset(count() - 1) + width_of(count() - 1) * lanes * gates * depth;
  }
};

// Elements between rows of the product's input: an odd number of cache lines, so that the rows of a tile do not compete
// for the same few sets of the cache where depth is a power of two.
SEQOPS_HOST_INLINE int64_t product_stride(int64_t depth, int64_t element_bytes) {
  const int64_t line = 64 / element_bytes;
  return (((depth + line - 1) / line) | 1) * line;
}

// y[row, unit] = sum_k x[row, k] weight[unit, k] + bias[unit], float32 or float64.
struct Projection {
  int64_t rows, units, depth;
  int64_t workers;
  int64_t* arrived;
  const void* x;  // [rows, depth], rows dense
  int64_t stride_x;
  const void* weight;             // [units, depth]
  int64_t stride_unit, stride_k;  // one of them is 1
  const void* bias;               // [units], or null: zeros
  void* packed;                   // of `projection_panels`
  void* y;                        // [rows, units]
};

SEQOPS_HOST_INLINE Panels projection_panels(int64_t units, int64_t lanes, int64_t depth) {
  const int64_t vectors = (units + lanes - 1) / lanes;
  return {units, lanes, vectors >= 4 ? 4 : (vectors >= 2 ? 2 : 1), 1, depth};
}

// Workers [begin, end) of the plan.
using ForwardKernel = void (*)(const Forward&, int64_t begin, int64_t end);
using BackwardKernel = void (*)(const Backward&, int64_t begin, int64_t end);
using ProjectionKernel = void (*)(const Projection&, int64_t begin, int64_t end);

struct CellKernels {
  ForwardKernel forward[STORAGES];
  BackwardKernel backward[STORAGES];
};

struct ProjectionKernels {
  ProjectionKernel float32, float64;
};

// Length of packed sums: even where the product takes k in pairs.
SEQOPS_HOST_INLINE int64_t packed_depth(int64_t depth, bool pairs) { return pairs ? (depth + 1) / 2 * 2 : depth; }

// What the plan needs to know of an instruction set.
struct Tiles {
  int lanes_float, lanes_double;
  bool bfloat16_pairs;          // bfloat16 is multiplied as it is, in pairs along k
  int rows_of[MOST_GATES + 1];  // batch rows of one register tile, by vectors a row
};

#define SEQOPS_DECLARE(isa)                                                         \
  namespace isa {                                                                   \
  extern const CellKernels lstm_kernels, gru_kernels, slstm_kernels, elman_kernels; \
  extern const Tiles rnn_tiles;                                                     \
  extern const ProjectionKernels projection_kernels;                                \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
