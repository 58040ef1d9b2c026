// The gradients of the memory of two layers: one block walks a segment's chunks of a (b, h) from the last to the first.
//
// dW1, dW2', dS1, dS2' stay in registers as W does in the forward; the weights and momentum with which each chunk begins
// come in float32, from a forward over the segment, and are multiplied as 16-bit copies. With a, h, delta2, delta1, H of
// memory.cu, A of which H is silu, u = delta2 W2, x y' over channels, and lower triangles t >= i:
//
//   P1 = -c (Q K')   P2 = -c (H h')   E2 = dO delta2'   R2 = -c E2   E1 = dA delta1'   R1 = -c E1
//   end    ddelta1 = -c_C (K dW1') - m_C (K dS1')         dK = -c_C (delta1 dW1) - m_C (delta1 dS1)
//          ddelta2 = -c_C (h dW2') - m_C (h dS2')         dh = -c_C (delta2 dW2) - m_C (delta2 dS2)
//          then dW <- b_C dW, dS <- g_C dW + p_C dS
//   tiles  dH = b (dO W2) + g (dO S2) + R2 h     dh += R2' H     ddelta2 += P2' dO   dW2 += (b dO)' H    dS2 += (g dO)' H
//          dA = dH silu'(A)
//          dQ = dO + b (dA W1) + g (dA S1) + R1 K     dK += R1' Q     ddelta1 += P1' dA   dW1 += (b dA)' Q   dS1 += ..
//   inner  du = ddelta1 silu'(a)   ddelta2 += du W2'   dW2 += delta2' du   dV = -ddelta2
//          l2: dK += ddelta2, dh += ddelta2 W2, dW2 += ddelta2' h
//          da = ddelta1 u silu''(a) + dh silu'(a)   dK += da W1   dW1 += da' K
//
// Sums over the hidden channels of pairs of weights and adjoints, and of rows, give the gradients of b, g, p, c, m, and
// one warp those of the gates from them. Where something is not finite, products over tokens go one by one, as in
// memory.cu. BLOCKS is 1; MOMENTUM 1: without momentum m is lr and p 0; and ROWS is 16: with 32 the compiler spills.
#define RECOMPUTED_LANES (WARPS == 4)  // else the compiler spills
#include "ttt/memory_device.h"

static_assert(BLOCKS == 1 && MOMENTUM == 1 && UNITS == 16 && ROWS == 16, "what registers hold");

constexpr int ROW_TILES = ROWS / 16;
constexpr int LAYER_SIZE = HIDDEN * D;

// The second derivative of silu.
__device__ __forceinline__ float silu_bend(float x) {
  const float s = sigmoid(x);
  return s * (1 - s) * (2 + x * (1 - 2 * s));
}

struct Shared {
  S *s_q, *s_k, *s_v, *s_do, *s_delta2, *s_ddelta2;   // [ROWS, D]
  S *s_h, *s_delta1, *s_after, *s_dbefore, *s_inner;  // [ROWS, BLOCK_UNITS]: dbefore is dA; inner du, then da
  S *s_w1, *s_w2, *s_s1, *s_s2, *s_adjoint;           // [BLOCK_UNITS, D]; adjoint: one of the four in registers
  S *s_p1, *s_r2, *s_p2, *s_r1;                       // [ROWS, ROWS]
  float* s_dc;                                        // [ROWS, PAIR_ROW]
  float* s_unit_rows;                                 // [4, WARPS, ROWS]: sums of a warp's units, of db, dg, dc_C, dm_C
  float* s_channel_rows;                              // [2, D / 8, ROWS]: of 8 channels, of dc_C, dm_C
  float *s_dk, *s_ddelta_sums;  // [ROWS, PARTIAL_ROW]: dK and ddelta2, as far as they are known; a lane has its own
  float* s_scalars;             // [WARPS, 4]: db_C, dg_C, dp_C

  __device__ __forceinline__ explicit Shared(char*& p_shared) {
    s_q = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_k = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_v = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_do = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_delta2 = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_ddelta2 = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_h = take<S>(p_shared, WARPS * WARP_TILE);
    s_delta1 = take<S>(p_shared, WARPS * WARP_TILE);
    s_after = take<S>(p_shared, WARPS * WARP_TILE);
    s_dbefore = take<S>(p_shared, WARPS * WARP_TILE);
    s_inner = take<S>(p_shared, WARPS * WARP_TILE);
    s_w1 = take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW);
    s_w2 = take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW);
    s_s1 = take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW);
    s_s2 = take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW);
    s_adjoint = take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW);
    s_p1 = take<S>(p_shared, ROWS * PAIR_ROW);
    s_r2 = take<S>(p_shared, ROWS * PAIR_ROW);
    s_p2 = take<S>(p_shared, ROWS * PAIR_ROW);
    s_r1 = take<S>(p_shared, ROWS * PAIR_ROW);
    s_dc = take<float>(p_shared, ROWS * PAIR_ROW);
    s_unit_rows = take<float>(p_shared, 4 * WARPS * ROWS);
    s_channel_rows = take<float>(p_shared, 2 * (D / 8) * ROWS);
    s_dk = take<float>(p_shared, ROWS * PARTIAL_ROW);
    s_ddelta_sums = take<float>(p_shared, ROWS * PARTIAL_ROW);
    s_scalars = take<float>(p_shared, 4 * WARPS);
  }
};

enum RowSum { DB, DG, DC_LAST, DM_LAST };

using RowTiles = float[ROW_TILES][2 * UNIT_TILES][4];  // [ROWS, UNITS] of this warp

// What a block reads and writes of a chunk, in shared memory.
struct Places {
  Sequence q, k, v, grad_o;
  S *p_dq, *p_dk, *p_dv;  // [B, T, H, D] of one (b, h), of which out_stride is one token
  int64_t out_stride;
  const float *p_lr, *p_decay, *p_momentum;
  float *p_dlr, *p_ddecay, *p_dmomentum;
  int64_t gate_stride;
};

// sums [16, UNITS] += x [16, D] times the transpose of this warp's rows of weights [BLOCK_UNITS, D]
__device__ __forceinline__ void add_product(float (&sums)[2 * UNIT_TILES][4], const S* s_x, int row,
                                            const S* s_weights) {
#pragma unroll
  for (int k = 0; k < D; k += 32) {
    uint32_t a[2][4];
    rows_of(a[0], s_x + row * CHANNEL_ROW + k, CHANNEL_ROW);
    rows_of(a[1], s_x + row * CHANNEL_ROW + k + 16, CHANNEL_ROW);
#pragma unroll
    for (int n = 0; n < 2 * UNIT_TILES; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, s_weights + (warp_of() * UNITS + 8 * n + lane_of() % 8) * CHANNEL_ROW + k + lane_of() / 8 * 8);
      multiply(sums[n], a[0], b[0], b[1]);
      multiply(sums[n], a[1], b[2], b[3]);
    }
  }
}
// sums [16, UNITS] += pairs [16 rows, 16 tokens] times x [16 tokens, UNITS] of this warp, or the transpose of the pairs
__device__ __forceinline__ void add_seen(float (&sums)[2 * UNIT_TILES][4], const uint32_t (&pairs)[4], const S* s_x,
                                         int token) {
#pragma unroll
  for (int m = 0; m < UNIT_TILES; ++m) {
    uint32_t b[4];
    along_16_rows(b, s_x + warp_of() * WARP_TILE + token * UNIT_ROW + 16 * m, UNIT_ROW);
    multiply(sums[2 * m], pairs, b[0], b[1]);
    multiply(sums[2 * m + 1], pairs, b[2], b[3]);
  }
}
// The same for sums [16, 8] of rows from `row`, one token by one and those alone that count: 0 times NaN is NaN.
//   p: 8 columns of all tokens
template <bool TRANSPOSED>
__device__ __forceinline__ void add_one_by_one(float (&sums)[4], const S* s_pairs, int row, const S* p, int stride,
                                               int count) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int own = row + group_of() + i / 2 * 8, column = 2 * pair_of() + i % 2;
    const int first = TRANSPOSED ? own : 0, last = TRANSPOSED ? count : min(own + 1, count);
    for (int token = first; token < last; ++token) {
      const S pair = TRANSPOSED ? s_pairs[token * PAIR_ROW + own] : s_pairs[own * PAIR_ROW + token];
      sums[i] += widen(pair) * widen(p[token * stride + column]);
    }
  }
}
__device__ __forceinline__ bool odd(uint32_t word) { return !finite(low_of(word)) || !finite(high_of(word)); }
__device__ __forceinline__ void put(S* s_tile, int row, float (&sums)[2 * UNIT_TILES][4]) {
  visit_pairs(sums, [&](float x, float y, int r, int unit) {
    word_at(s_tile + warp_of() * WARP_TILE + (row + r) * UNIT_ROW + unit) = two(x, y);
  });
}
// Of each row, the sum of x y over this warp's units: of rows `row` + group, and 8 later.
__device__ __forceinline__ void row_dots(float (&dots)[2], const float (&x)[2 * UNIT_TILES][4],
                                         const float (&y)[2 * UNIT_TILES][4]) {
#pragma unroll
  for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dots[i / 2] += x[n][i] * y[n][i];
  }
}
__device__ __forceinline__ float over_pairs(float x) {  // the four lanes of a row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}

struct Chunk {
  const Shared& shared;
  const Coefficients& coefficients;
  int count, tiles;
  bool l2;

  __device__ __forceinline__ float* unit_rows(RowSum which) const {
    return shared.s_unit_rows + (which * WARPS + warp_of()) * ROWS;
  }
  __device__ __forceinline__ void put_rows(RowSum which, int row, const float (&dots)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = over_pairs(dots[i]);
      if (pair_of() == 0) unit_rows(which)[row + group_of() + 8 * i] = sum;
    }
  }
  // value(t, i, sum) of all pairs of a tile, 0 where i is later than t
  template <class Value>
  __device__ __forceinline__ void put_pairs(S* s_pairs, int row, int column, const float (&sums)[4],
                                            Value value) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = row + group_of() + 8 * i, first = column + 2 * pair_of();
      const float x = first <= t && t < count ? value(t, first, sums[2 * i]) : 0.0f;
      const float y = first + 1 <= t && t < count ? value(t, first + 1, sums[2 * i + 1]) : 0.0f;
      word_at(s_pairs + t * PAIR_ROW + first) = two(x, y);
    }
  }
  __device__ __forceinline__ float c(int t, int i) const { return coefficients.s_c[t * PAIR_ROW + i]; }

  // h, then behind a barrier delta2 and P1
  __device__ __forceinline__ void hidden() const {
#pragma unroll 1
    for (int row = 0; row < 16 * tiles; row += 16) {
      float a[2 * UNIT_TILES][4];
      clear(a);
      add_product(a, shared.s_k, row, shared.s_w1);
      apply(a, [](float x) { return silu(x); });
      put(shared.s_h, row, a);
    }
  }
  template <class Function>
  static __device__ __forceinline__ void apply(float (&sums)[2 * UNIT_TILES][4], Function function) {
#pragma unroll
    for (auto& tile : sums) {
#pragma unroll
      for (float& each : tile) each = function(each);
    }
  }
  __device__ __forceinline__ void errors() const {
    OutputSums sums;
    clear(sums);
    if (l2) contract(sums, shared.s_h, shared.s_w2, tiles);
    visit_words(sums, [&](float x, float y, int at, int, int) {
      const uint32_t k = word_at(shared.s_k + at), v = word_at(shared.s_v + at);
      if (l2) x += low_of(k), y += high_of(k);
      word_at(shared.s_delta2 + at) = two((l2 ? x : 0.0f) - low_of(v), (l2 ? y : 0.0f) - high_of(v));
    });
    visit_pair_tiles(tiles, [&](int row, int column) {
      float pair[4] = {};
      add_pairs<D>(pair, shared.s_q, shared.s_k, row, column, CHANNEL_ROW, channel_place);
      put_pairs(shared.s_p1, row, column, pair, [&](int t, int i, float x) { return -c(t, i) * x; });
    });
  }
  // visit(sum, sum, place in a tile [ROWS, D], row, channel)
  template <class Visit>
  __device__ __forceinline__ void visit_words(OutputSums& sums, Visit visit) const {
    visit_outputs(tiles, [&](int tile, int row, int channel) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = row + group_of() + 8 * i, first = channel + 2 * pair_of();
        visit(sums[tile][2 * i], sums[tile][2 * i + 1], channel_place(t, first), t, first);
      }
    });
  }
  // Sums that wait in shared memory: registers do not hold them too.
  __device__ __forceinline__ void add_to(float* s_sums, OutputSums& sums) const {
    visit_words(sums, [&](float& x, float& y, int, int t, int channel) {
      float2& at = *reinterpret_cast<float2*>(s_sums + t * PARTIAL_ROW + channel);
      at.x += x, at.y += y;
    });
  }
  __device__ __forceinline__ void take_from(float* s_sums, OutputSums& sums) const {
    visit_words(sums, [&](float& x, float& y, int, int t, int channel) {
      const float2& at = *reinterpret_cast<const float2*>(s_sums + t * PARTIAL_ROW + channel);
      x = at.x, y = at.y;
    });
  }
  // delta1 and R2, from delta2
  __device__ __forceinline__ void hidden_errors() const {
#pragma unroll 1
    for (int row = 0; row < 16 * tiles; row += 16) {
      float a[2 * UNIT_TILES][4], u[2 * UNIT_TILES][4];
      clear(a);
      add_product(a, shared.s_k, row, shared.s_w1);
      clear(u);
      add_product(u, shared.s_delta2, row, shared.s_w2);
#pragma unroll
      for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) u[n][i] *= silu_slope(a[n][i]);
      }
      put(shared.s_delta1, row, u);
    }
    visit_pair_tiles(tiles, [&](int row, int column) {
      float pair[4] = {};
      add_pairs<D>(pair, shared.s_do, shared.s_delta2, row, column, CHANNEL_ROW, channel_place);
      put_pairs(shared.s_r2, row, column, pair, [&](int t, int i, float x) { return -c(t, i) * x; });
    });
  }
  // sums [16, UNITS] += pairs times x, over tokens up to each row's
  __device__ __forceinline__ void add_before(float (&sums)[2 * UNIT_TILES][4], const S* s_pairs, const S* s_x, int row,
                                             bool by_one) const {
    if (by_one) {
#pragma unroll
      for (int n = 0; n < 2 * UNIT_TILES; ++n) {
        add_one_by_one<false>(sums[n], s_pairs, row, s_x + warp_of() * WARP_TILE + 8 * n, UNIT_ROW, count);
      }
      return;
    }
#pragma unroll 1
    for (int token = 0; token <= row; token += 16) {
      uint32_t pairs[4];
      rows_of(pairs, s_pairs + row * PAIR_ROW + token, PAIR_ROW);
      add_seen(sums, pairs, s_x, token);
    }
  }
  // Whether something of tiles [ROWS, D], or of this warp's part of tiles [ROWS, BLOCK_UNITS], is not finite.
  __device__ __forceinline__ bool odd_channels(const S* s_tile) const {
    bool found = false;
    for (int i = this_thread(); i < 16 * tiles * (D / 2); i += THREADS) {
      found = found || odd(word_at(s_tile + channel_place(i / (D / 2), i % (D / 2) * 2)));
    }
    return found;
  }
  __device__ __forceinline__ bool odd_units(const S* s_tile) const {
    bool found = false;
    for (int i = lane_of(); i < 16 * tiles * (UNITS / 2); i += 32) {
      const S* at = s_tile + warp_of() * WARP_TILE + i / (UNITS / 2) * UNIT_ROW + i % (UNITS / 2) * 2;
      found = found || odd(word_at(at));
    }
    return found;
  }
  // H and dA of this warp's units, and what they give db and dg
  __device__ __forceinline__ void through_hidden(bool odd_inputs) const {
#pragma unroll 1
    for (int row = 0; row < 16 * tiles; row += 16) {
      const float b[2] = {coefficients.s_b[row + group_of()], coefficients.s_b[row + group_of() + 8]};
      const float g[2] = {coefficients.s_g[row + group_of()], coefficients.s_g[row + group_of() + 8]};
      float A[2 * UNIT_TILES][4], by_w[2 * UNIT_TILES][4], by_s[2 * UNIT_TILES][4], dA[2 * UNIT_TILES][4];
      float db[2] = {}, dg[2] = {};
      products(by_w, shared.s_q, row, shared.s_w1);
      products(by_s, shared.s_q, row, shared.s_s1);
      combine(A, by_w, b, by_s, g);
      add_before(A, shared.s_p1, shared.s_delta1, row, odd_inputs);
      products(by_w, shared.s_do, row, shared.s_w2);
      products(by_s, shared.s_do, row, shared.s_s2);
      combine(dA, by_w, b, by_s, g);
#pragma unroll
      for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float H = silu(A[n][i]);
          db[i / 2] += H * by_w[n][i];
          dg[i / 2] += H * by_s[n][i];
          by_w[n][i] = H;
        }
      }
      put(shared.s_after, row, by_w);
      add_before(dA, shared.s_r2, shared.s_h, row, odd_inputs);
#pragma unroll
      for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dA[n][i] *= silu_slope(A[n][i]);
      }
      put(shared.s_dbefore, row, dA);
      // Again, rather than keep them in registers.
      products(by_w, shared.s_q, row, shared.s_w1);
      row_dots(db, dA, by_w);
      products(by_s, shared.s_q, row, shared.s_s1);
      row_dots(dg, dA, by_s);
      put_rows(DB, row, db);
      put_rows(DG, row, dg);
    }
    __syncwarp();
  }
  static __device__ __forceinline__ void products(float (&sums)[2 * UNIT_TILES][4], const S* s_x, int row,
                                                  const S* s_weights) {
    clear(sums);
    add_product(sums, s_x, row, s_weights);
  }
  static __device__ __forceinline__ void combine(float (&sums)[2 * UNIT_TILES][4], const float (&x)[2 * UNIT_TILES][4],
                                                 const float (&by_x)[2], const float (&y)[2 * UNIT_TILES][4],
                                                 const float (&by_y)[2]) {
#pragma unroll
    for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = by_x[i / 2] * x[n][i] + by_y[i / 2] * y[n][i];
    }
  }

  // What the chunk's end gives ddelta1 and dh, and dc_C and dm_C of the first layer.
  __device__ __forceinline__ void end_of_units(RowTiles& ddelta1, RowTiles& dh, Layer& dw1, Layer& dw2, Layer& ds1,
                                               Layer& ds2) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      if (r >= tiles) continue;
      const int row = 16 * r;
      const float c[2] = {-coefficients.s_last_c[row + group_of()], -coefficients.s_last_c[row + group_of() + 8]};
      const float m[2] = {-coefficients.s_last_m[row + group_of()], -coefficients.s_last_m[row + group_of() + 8]};
      float by_w[2 * UNIT_TILES][4], by_s[2 * UNIT_TILES][4], delta1[2 * UNIT_TILES][4];
      visit_pairs(delta1, [&](float& x, float& y, int t, int unit) {
        const uint32_t word = word_at(shared.s_delta1 + warp_of() * WARP_TILE + (row + t) * UNIT_ROW + unit);
        x = low_of(word), y = high_of(word);
      });
      clear(by_w);
      dw1.add_product(by_w, shared.s_k, row);
      clear(by_s);
      ds1.add_product(by_s, shared.s_k, row);
      float dc[2] = {}, dm[2] = {};
      row_dots(dc, delta1, by_w);
      row_dots(dm, delta1, by_s);
      put_rows(DC_LAST, row, dc);
      put_rows(DM_LAST, row, dm);
      combine(ddelta1[r], by_w, c, by_s, m);
      clear(by_w);
      dw2.add_product(by_w, shared.s_delta2, row);
      clear(by_s);
      ds2.add_product(by_s, shared.s_delta2, row);
      combine(dh[r], by_w, c, by_s, m);
    }
  }
  // s_sums -= factor (x layer), of all units, behind a barrier; with the rows of sums that delta2 gives dc_C or dm_C.
  __device__ __forceinline__ void end_of_channels(float* s_sums, Layer& layer, const S* s_x, const float* s_factor,
                                                  float* s_rows) const {
    layer.copy_to(shared.s_adjoint);
    __syncthreads();
    OutputSums product;
    clear(product);
    contract(product, s_x, shared.s_adjoint, tiles);
    visit_words(product, [&](float& x, float& y, int at, int t, int channel) {
      if (s_rows != nullptr) {
        const uint32_t word = word_at(shared.s_delta2 + at);
        const float sum = over_pairs(low_of(word) * x + high_of(word) * y);
        if (pair_of() == 0) s_rows[channel / 8 * ROWS + t] = sum;
      }
      x *= -s_factor[t], y *= -s_factor[t];
    });
    add_to(s_sums, product);
    __syncthreads();
  }
  // <dw, w>, <dw, s>, <ds, s> of this lane's elements; w and s as they are multiplied.
  static __device__ __forceinline__ void dots(float (&sums)[3], const Layer& dw, const Layer& ds, const S* s_w,
                                              const S* s_s) {
#pragma unroll
    for (int m = 0; m < UNIT_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = (warp_of() * UNITS + 16 * m + 8 * i + group_of()) * CHANNEL_ROW + 8 * n + 2 * pair_of();
          const uint32_t w = word_at(s_w + at), s = word_at(s_s + at);
          const float* to = dw.sum[m][n] + 2 * i;
          sums[0] += to[0] * low_of(w) + to[1] * high_of(w);
          sums[1] += to[0] * low_of(s) + to[1] * high_of(s);
          sums[2] += ds.sum[m][n][2 * i] * low_of(s) + ds.sum[m][n][2 * i + 1] * high_of(s);
        }
      }
    }
  }
  // The adjoints of the state before the chunk, as far as it is what is left of that state behind it.
  __device__ __forceinline__ void leave(Layer& dw, Layer& ds) const {
    const float b = coefficients.s_end[0], g = coefficients.s_end[1], p = coefficients.s_end[2];
#pragma unroll
    for (int m = 0; m < UNIT_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds.sum[m][n][i] = g * dw.sum[m][n][i] + p * ds.sum[m][n][i];
          dw.sum[m][n][i] *= b;
        }
      }
    }
  }

  // P2, R1 and dc, from H, dA of all units.
  __device__ __forceinline__ void pairs() const {
    visit_pair_tiles(tiles, [&](int row, int column) {
      float p1[4] = {}, p2[4] = {}, e1[4] = {}, e2[4] = {};
      add_pairs<D>(p1, shared.s_q, shared.s_k, row, column, CHANNEL_ROW, channel_place);
      add_pairs<D>(e2, shared.s_do, shared.s_delta2, row, column, CHANNEL_ROW, channel_place);
      add_pairs<BLOCK_UNITS>(p2, shared.s_after, shared.s_h, row, column, UNIT_ROW, unit_place);
      add_pairs<BLOCK_UNITS>(e1, shared.s_dbefore, shared.s_delta1, row, column, UNIT_ROW, unit_place);
      put_pairs(shared.s_p2, row, column, p2, [&](int t, int i, float x) { return -c(t, i) * x; });
      put_pairs(shared.s_r1, row, column, e1, [&](int t, int i, float x) { return -c(t, i) * x; });
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = row + group_of() + i / 2 * 8, token = column + 2 * pair_of() + i % 2;
        shared.s_dc[t * PAIR_ROW + token] = token <= t && t < count ? -e1[i] * p1[i] - e2[i] * p2[i] : 0.0f;
      }
    });
  }
  // sums [ROWS, D] += pairs times y, over tokens up to each row's; or with the transpose of the pairs, from it on
  template <bool TRANSPOSED>
  __device__ __forceinline__ void add_tokens(OutputSums& sums, const S* s_pairs, const S* s_y, bool by_one) const {
    visit_outputs(tiles, [&](int tile, int row, int channel) {
      if (by_one) return add_one_by_one<TRANSPOSED>(sums[tile], s_pairs, row, s_y + channel, CHANNEL_ROW, count);
#pragma unroll 1
      for (int token = TRANSPOSED ? row : 0; TRANSPOSED ? token < 16 * tiles : token <= row; token += 16) {
        uint32_t a[4], b[2];
        if constexpr (TRANSPOSED) {
          columns_of(a, s_pairs + token * PAIR_ROW + row, PAIR_ROW);
        } else {
          rows_of(a, s_pairs + row * PAIR_ROW + token, PAIR_ROW);
        }
        ldmatrix_x2_transposed(b, s_y + (token + lane_of() % 16) * CHANNEL_ROW + channel);
        multiply(sums[tile], a, b[0], b[1]);
      }
    });
  }
  // tile r of [ROWS, UNITS] += the transpose of pairs times x, from its tokens on
  __device__ __forceinline__ void add_later(RowTiles& sums, const S* s_pairs, const S* s_x, bool by_one) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      if (r >= tiles) continue;
      if (by_one) {
#pragma unroll
        for (int n = 0; n < 2 * UNIT_TILES; ++n) {
          const S* s_own = s_x + warp_of() * WARP_TILE + 8 * n;
          add_one_by_one<true>(sums[r][n], s_pairs, 16 * r, s_own, UNIT_ROW, count);
        }
        continue;
      }
#pragma unroll 1
      for (int token = 16 * r; token < 16 * tiles; token += 16) {
        uint32_t a[4];
        columns_of(a, s_pairs + token * PAIR_ROW + 16 * r, PAIR_ROW);
        add_seen(sums[r], a, s_x, token);
      }
    }
  }
  __device__ __forceinline__ void scale_rows(OutputSums& sums, const float* s_factor) const {
    visit_words(sums, [&](float& x, float& y, int, int t, int) { x *= s_factor[t], y *= s_factor[t]; });
  }
  __device__ __forceinline__ void store(OutputSums& sums, S* p, int64_t stride, float sign) const {
    visit_words(sums, [&](float& x, float& y, int, int t, int channel) {
      if (t < count) word_at(p + t * stride + channel) = two(sign * x, sign * y);
    });
  }

  // The gates' gradients, by one warp: a lane has column i of the coefficients. `first` is the chunk's first token.
  __device__ __forceinline__ void gates(const Places& places, int64_t first, int64_t window) const {
    const int i = lane_of();
    const bool own = i < 16 * tiles && i < count;
    float dlr = 0, cb = 0, mb = 0, gb = 0, pb = 0, bb = 0;
    float db_last = 0, dg_last = 0, dp_last = 0, dc_last = 0, dm_last = 0;
    for (int warp = 0; warp < WARPS; ++warp) {
      db_last += shared.s_scalars[4 * warp], dg_last += shared.s_scalars[4 * warp + 1];
      dp_last += shared.s_scalars[4 * warp + 2];
    }
    const auto of_units = [&](RowSum which, int t) {
      float sum = 0;
      for (int warp = 0; warp < WARPS; ++warp) sum += shared.s_unit_rows[(which * WARPS + warp) * ROWS + t];
      return sum;
    };
    if (own) {
      dc_last = of_units(DC_LAST, i), dm_last = of_units(DM_LAST, i);
      for (int n = 0; n < D / 8; ++n) {
        dc_last += shared.s_channel_rows[n * ROWS + i];
        dm_last += shared.s_channel_rows[(D / 8 + n) * ROWS + i];
      }
    }
    for (int t = count - 1; t >= 0; --t) {
      const bool last = t == count - 1, seen = own && i <= t, before = own && i < t;
      const float keep = coefficients.s_gate[ROWS + t], momentum = coefficients.s_gate[2 * ROWS + t];
      gb += of_units(DG, t) + (last ? dg_last : 0.0f);
      bb += of_units(DB, t) + (last ? db_last : 0.0f);
      pb += gb + (last ? dp_last : 0.0f);
      if (seen) {
        cb += shared.s_dc[t * PAIR_ROW + i] - (last ? dc_last : 0.0f);
        mb += cb - (last ? dm_last : 0.0f);
        if (t - i < window) dlr += mb;
      }
      const int at = (t - 1) * PAIR_ROW + i;
      const float by_keep = over_warp(before ? cb * coefficients.s_c[at] : 0.0f);
      const float by_momentum = over_warp(before ? mb * coefficients.s_m[at] : 0.0f);
      if (i == 0) {
        const float b = t > 0 ? coefficients.s_b[t - 1] : 1.0f, p = t > 0 ? coefficients.s_p[t - 1] : 1.0f;
        const float g = t > 0 ? coefficients.s_g[t - 1] : 0.0f;
        const int64_t place = (first + t) * places.gate_stride;
        if (places.p_ddecay != nullptr) places.p_ddecay[place] = -(by_keep + gb * g + bb * b);
        if (places.p_dmomentum != nullptr) places.p_dmomentum[place] = by_momentum + pb * p;
      }
      cb *= keep, gb *= keep, bb *= keep;
      mb *= momentum, pb *= momentum;
    }
    if (own) places.p_dlr[(first + i) * places.gate_stride] = dlr;
  }
};

// A 16-bit copy of this warp's rows of weights in global memory, `UNITS` rows in the block's [BLOCK_UNITS, D].
__device__ __forceinline__ void copy_weights(S* s, const float* p, int64_t unit_stride, int64_t channel_stride) {
  const int thread = this_thread(), warp = thread / 32;
  for (int i = thread % 32; i < UNITS * (D / 2); i += 32) {
    // neighbouring lanes take neighbouring numbers in memory
    const int unit = unit_stride == 1 ? i % UNITS : i / (D / 2);
    const int channel = unit_stride == 1 ? i / UNITS * 2 : i % (D / 2) * 2;
    const float* at = p + unit * unit_stride + channel * channel_stride;
    word_at(s + (warp * UNITS + unit) * CHANNEL_ROW + channel) = two(at[0], at[channel_stride]);
  }
}

// Chunks chunks - 1, .., 0 of tensors that begin with the segment, as long as `tokens`.
//
//   p_q, p_k, p_v, p_grad_o of any strides, rows at multiples of 16 bytes · p_lr, p_decay, p_momentum and p_dlr, p_ddecay,
//   p_dmomentum [B, T, H], of decay and momentum or null · p_states [B, H, chunks, W1 | W2 | S1 | S2]: before each chunk
//   p_adjoints [B, H, W1 | W2 | S1 | S2]: of the state behind the segment, then of that before it
//   p_dq, p_dk, p_dv [B, T, H, D]
KERNEL(neural_memory_backward, THREADS)
(const S* p_q, const S* p_k, const S* p_v, const S* p_grad_o, const float* p_lr, const float* p_decay,
 const float* p_momentum, const float* p_states, float* p_adjoints, S* p_dq, S* p_dk, S* p_dv, float* p_dlr,
 float* p_ddecay, float* p_dmomentum, int64_t T, int64_t H, int64_t C, int64_t window, int64_t tokens,
 int64_t stride_q_b, int64_t stride_q_t, int64_t stride_q_h, int64_t stride_k_b, int64_t stride_k_t, int64_t stride_k_h,
 int64_t stride_v_b, int64_t stride_v_t, int64_t stride_v_h, int64_t stride_grad_b, int64_t stride_grad_t,
 int64_t stride_grad_h, bool l2) {
  SHARED_DYNAMIC(char, p_shared);
  const Shared shared(p_shared);
  Coefficients coefficients(p_shared);
  coefficients.s_m = take<float>(p_shared, ROWS * PAIR_ROW);
  coefficients.s_p = take<float>(p_shared, ROWS);
  Places* s_places = take<Places>(p_shared, 1);
  const int64_t item = blockIdx.x, b = item / H, h = item % H, chunks = (tokens + C - 1) / C;
  if (threadIdx.x == 0) {
    const int64_t gate = b * T * H + h, token = gate * D;
    *s_places = {{p_q + b * stride_q_b + h * stride_q_h, stride_q_t},
                 {p_k + b * stride_k_b + h * stride_k_h, stride_k_t},
                 {p_v + b * stride_v_b + h * stride_v_h, stride_v_t},
                 {p_grad_o + b * stride_grad_b + h * stride_grad_h, stride_grad_t},
                 p_dq + token,
                 p_dk + token,
                 p_dv + token,
                 H * D,
                 p_lr + gate,
                 p_decay == nullptr ? nullptr : p_decay + gate,
                 p_momentum == nullptr ? nullptr : p_momentum + gate,
                 p_dlr + gate,
                 p_ddecay == nullptr ? nullptr : p_ddecay + gate,
                 p_dmomentum == nullptr ? nullptr : p_dmomentum + gate,
                 H};
  }
  __syncthreads();
  const Places& places = *s_places;
  const int unit = warp_of() * UNITS;
  float* p_adjoint = p_adjoints + item * 4 * LAYER_SIZE;
  Layer dw1, dw2, ds1, ds2;
  dw1.load(p_adjoint + unit * D, D, 1);
  dw2.load(p_adjoint + LAYER_SIZE + unit, 1, HIDDEN);
  ds1.load(p_adjoint + 2 * LAYER_SIZE + unit * D, D, 1);
  ds2.load(p_adjoint + 3 * LAYER_SIZE + unit, 1, HIDDEN);

#pragma unroll 1
  for (int64_t index = chunks - 1; index >= 0; --index) {
    const int64_t first = index * C;
    const int count = int(min(C, tokens - first));
    const Chunk chunk = {shared, coefficients, count, (count + 15) / 16, l2};
    const int tiles = chunk.tiles;
    const float* p_state = p_states + (item * chunks + index) * 4 * LAYER_SIZE;
    places.q.fetch(shared.s_q, first, count, 16 * tiles);
    places.k.fetch(shared.s_k, first, count, 16 * tiles);
    places.v.fetch(shared.s_v, first, count, 16 * tiles);
    places.grad_o.fetch(shared.s_do, first, count, 16 * tiles);
    cp_async_commit();
    Gates gates;
    gates.fetch(places.p_lr, places.p_decay, places.p_momentum, places.gate_stride, first, count);
    coefficients.put(gates);
    copy_weights(shared.s_w1, p_state + unit * D, D, 1);
    copy_weights(shared.s_w2, p_state + LAYER_SIZE + unit, 1, HIDDEN);
    copy_weights(shared.s_s1, p_state + 2 * LAYER_SIZE + unit * D, D, 1);
    copy_weights(shared.s_s2, p_state + 3 * LAYER_SIZE + unit, 1, HIDDEN);
    cp_async_wait<0>();
    __syncthreads();

    coefficients.compute(count, 16 * tiles, window);
    chunk.hidden();
    __syncthreads();
    chunk.errors();
    __syncthreads();
    chunk.hidden_errors();
    __syncwarp();
    bool by_one = chunk.odd_channels(shared.s_q) || chunk.odd_channels(shared.s_k) || chunk.odd_channels(shared.s_do) ||
                  chunk.odd_channels(shared.s_delta2) || chunk.odd_units(shared.s_h) ||
                  chunk.odd_units(shared.s_delta1);
    by_one = __syncthreads_or(by_one);
    chunk.through_hidden(by_one);
    by_one = by_one || chunk.odd_units(shared.s_after) || chunk.odd_units(shared.s_dbefore);
    by_one = __syncthreads_or(by_one);
    chunk.pairs();
    __syncthreads();
    {
      OutputSums dq, old;
      clear(dq);
      contract(dq, shared.s_dbefore, shared.s_w1, tiles);
      chunk.scale_rows(dq, coefficients.s_b);
      clear(old);
      contract(old, shared.s_dbefore, shared.s_s1, tiles);
      chunk.scale_rows(old, coefficients.s_g);
      chunk.add_tokens<false>(dq, shared.s_r1, shared.s_k, by_one);
#pragma unroll
      for (int tile = 0; tile < OUTPUT_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[tile][i] += old[tile][i];
      }
      chunk.visit_words(dq, [&](float& x, float& y, int at, int, int) {
        const uint32_t word = word_at(shared.s_do + at);
        x += low_of(word), y += high_of(word);
      });
      chunk.store(dq, places.p_dq + first * places.out_stride, places.out_stride, 1);
    }

    float dots[3] = {};
    Chunk::dots(dots, dw1, ds1, shared.s_w1, shared.s_s1);
    Chunk::dots(dots, dw2, ds2, shared.s_w2, shared.s_s2);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float sum = over_warp(dots[i]);
      if (lane_of() == 0) shared.s_scalars[4 * warp_of() + i] = sum;
    }
    {
      OutputSums zeros;
      clear(zeros);
      chunk.visit_words(zeros, [&](float&, float&, int, int t, int channel) {
        *reinterpret_cast<float2*>(shared.s_dk + t * PARTIAL_ROW + channel) = make_float2(0, 0);
        *reinterpret_cast<float2*>(shared.s_ddelta_sums + t * PARTIAL_ROW + channel) = make_float2(0, 0);
      });
    }
    chunk.end_of_channels(shared.s_dk, dw1, shared.s_delta1, coefficients.s_last_c, nullptr);
    chunk.end_of_channels(shared.s_dk, ds1, shared.s_delta1, coefficients.s_last_m, nullptr);
    chunk.end_of_channels(shared.s_ddelta_sums, dw2, shared.s_h, coefficients.s_last_c, shared.s_channel_rows);
    chunk.end_of_channels(shared.s_ddelta_sums, ds2, shared.s_h, coefficients.s_last_m,
                          shared.s_channel_rows + D / 8 * ROWS);
    RowTiles ddelta1, dh;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) clear(ddelta1[r]), clear(dh[r]);
    chunk.end_of_units(ddelta1, dh, dw1, dw2, ds1, ds2);
    chunk.leave(dw1, ds1);
    chunk.leave(dw2, ds2);

    add_outer(dw2, shared.s_after, shared.s_do, coefficients.s_b, 1, tiles);
    add_outer(ds2, shared.s_after, shared.s_do, coefficients.s_g, 1, tiles);
    add_outer(dw1, shared.s_dbefore, shared.s_q, coefficients.s_b, 1, tiles);
    add_outer(ds1, shared.s_dbefore, shared.s_q, coefficients.s_g, 1, tiles);
    chunk.add_later(dh, shared.s_r2, shared.s_after, by_one);
    chunk.add_later(ddelta1, shared.s_p1, shared.s_dbefore, by_one);
    // du
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      if (r >= tiles) continue;
      float a[2 * UNIT_TILES][4];
      clear(a);
      add_product(a, shared.s_k, 16 * r, shared.s_w1);
#pragma unroll
      for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[n][i] = ddelta1[r][n][i] * silu_slope(a[n][i]);
      }
      put(shared.s_inner, 16 * r, a);
    }
    __syncthreads();

    {
      OutputSums dk, ddelta2;
      chunk.take_from(shared.s_ddelta_sums, ddelta2);
      chunk.add_tokens<true>(ddelta2, shared.s_p2, shared.s_do, by_one);
      contract(ddelta2, shared.s_inner, shared.s_w2, tiles);
      chunk.store(ddelta2, places.p_dv + first * places.out_stride, places.out_stride, -1);
      clear(dk);
      if (l2) {
        chunk.visit_words(ddelta2,
                          [&](float& x, float& y, int at, int, int) { word_at(shared.s_ddelta2 + at) = two(x, y); });
        chunk.add_to(shared.s_dk, ddelta2);
      }
      chunk.add_tokens<true>(dk, shared.s_r1, shared.s_q, by_one);
      chunk.add_to(shared.s_dk, dk);
    }
    add_outer(dw2, shared.s_inner, shared.s_delta2, nullptr, 1, tiles);
    if (warp_of() == 0) chunk.gates(places, first, window);
    __syncthreads();

    if (l2) add_outer(dw2, shared.s_h, shared.s_ddelta2, nullptr, 1, tiles);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      if (r >= tiles) continue;
      float a[2 * UNIT_TILES][4], u[2 * UNIT_TILES][4];
      clear(a);
      add_product(a, shared.s_k, 16 * r, shared.s_w1);
      clear(u);
      add_product(u, shared.s_delta2, 16 * r, shared.s_w2);
      if (l2) add_product(dh[r], shared.s_ddelta2, 16 * r, shared.s_w2);
#pragma unroll
      for (int n = 0; n < 2 * UNIT_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u[n][i] = ddelta1[r][n][i] * u[n][i] * silu_bend(a[n][i]) + dh[r][n][i] * silu_slope(a[n][i]);
        }
      }
      put(shared.s_inner, 16 * r, u);
    }
    __syncwarp();
    add_outer(dw1, shared.s_inner, shared.s_k, nullptr, 1, tiles);
    __syncthreads();
    OutputSums dk;
    chunk.take_from(shared.s_dk, dk);
    contract(dk, shared.s_inner, shared.s_w1, tiles);
    chunk.store(dk, places.p_dk + first * places.out_stride, places.out_stride, 1);
    __syncthreads();
  }

  dw1.save(p_adjoint + unit * D, D, 1);
  dw2.save(p_adjoint + LAYER_SIZE + unit, 1, HIDDEN);
  ds1.save(p_adjoint + 2 * LAYER_SIZE + unit * D, D, 1);
  ds2.save(p_adjoint + 3 * LAYER_SIZE + unit, 1, HIDDEN);
}
EXPORT(neural_memory_backward)
