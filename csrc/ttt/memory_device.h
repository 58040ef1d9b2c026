// What the CUDA kernels of the memory share: the MLP f(x) = x + W2 silu(W1 x) of 64 channels, resident on chip.
//
//   B batch · T time · H heads · D = 64 channels · F hidden channels · C tokens of a chunk, at most ROWS
//
// One block, or a cluster of BLOCKS of them, owns the memory of one (b, h) for all its chunks. A warp owns UNITS hidden
// channels: rows of W1 [F, D] and of W2' [F, D], the transpose of W2, in float32, as the sums of tensor cores lie
// (`Layer`). Such sums, two of them rounded to 16 bits, are just what multiplies in X W' products, and new weights are
// sums that go on: so the weights never leave their registers. What contracts over the hidden channels reads 16-bit
// copies in shared memory.
//
// In a lane, group = lane / 4 and pair = lane % 4: it has rows group and group + 8 of a tile of sums, in columns 2 pair
// and 2 pair + 1 of every 8. Rows past the chunk's end are zeros, and their coefficients too.
//
// Constants: STORAGE of q, k, v, o, of 16 bits · ROWS 16, 32 or 64 · UNITS 16 or 32 · WARPS 4 or 8 · BLOCKS
//   MOMENTUM 1: S is carried · BUFFERS 2: a chunk is fetched while another is computed
#pragma once

#include "common/gpu.h"

using S = STORAGE;
static_assert(sizeof(S) == 2, "operands of tensor cores");

constexpr int D = 64;
constexpr int THREADS = 32 * WARPS;
constexpr int UNIT_TILES = UNITS / 16;  // of 16 hidden channels, of a warp
constexpr int BLOCK_UNITS = UNITS * WARPS;
constexpr int HIDDEN = BLOCK_UNITS * BLOCKS;  // F
// 8 elements more a row: eight rows of 16 bytes that ldmatrix reads lie in different banks.
constexpr int CHANNEL_ROW = D + 8;
constexpr int UNIT_ROW = UNITS + 8;
constexpr int PAIR_ROW = ROWS + 8;
constexpr int PARTIAL_ROW = D + 4;  // of float32
constexpr int WARP_TILE = ROWS * UNIT_ROW;
constexpr int OUTPUT_TILES = ROWS / 16 * (D / 8) / WARPS;  // tiles of 16 rows and 8 channels, a warp

static_assert(ROWS == 16 || ROWS == 32 || ROWS == 64, "OUTPUT_TILES of a warp are neighbours in one row or whole rows");
static_assert(WARPS >= 4, "one warp more than the ROWS columns of coefficients take");

// The thread's number, where what follows from it is computed anew: kept from chunk to chunk, it would take registers
// that there are not.
__device__ __forceinline__ int this_thread() { return computed_anew(threadIdx.x); }

#if !defined(RECOMPUTED_LANES)
#define RECOMPUTED_LANES 0  // 1: all that follows from the lane is computed anew
#endif
__device__ __forceinline__ int lane_of() { return (RECOMPUTED_LANES ? this_thread() : int(threadIdx.x)) % 32; }
__device__ __forceinline__ int warp_of() { return (RECOMPUTED_LANES ? this_thread() : int(threadIdx.x)) / 32; }
__device__ __forceinline__ int group_of() { return lane_of() / 4; }
__device__ __forceinline__ int pair_of() { return lane_of() % 4; }

// ---- numbers

__device__ __forceinline__ uint32_t two(float low, float high) {
  return uint32_t(narrow<S>(low).bits) | uint32_t(narrow<S>(high).bits) << 16;
}
__device__ __forceinline__ float low_of(uint32_t word) { return widen(S{uint16_t(word)}); }
__device__ __forceinline__ float high_of(uint32_t word) { return widen(S{uint16_t(word >> 16)}); }
__device__ __forceinline__ uint32_t& word_at(S* p) { return *reinterpret_cast<uint32_t*>(p); }
__device__ __forceinline__ uint32_t word_at(const S* p) { return *reinterpret_cast<const uint32_t*>(p); }

// sigmoid to 4e-7 of the value: far below the rounding to 16 bits. NaN stays NaN.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1 + exp2_approx(x * -1.44269504f)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1 + x * (1 - s));
}
__device__ __forceinline__ bool finite(float x) { return fabsf(x) < INFINITY; }

__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  mma_bf16_m16n8k16(sums, a, b);
}
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  mma_f16_m16n8k16(sums, a, b);
}
// sums [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
  const uint32_t b[2] = {b_0, b_1};
  multiply(sums, a, b, S{});
}

// ---- operands in shared memory

// a [16, 16] of a row-major tile, its first element at p.
__device__ __forceinline__ void rows_of(uint32_t (&a)[4], const S* p, int stride) {
  ldmatrix_x4(a, p + lane_of() % 16 * stride + lane_of() / 16 * 8);
}
// a [16, 16] of the transpose of a row-major tile.
__device__ __forceinline__ void columns_of(uint32_t (&a)[4], const S* p, int stride) {
  ldmatrix_x4_transposed(a, p + (lane_of() / 16 * 8 + lane_of() % 8) * stride + lane_of() / 8 % 2 * 8);
}
// b [16, 8] twice, of sums over rows: 32 rows of 8 columns
__device__ __forceinline__ void along_32_rows(uint32_t (&b)[4], const S* p, int stride) {
  ldmatrix_x4_transposed(b, p + lane_of() * stride);
}
// b [16, 8] twice, of sums over rows: 16 rows of 16 columns
__device__ __forceinline__ void along_16_rows(uint32_t (&b)[4], const S* p, int stride) {
  ldmatrix_x4_transposed(b, p + lane_of() % 16 * stride + lane_of() / 16 * 8);
}
// A tile [ROWS, BLOCK_UNITS] is one of [ROWS, UNITS] after the other, one a warp.
__device__ __forceinline__ int unit_place(int row, int unit) {
  return unit / UNITS * WARP_TILE + row * UNIT_ROW + unit % UNITS;
}

using HiddenSums = float[2 * UNIT_TILES][4];  // [16 rows, UNITS]

template <int TILES>
__device__ __forceinline__ void clear(float (&sums)[TILES][4]) {
#pragma unroll
  for (auto& tile : sums) {
#pragma unroll
    for (float& each : tile) each = 0;
  }
}
// visit(sum, row of 16, column of UNITS), columns of pairs one after the other
template <class Visit>
__device__ __forceinline__ void visit_pairs(HiddenSums& sums, Visit visit) {
#pragma unroll
  for (int tile = 0; tile < 2 * UNIT_TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      visit(sums[tile][2 * i], sums[tile][2 * i + 1], group_of() + 8 * i, 8 * tile + 2 * pair_of());
    }
  }
}

// ---- weights in registers

// A matrix [UNITS, D] of this warp in float32, as sums [16, 8].
struct Layer {
  float sum[UNIT_TILES][D / 8][4];

  // visit(pair of elements, unit of this warp, first channel)
  template <class Visit>
  __device__ __forceinline__ void visit(Visit visit) {
#pragma unroll
    for (int m = 0; m < UNIT_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          visit(sum[m][n][2 * i], sum[m][n][2 * i + 1], 16 * m + 8 * i + group_of(), 8 * n + 2 * pair_of());
        }
      }
    }
  }
  __device__ __forceinline__ void fill(float value) {
    visit([&](float& x, float& y, int, int) { x = y = value; });
  }
  // p: the first unit's first channel in global memory
  __device__ __forceinline__ void load(const float* p, int64_t unit_stride, int64_t channel_stride) {
    visit([&](float& x, float& y, int unit, int channel) {
      const float* at = p + unit * unit_stride + channel * channel_stride;
      x = at[0], y = at[channel_stride];
    });
  }
  __device__ __forceinline__ void save(float* p, int64_t unit_stride, int64_t channel_stride) {
    visit([&](float& x, float& y, int unit, int channel) {
      float* at = p + unit * unit_stride + channel * channel_stride;
      at[0] = x, at[channel_stride] = y;
    });
  }
  // The 16-bit copy of this warp's rows in s [BLOCK_UNITS, D].
  __device__ __forceinline__ void copy_to(S* s) {
    visit([&](float& x, float& y, int unit, int channel) {
      word_at(s + (warp_of() * UNITS + unit) * CHANNEL_ROW + channel) = two(x, y);
    });
  }
  // sums [16, UNITS] += x [16, D] times the transpose of this, x at row `first` of a tile [ROWS, D].
  __device__ __forceinline__ void add_product(HiddenSums& sums, const S* s_x, int first) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t x[4];
      rows_of(x, s_x + first * CHANNEL_ROW + 16 * k, CHANNEL_ROW);
#pragma unroll
      for (int m = 0; m < UNIT_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* left = sum[m][2 * k] + 2 * half;
          const float* right = sum[m][2 * k + 1] + 2 * half;
          multiply(sums[2 * m + half], x, two(left[0], left[1]), two(right[0], right[1]));
        }
      }
    }
  }
};

// ---- shared memory

template <class Value>
__device__ __forceinline__ Value* take(char*& p_shared, int count) {
  Value* taken = reinterpret_cast<Value*>(p_shared);
  p_shared += (count * sizeof(Value) + 15) / 16 * 16;
  return taken;
}

__device__ __forceinline__ void block_or_cluster_barrier() {
#if BLOCKS > 1
  cluster_barrier();
#else
  __syncthreads();
#endif
}
__device__ __forceinline__ int block_rank() {
#if BLOCKS > 1
  return int(cluster_rank());
#else
  return 0;
#endif
}

// [B, T, H, D] of one (b, h).
struct Sequence {
  const S* p;
  int64_t stride;  // of time

  // Rows first .. first + count - 1 to s [ROWS, D], zeros behind them up to `padded`; visible after cp_async_wait.
  __device__ __forceinline__ void fetch(S* s, int64_t first, int count, int padded) const {
    for (int i = this_thread(); i < padded * (D / 8); i += THREADS) {
      const int row = i / (D / 8), channel = i % (D / 8) * 8;
      const bool inside = row < count;
      cp_async_16_zero_fill(s + row * CHANNEL_ROW + channel, p + (inside ? (first + row) * stride + channel : 0),
                            inside ? 16 : 0);
    }
  }
};

// What a block reads, in shared memory: registers are for weights.
struct Sources {
  Sequence q, k, v;
  const float *p_lr, *p_decay, *p_momentum;  // [B, T, H] of one (b, h); the last two may be null
  int64_t gate_stride;
};

// ---- coefficients of one chunk
//
//   m_t = momentum_t m_{t-1} + lr in the window     c_t = keep_t c_{t-1} + m_t      b_t = keep_t b_{t-1}
//   p_t = momentum_t p_{t-1}                        g_t = keep_t g_{t-1} + p_t      keep = 1 - decay
struct Gates {
  float lr, keep, momentum;  // of row threadIdx.x

  __device__ __forceinline__ void fetch(const float* p_lr, const float* p_decay, const float* p_momentum,
                                        int64_t stride, int64_t first, int count) {
    const int row = this_thread();
    const bool inside = row < count;
    const int64_t at = (first + row) * stride;
    lr = inside ? p_lr[at] : 0.0f;
    keep = inside && p_decay != nullptr ? 1 - p_decay[at] : 1.0f;
    momentum = inside && p_momentum != nullptr ? p_momentum[at] : 0.0f;
  }
};

struct Coefficients {
  float* s_c;     // [ROWS, PAIR_ROW], for columns up to the row
  float* s_gate;  // lr, keep, momentum [3, ROWS]
  float* s_b;     // [ROWS] and so on
  float* s_g;
  float* s_last_c;  // the last token's rows: zeros for tokens that are not
  float* s_last_m;
  float* s_end;          // b, g, p of the last token
  float* s_m = nullptr;  // [ROWS, PAIR_ROW] and [ROWS], where the backward wants them
  float* s_p = nullptr;

  __device__ __forceinline__ explicit Coefficients(char*& p_shared)
      : s_c(take<float>(p_shared, ROWS * PAIR_ROW)),
        s_gate(take<float>(p_shared, 3 * ROWS)),
        s_b(take<float>(p_shared, ROWS)),
        s_g(take<float>(p_shared, ROWS)),
        s_last_c(take<float>(p_shared, ROWS)),
        s_last_m(take<float>(p_shared, ROWS)),
        s_end(take<float>(p_shared, 4)) {}

  __device__ __forceinline__ void put(const Gates& gates) const {
    if (threadIdx.x < ROWS) {
      s_gate[threadIdx.x] = gates.lr;
      s_gate[ROWS + threadIdx.x] = gates.keep;
      s_gate[2 * ROWS + threadIdx.x] = gates.momentum;
    }
  }
  // After a barrier; ready after another one. A thread computes a column, and one of the last warp b, p and g.
  __device__ __forceinline__ void compute(int count, int padded, int64_t window) const {
    const int i = threadIdx.x;
    if (i < padded) {
      const float lr = s_gate[i];
      float m = 0, c = 0;
      for (int t = i; t < count; ++t) {
        m = s_gate[2 * ROWS + t] * m + (t - i < window ? lr : 0.0f);
        if (t == i) m = lr;  // nothing is before it
        c = t == i ? m : s_gate[ROWS + t] * c + m;
        s_c[t * PAIR_ROW + i] = c;
        if (s_m != nullptr) s_m[t * PAIR_ROW + i] = m;
      }
      s_last_c[i] = c;
      s_last_m[i] = m;
    }
    if (i == THREADS - 1) {
      float b = 1, p = 1, g = 0;
      for (int t = 0; t < padded; ++t) {
        if (t < count) {
          b *= s_gate[ROWS + t];
          p *= s_gate[2 * ROWS + t];
          g = s_gate[ROWS + t] * g + p;
        }
        s_b[t] = b;
        s_g[t] = g;
        if (s_p != nullptr) s_p[t] = p;
      }
      s_end[0] = b;
      s_end[1] = g;
      s_end[2] = p;
    }
  }
};

// ---- products of a block

// visit(tile of this warp, row, channel) of the tiles [16, 8] of [16 tiles, D]
template <class Visit>
__device__ __forceinline__ void visit_outputs(int tiles, Visit visit) {
#pragma unroll
  for (int i = 0; i < OUTPUT_TILES; ++i) {
    const int index = warp_of() * OUTPUT_TILES + i, row = index / (D / 8) * 16;
    if (row < 16 * tiles) visit(i, row, index % (D / 8) * 8);
  }
}
using OutputSums = float[OUTPUT_TILES][4];
// sums += x [16 tiles, BLOCK_UNITS] weights [BLOCK_UNITS, D]
__device__ __forceinline__ void contract(OutputSums& sums, const S* s_x, const S* s_weights, int tiles) {
#pragma unroll 2
  for (int k = 0; k < BLOCK_UNITS; k += 32) {
    visit_outputs(tiles, [&](int i, int row, int channel) {
      uint32_t a[2][4], b[4];
      rows_of(a[0], s_x + unit_place(row, k), UNIT_ROW);
      rows_of(a[1], s_x + unit_place(row, k + 16), UNIT_ROW);
      along_32_rows(b, s_weights + k * CHANNEL_ROW + channel, CHANNEL_ROW);
      multiply(sums[i], a[0], b[0], b[1]);
      multiply(sums[i], a[1], b[2], b[3]);
    });
  }
}

// sums [16, 8] of <x_t, y_i>, t from `row`, i from `column`: of DEPTH columns, whose element k is at place(row, k).
template <int DEPTH, class Place>
__device__ __forceinline__ void add_pairs(float (&sums)[4], const S* s_x, const S* s_y, int row, int column, int stride,
                                          Place place) {
#pragma unroll 4
  for (int k = 0; k < DEPTH; k += 32) {
    uint32_t a[2][4], b[4];
    rows_of(a[0], s_x + place(row, k), stride);
    rows_of(a[1], s_x + place(row, k + 16), stride);
    ldmatrix_x4(b, s_y + place(column + lane_of() % 8, k + lane_of() / 8 * 8));
    multiply(sums, a[0], b[0], b[1]);
    multiply(sums, a[1], b[2], b[3]);
  }
}
__device__ __forceinline__ int channel_place(int row, int channel) { return row * CHANNEL_ROW + channel; }
// visit(row, column) of the tiles [16, 8] of pairs (t, i) that hold some i <= t, shared out among the warps
template <class Visit>
__device__ __forceinline__ void visit_pair_tiles(int tiles, Visit visit) {
#pragma unroll 1
  for (int index = warp_of(); index < 2 * tiles * tiles; index += WARPS) {
    const int row = index / (2 * tiles) * 16, column = index % (2 * tiles) * 8;
    if (column <= row + 15) visit(row, column);
  }
}

// layer += (factor x)' y, of x [16 tiles, UNITS] of this warp and y [16 tiles, D]; factor of each token, or 1 where null
__device__ __forceinline__ void add_outer(Layer& layer, const S* s_x, const S* s_y, const float* s_factor, float sign,
                                          int tiles) {
#pragma unroll 1
  for (int token = 0; token < 16 * tiles; token += 16) {
    float factor[4] = {sign, sign, sign, sign};
    if (s_factor != nullptr) {
      const float* at = s_factor + token + 2 * pair_of();
      factor[0] *= at[0], factor[1] *= at[1], factor[2] *= at[8], factor[3] *= at[9];
    }
    uint32_t b[D / 16][4];
#pragma unroll
    for (int n = 0; n < D / 16; ++n) along_16_rows(b[n], s_y + token * CHANNEL_ROW + 16 * n, CHANNEL_ROW);
#pragma unroll
    for (int m = 0; m < UNIT_TILES; ++m) {
      uint32_t a[4];
      columns_of(a, s_x + warp_of() * WARP_TILE + token * UNIT_ROW + 16 * m, UNIT_ROW);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = two(low_of(a[i]) * factor[i / 2 * 2], high_of(a[i]) * factor[i / 2 * 2 + 1]);
      }
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        multiply(layer.sum[m][2 * n], a, b[n][0], b[n][1]);
        multiply(layer.sum[m][2 * n + 1], a, b[n][2], b[n][3]);
      }
    }
  }
}
