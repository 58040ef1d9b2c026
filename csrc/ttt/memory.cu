// The memory of two layers, forward: one block or cluster walks the chunks of a (b, h). See memory_device.h, and for a
// chunk of tokens Q, K, V, whose coefficients are c, m, b, g, p:
//
//   a = K W1'   h = silu(a)   delta2 = K + h W2' - V (l2) or -V (dot)   delta1 = (delta2 W2) silu'(a)
//   H = silu(b (Q W1') + g (Q S1') - (c (Q K')) delta1)
//   O = Q + b (H W2') + g (H S2') - (c (H h')) delta2
//   W1 <- b_C W1 + g_C S1 - (c_C delta1)' K,   S1 <- p_C S1 - (m_C delta1)' K,   and with (delta2, h) W2 and S2
//
// Of the hidden channels everything stays with the warp that owns them, but h and H, over which outputs contract: five
// barriers a chunk, one more where chunks are not fetched ahead. `a` is computed twice: it needs fewer cycles than memory.
//
// c [i, t] is 0 for later tokens i, but 0 times NaN is not: pairs (t, i > t) are cut from c (Q K'), and where delta is
// not finite its product sums tokens one by one up to t.
#define RECOMPUTED_LANES 1  // else the compiler spills
#include "ttt/memory_device.h"

struct Shared {
  S* s_tokens;                  // [BUFFERS, 3, ROWS, D]: q, k, v
  S* s_delta2;                  // [ROWS, D]
  S *s_h, *s_delta1, *s_after;  // [ROWS, BLOCK_UNITS]; after: H
  S *s_w2, *s_s2;               // [BLOCK_UNITS, D], transposes of W2 and S2
  S* s_pairs;                   // [ROWS, ROWS]: -c (Q K'), then -c (H h')

  __device__ __forceinline__ explicit Shared(char*& p_shared) {
    s_tokens = take<S>(p_shared, BUFFERS * 3 * ROWS * CHANNEL_ROW);
    s_delta2 = take<S>(p_shared, ROWS * CHANNEL_ROW);
    s_h = take<S>(p_shared, WARPS * WARP_TILE);
    s_delta1 = take<S>(p_shared, WARPS * WARP_TILE);
    s_after = take<S>(p_shared, WARPS * WARP_TILE);
    s_w2 = take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW);
    s_s2 = MOMENTUM ? take<S>(p_shared, BLOCK_UNITS * CHANNEL_ROW) : nullptr;
    s_pairs = take<S>(p_shared, ROWS * PAIR_ROW);
  }
  // `which`: 0 q, 1 k, 2 v
  __device__ __forceinline__ S* tokens(int64_t chunk, int which) const {
    return s_tokens + (chunk % BUFFERS * 3 + which) * (ROWS * CHANNEL_ROW);
  }
  // Sums over the hidden channels of this block [ROWS, PARTIAL_ROW], which the other blocks read, where nothing else is
  // at that time: H and delta1 do not exist before delta2, h and delta1 are not needed for O.
  __device__ __forceinline__ float* partial(bool output) const {
    static_assert(2 * WARPS * WARP_TILE * sizeof(S) >= ROWS * PARTIAL_ROW * sizeof(float), "two tiles hold the sums");
    return reinterpret_cast<float*>(output ? s_h : s_delta1);
  }
};

// ---- one chunk

struct Chunk {
  const Shared& shared;
  const Coefficients& coefficients;
  const S *s_q, *s_k, *s_v;
  int count;  // of tokens
  int tiles;  // of 16 rows

  // s_pairs [t, i] = -c[t, i] <x_t, y_i>, i <= t
  template <int DEPTH, class Place>
  __device__ __forceinline__ void pairs(const S* s_x, const S* s_y, int stride, Place place) const {
    visit_pair_tiles(tiles, [&](int row, int column) {
      float sums[4] = {};
      add_pairs<DEPTH>(sums, s_x, s_y, row, column, stride, place);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = row + group_of() + 8 * i, first = column + 2 * pair_of();
        float value[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool seen = first + j <= t && t < count;
          value[j] = seen ? -coefficients.s_c[t * PAIR_ROW + first + j] * sums[2 * i + j] : 0.0f;
        }
        word_at(shared.s_pairs + t * PAIR_ROW + first) = two(value[0], value[1]);
      }
    });
  }

  // sums [16, 8] += s_pairs [16 rows from `row`, tokens] times 8 columns of delta, which is at p + token * stride.
  __device__ __forceinline__ void add_seen_one_by_one(float (&sums)[4], int row, const S* p, int stride) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = row + group_of() + i / 2 * 8, column = 2 * pair_of() + i % 2;
      for (int token = 0; token <= t && token < count; ++token) {
        sums[i] += widen(shared.s_pairs[t * PAIR_ROW + token]) * widen(p[token * stride + column]);
      }
    }
  }

  // h of this warp's units
  __device__ __forceinline__ void hidden(const Layer& w1) const {
    S* s_h = shared.s_h + warp_of() * WARP_TILE;
#pragma unroll 1
    for (int row = 0; row < 16 * tiles; row += 16) {
      HiddenSums a;
      clear(a);
      w1.add_product(a, s_k, row);
      visit_pairs(a, [&](float x, float y, int r, int unit) {
        word_at(s_h + (row + r) * UNIT_ROW + unit) = two(silu(x), silu(y));
      });
    }
  }

  // delta2 from the sums of h W2', of which this block has a part.
  __device__ __forceinline__ void errors(OutputSums& sums, bool l2) const {
#if BLOCKS > 1
    if (l2) exchange(sums, shared.partial(false));
#endif
    visit_outputs(tiles, [&](int tile, int row, int channel) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = (row + group_of() + 8 * i) * CHANNEL_ROW + channel + 2 * pair_of();
        const uint32_t k = word_at(s_k + at), v = word_at(s_v + at);
        const float x = l2 ? low_of(k) + sums[tile][2 * i] : 0.0f, y = l2 ? high_of(k) + sums[tile][2 * i + 1] : 0.0f;
        word_at(shared.s_delta2 + at) = two(x - low_of(v), y - high_of(v));
      }
    });
  }

#if BLOCKS > 1
  // The blocks' parts, added in the order of their ranks.
  __device__ __forceinline__ void exchange(OutputSums& sums, float* s_partial) const {
    const auto places = [&](auto visit) {
      visit_outputs(tiles, [&](int tile, int row, int channel) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          visit(sums[tile][2 * i], sums[tile][2 * i + 1],
                (row + group_of() + 8 * i) * PARTIAL_ROW + channel + 2 * pair_of());
        }
      });
    };
    places([&](float& x, float& y, int at) { *reinterpret_cast<float2*>(s_partial + at) = make_float2(x, y); });
    cluster_barrier();
    places([&](float& x, float& y, int) { x = y = 0; });
#pragma unroll 1
    for (int rank = 0; rank < BLOCKS; ++rank) {
      const float* s_other = cluster_map(s_partial, rank);
      places([&](float& x, float& y, int at) {
        const float2 part = *reinterpret_cast<const float2*>(s_other + at);
        x += part.x, y += part.y;
      });
    }
  }
#endif

  // delta1 of this warp's units; whether all of it is finite.
  __device__ __forceinline__ bool hidden_errors(const Layer& w1, const Layer& w2) const {
    S* s_delta1 = shared.s_delta1 + warp_of() * WARP_TILE;
    bool all = true;
#pragma unroll 1
    for (int row = 0; row < 16 * tiles; row += 16) {
      HiddenSums a, below;
      clear(a);
      w1.add_product(a, s_k, row);
      clear(below);
      w2.add_product(below, shared.s_delta2, row);
#pragma unroll
      for (int tile = 0; tile < 2 * UNIT_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) below[tile][i] *= silu_slope(a[tile][i]);
      }
      visit_pairs(below, [&](float x, float y, int r, int unit) {
        const uint32_t word = two(x, y);
        all = all && finite(low_of(word)) && finite(high_of(word));
        word_at(s_delta1 + (row + r) * UNIT_ROW + unit) = word;
      });
    }
    __syncwarp();
    return __all_sync(~0u, all);
  }

  // H of this warp's units
  __device__ __forceinline__ void hidden_after(const Layer& w1, const Layer& s1, bool all_finite) const {
    const S* s_delta1 = shared.s_delta1 + warp_of() * WARP_TILE;
    S* s_after = shared.s_after + warp_of() * WARP_TILE;
#pragma unroll 1
    for (int row = 0; row < 16 * tiles; row += 16) {
      HiddenSums sums;
      clear(sums);
      w1.add_product(sums, s_q, row);
      const float b[2] = {coefficients.s_b[row + group_of()], coefficients.s_b[row + group_of() + 8]};
      scale(sums, b);
      if constexpr (MOMENTUM) {
        HiddenSums old;
        clear(old);
        s1.add_product(old, s_q, row);
        const float g[2] = {coefficients.s_g[row + group_of()], coefficients.s_g[row + group_of() + 8]};
#pragma unroll
        for (int tile = 0; tile < 2 * UNIT_TILES; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[tile][i] += g[i / 2] * old[tile][i];
        }
      }
      if (all_finite) {
#pragma unroll 1
        for (int token = 0; token <= row; token += 16) {
          uint32_t a[4];
          rows_of(a, shared.s_pairs + row * PAIR_ROW + token, PAIR_ROW);
#pragma unroll
          for (int m = 0; m < UNIT_TILES; ++m) {
            uint32_t b[4];
            along_16_rows(b, s_delta1 + token * UNIT_ROW + 16 * m, UNIT_ROW);
            multiply(sums[2 * m], a, b[0], b[1]);
            multiply(sums[2 * m + 1], a, b[2], b[3]);
          }
        }
      } else {
#pragma unroll
        for (int tile = 0; tile < 2 * UNIT_TILES; ++tile) {
          add_seen_one_by_one(sums[tile], row, s_delta1 + 8 * tile, UNIT_ROW);
        }
      }
      visit_pairs(sums, [&](float x, float y, int r, int unit) {
        word_at(s_after + (row + r) * UNIT_ROW + unit) = two(silu(x), silu(y));
      });
    }
  }
  static __device__ __forceinline__ void scale(HiddenSums& sums, const float (&by)[2]) {
#pragma unroll
    for (auto& tile : sums) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] *= by[i / 2];
    }
  }

  // layer -= (factor x)' y
  __device__ __forceinline__ void learn(Layer& layer, const S* s_x, const S* s_y, const float* s_factor) const {
    add_outer(layer, s_x, s_y, s_factor, -1, tiles);
  }
  __device__ __forceinline__ void learn(Layer& w, Layer& s, const S* s_x, const S* s_y) const {
    const float b = coefficients.s_end[0], g = coefficients.s_end[1], p = coefficients.s_end[2];
#pragma unroll
    for (int m = 0; m < UNIT_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = w.sum[m][n][i];
          weight *= b;
          if constexpr (MOMENTUM) {
            weight += g * s.sum[m][n][i];
            s.sum[m][n][i] *= p;
          }
        }
      }
    }
    learn(w, s_x, s_y, coefficients.s_last_c);
    if constexpr (MOMENTUM) learn(s, s_x, s_y, coefficients.s_last_m);
  }

  // O from the sums of b (H W2') + g (H S2') of this block's channels; `o` points at the chunk's first token.
  __device__ __forceinline__ void output(OutputSums& sums, bool all_finite, S* o, int64_t stride) const {
    visit_outputs(tiles, [&](int tile, int row, int channel) {
      if (all_finite) {
#pragma unroll 1
        for (int token = 0; token <= row; token += 16) {
          uint32_t a[4], b[2];
          rows_of(a, shared.s_pairs + row * PAIR_ROW + token, PAIR_ROW);
          ldmatrix_x2_transposed(b, shared.s_delta2 + (token + lane_of() % 16) * CHANNEL_ROW + channel);
          multiply(sums[tile], a, b[0], b[1]);
        }
      } else {
        add_seen_one_by_one(sums[tile], row, shared.s_delta2 + channel, CHANNEL_ROW);
      }
    });
#if BLOCKS > 1
    exchange(sums, shared.partial(true));
#endif
    visit_outputs(tiles, [&](int tile, int row, int channel) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = row + group_of() + 8 * i, at = channel + 2 * pair_of();
        if (t >= count || t % BLOCKS != block_rank()) continue;
        const uint32_t q = word_at(s_q + t * CHANNEL_ROW + at);
        word_at(o + t * stride + at) = two(low_of(q) + sums[tile][2 * i], high_of(q) + sums[tile][2 * i + 1]);
      }
    });
  }
};

// ---- all chunks

//   p_q, p_k, p_v [B, T, H, D] of any strides, rows at multiples of 16 bytes · p_o [B, T, H, D] or null · p_lr, p_decay,
//   p_momentum [B, T, H], the last two or null · p_w1 [B, H, F, D], p_w2 [B, H, D, F], p_s1, p_s2 alike or null
//   p_states [B, H, segments, W1 | W2 | S1 | S2] or null: weights before every `segment` chunks, S only where MOMENTUM
//   p_new_w1, ..: the weights after the last token, or null
#if BLOCKS > 1
CLUSTER_KERNEL(neural_memory_forward, THREADS, BLOCKS)
#else
KERNEL(neural_memory_forward, THREADS)
#endif
(const S* p_q, const S* p_k, const S* p_v, const float* p_lr, const float* p_decay, const float* p_momentum,
 const float* p_w1, const float* p_w2, const float* p_s1, const float* p_s2, S* p_o, float* p_new_w1, float* p_new_w2,
 float* p_new_s1, float* p_new_s2, float* p_states, int64_t T, int64_t tokens, int64_t H, int64_t C, int64_t window,
 int64_t segment, int64_t stride_q_b, int64_t stride_q_t, int64_t stride_q_h, int64_t stride_k_b, int64_t stride_k_t,
 int64_t stride_k_h, int64_t stride_v_b, int64_t stride_v_t, int64_t stride_v_h, bool l2) {
  SHARED_DYNAMIC(char, p_shared);
  const Shared shared(p_shared);
  const Coefficients coefficients(p_shared);
  const int64_t item = blockIdx.x / BLOCKS, b = item / H, h = item % H;
  Sources* s_sources = take<Sources>(p_shared, 1);
  if (threadIdx.x == 0) {
    const int64_t gate = b * T * H + h;
    *s_sources = {{p_q + b * stride_q_b + h * stride_q_h, stride_q_t},
                  {p_k + b * stride_k_b + h * stride_k_h, stride_k_t},
                  {p_v + b * stride_v_b + h * stride_v_h, stride_v_t},
                  p_lr + gate,
                  p_decay == nullptr ? nullptr : p_decay + gate,
                  p_momentum == nullptr ? nullptr : p_momentum + gate,
                  H};
  }
  __syncthreads();
  Gates gates;
  const int64_t chunks = (tokens + C - 1) / C;
  // Of this warp's first hidden channel.
  const int64_t unit = block_rank() * BLOCK_UNITS + warp_of() * UNITS, matrix = int64_t(HIDDEN) * D;
  const int64_t first = item * matrix + unit * D, second = item * matrix + unit;

  Layer w1, w2, s1, s2;  // the last two only where MOMENTUM
  w1.load(p_w1 + first, D, 1);
  w2.load(p_w2 + second, 1, HIDDEN);
  w2.copy_to(shared.s_w2);
  if constexpr (MOMENTUM) {
    if (p_s1 != nullptr) {
      s1.load(p_s1 + first, D, 1);
      s2.load(p_s2 + second, 1, HIDDEN);
    } else {
      s1.fill(0);
      s2.fill(0);
    }
    s2.copy_to(shared.s_s2);
  }

  const auto fetch = [&](int64_t chunk) {
    if (chunk < chunks) {
      const int count = int(min(C, tokens - chunk * C)), padded = (count + 15) / 16 * 16;
      const Sources& from = *s_sources;
      from.k.fetch(shared.tokens(chunk, 1), chunk * C, count, padded);
      from.v.fetch(shared.tokens(chunk, 2), chunk * C, count, padded);
      from.q.fetch(shared.tokens(chunk, 0), chunk * C, count, padded);
      gates.fetch(from.p_lr, from.p_decay, from.p_momentum, from.gate_stride, chunk * C, count);
    }
    cp_async_commit();
  };
  fetch(0);
#pragma unroll 1
  for (int64_t index = 0; index < chunks; ++index) {
    const int count = int(min(C, tokens - index * C));
    const Chunk chunk = {
        shared, coefficients,     shared.tokens(index, 0), shared.tokens(index, 1), shared.tokens(index, 2),
        count,  (count + 15) / 16};
    if (p_states != nullptr && index % segment == 0) {
      const int64_t parts = MOMENTUM ? 4 : 2, segments = (chunks + segment - 1) / segment;
      float* p_state = p_states + (item * segments + index / segment) * parts * matrix;
      w1.save(p_state + unit * D, D, 1);
      w2.save(p_state + matrix + unit, 1, HIDDEN);
      if constexpr (MOMENTUM) {
        s1.save(p_state + 2 * matrix + unit * D, D, 1);
        s2.save(p_state + 3 * matrix + unit, 1, HIDDEN);
      }
    }
    coefficients.put(gates);
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (BUFFERS == 2) fetch(index + 1);

    coefficients.compute(count, 16 * chunk.tiles, window);
    chunk.hidden(w1);
    __syncthreads();

    OutputSums sums;
    clear(sums);
    if (l2) contract(sums, shared.s_h, shared.s_w2, chunk.tiles);
    chunk.errors(sums, l2);
    chunk.pairs<D>(chunk.s_q, chunk.s_k, CHANNEL_ROW, channel_place);
    block_or_cluster_barrier();

    const bool finite1 = chunk.hidden_errors(w1, w2);
    if (p_o != nullptr) chunk.hidden_after(w1, s1, finite1);
    chunk.learn(w1, s1, shared.s_delta1, chunk.s_k);
    chunk.learn(w2, s2, shared.s_h, shared.s_delta2);
    if (index + 1 == chunks && p_new_w1 != nullptr) {  // registers are not read any more
      w1.save(p_new_w1 + first, D, 1);
      w2.save(p_new_w2 + second, 1, HIDDEN);
      if constexpr (!MOMENTUM) {  // S of the chunk alone
        w1.fill(0);
        chunk.learn(w1, shared.s_delta1, chunk.s_k, coefficients.s_last_m);
        w2.fill(0);
        chunk.learn(w2, shared.s_h, shared.s_delta2, coefficients.s_last_m);
      }
      (MOMENTUM ? s1 : w1).save(p_new_s1 + first, D, 1);
      (MOMENTUM ? s2 : w2).save(p_new_s2 + second, 1, HIDDEN);
    }
    __syncthreads();

    if (p_o != nullptr) {
      chunk.pairs<BLOCK_UNITS>(shared.s_after, shared.s_h, UNIT_ROW, unit_place);
      bool finite2 = true;
      for (int i = this_thread(); i < 16 * chunk.tiles * (D / 2); i += THREADS) {
        const uint32_t word = word_at(shared.s_delta2 + i / (D / 2) * CHANNEL_ROW + i % (D / 2) * 2);
        finite2 = finite2 && finite(low_of(word)) && finite(high_of(word));
      }
      finite2 = __syncthreads_and(finite2);

      clear(sums);
      contract(sums, shared.s_after, shared.s_w2, chunk.tiles);
      visit_outputs(chunk.tiles, [&](int tile, int row, int) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] *= coefficients.s_b[row + group_of() + i / 2 * 8];
      });
      if constexpr (MOMENTUM) {
        OutputSums old;
        clear(old);
        contract(old, shared.s_after, shared.s_s2, chunk.tiles);
        visit_outputs(chunk.tiles, [&](int tile, int row, int) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[tile][i] += coefficients.s_g[row + group_of() + i / 2 * 8] * old[tile][i];
        });
      }
      chunk.output(sums, finite2, p_o + ((b * T + index * C) * H + h) * D, H * D);
    }
    block_or_cluster_barrier();

    if (index + 1 == chunks) break;
    w2.copy_to(shared.s_w2);
    if constexpr (MOMENTUM) s2.copy_to(shared.s_s2);
    if constexpr (BUFFERS == 1) fetch(index + 1);
  }
}
EXPORT(neural_memory_forward)
