// What the CUDA kernels of the recurrent cells share: a block owns one head for a few batch rows and walks their steps.
//
//   forward    y[gate, unit, row] = sum_k r[gate, unit, k] h[k, row]                      then Cell::forward
//   backward   a[unit, row] = sum_{gate, k} r[gate, k, unit] dy[gate, k, row]             then Cell::backward
//
// The head's weights stay in the block: in registers as far as K_REGS says, the others in shared memory, in the order
// in which lanes read them. A step's input (h, or dy) lies in one of two buffers in shared memory: while all warps read
// one they write the next step's into the other, so a step has one barrier. Nothing passes between blocks.
//
// A lane gets all gates of its units and rows from the product (device_product.h), and holds their states and biases.
// Units past D and rows past B are never stored.
//
// Letters: B batch, T time, H heads, D units of a head, G gates. Constants:
//   STORAGE of sequences and weights · DIM the units D · THREADS 32 for each group of 8 LANE_UNITS units
//   VEC units an access of global memory: LANE_UNITS, or 1 where addresses are odd · TILES of 8 rows a block
//   K_REGS steps of the product's sum with weights in registers · SPLIT independent sums, so that one need not wait
//   for the other · RING steps that a lane reads ahead · TRAIN 1: the forward stores what the backward reads
//   BACKWARD 1 or 0
#pragma once

#include "rnn/device_product.h"

// ------------------------------------------------------------------------------------------------ rows and sequences

// Pair (row, step) of a contiguous sequence [B, T, .., H, D], or of one with time first, is number row * b + time * t.
struct Pairs {
  int64_t b, t;
};

// The batch rows of this lane.
struct Rows {
  int first;    // of the block
  int longest;  // steps of the block's longest row
  int length[LANE_ROWS];
  bool reverse;

  __device__ __forceinline__ Rows(const int64_t* p_lengths, int64_t block, int64_t B, int64_t T, bool reverse)
      : first(int(block) * 8 * TILES), longest(0), reverse(reverse) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) length[i] = length_of(p_lengths, row(i), B, T);
    for (int i = 0; i < 8 * TILES; ++i) longest = max(longest, length_of(p_lengths, first + i, B, T));
  }
  // Nothing checks the values on a GPU: clamped, they may give wrong results but never a wrong address.
  static __device__ __forceinline__ int length_of(const int64_t* p_lengths, int row, int64_t B, int64_t T) {
    if (row >= B) return 0;
    if (p_lengths == nullptr) return int(T);
    const int64_t length = p_lengths[row];
    return int(length < 0 ? 0 : length > T ? T : length);
  }
  __device__ __forceinline__ int row(int i) const { return first + i / 2 * 8 + 2 * lane_pair() + i % 2; }
  __device__ __forceinline__ int time(int i, int step) const { return reverse ? length[i] - 1 - step : step; }
  __device__ __forceinline__ int64_t pair(const Pairs& pairs, int i, int step) const {
    return row(i) * pairs.b + time(i, step) * pairs.t;
  }
};

// What a lane reads of a step goes into slots of its own, RING steps ahead: no barrier, and no registers.
//   [RING][READS][LANE_ROWS][VECS][THREADS], so that a warp's accesses are next to each other
template <int READS>
struct Slots {
  Pack<S, VEC>* s_own;

  static constexpr int WORDS = RING * READS * LANE_ROWS * LANE_UNITS * sizeof(S) / sizeof(uint4);  // of a thread

  __device__ __forceinline__ explicit Slots(char*& p_shared)
      : s_own(reinterpret_cast<Pack<S, VEC>*>(p_shared) + threadIdx.x) {
    p_shared += sizeof(Pack<S, VEC>) * RING * READS * LANE_ROWS * VECS * THREADS;
  }
  __device__ __forceinline__ Pack<S, VEC>& slot(int turn, int read, int i, int v) const {
    return s_own[(((turn * READS + read) * LANE_ROWS + i) * VECS + v) * THREADS];
  }
  // Units of this lane, of which p is the first; visible after cp_async_wait. cp.async cannot move 2 bytes.
  __device__ __forceinline__ void fetch(int turn, int read, int i, const S* p) const {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (first_unit() + v * VEC >= DIM) continue;
      Pack<S, VEC>& to = slot(turn, read, i, v);
      if constexpr (sizeof(to) == 2) to = load<S, VEC>(p + v * VEC);
      if constexpr (sizeof(to) == 4) cp_async_4(&to, p + v * VEC);
      if constexpr (sizeof(to) == 8) cp_async_8(&to, p + v * VEC);
    }
  }
  __device__ __forceinline__ Number read(int turn, int read, int i, int u) const {
    return widen(slot(turn, read, i, u / VEC), u % VEC);
  }
};

// Units of this lane to global memory, of which p is the first.
__device__ __forceinline__ void store_units(S* p, const Number (&value)[LANE_UNITS]) {
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    if (first_unit() + v * VEC >= DIM) continue;
    Pack<S, VEC> pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack[i] = narrow<S>(value[v * VEC + i]);
    store<S, VEC>(p + v * VEC, pack);
  }
}

// States [B, H, D]; null: `absent`.
__device__ __forceinline__ Number initial_state(const Number* p, int64_t place, Number absent) {
  return p == nullptr ? absent : p[place];
}

// The weights r [G, H, D, D] of one head, of any strides.
struct Weights {
  const S* p;
  int64_t g, out, in;

  __device__ __forceinline__ S operator()(int gate, int unit, int first, int k) const {
    return unit < DIM && first + k < DIM ? p[gate * g + unit * out + (first + k) * in] : S{};
  }
};

// Where a value that the backward reads lies.
struct Source {
  enum Tensor { CACHE, KEPT, OUTPUT };  // p_cache [B, T, CACHES, H, D], p_kept and p_h [B, T, H, D]
  Tensor tensor;
  int index;   // in CACHE
  int before;  // the state that is read one step before, where the first step has the initial one; or -1
};

// ------------------------------------------------------------------------------------------------ forward

#if !BACKWARD

// A cell has GATES, STATES (h first), CACHES values that it keeps for the backward, beside one more where KEEPS, and
//   absent(state)                               what a missing initial state is
//   forward(wx, y, state, cache, relu)          new states from those before; cache [CACHES + KEEPS]
struct Forward {
  const S* p_wx;  // [B, T, G, H, D]
  const S* p_r;
  const Number* p_b;           // [G, H, D] or null
  const Number* p_initial[4];  // [B, H, D] or null
  const int64_t* p_lengths;    // [B] or null
  S* p_h;                      // [B, T, H, D]
  Number* p_final[4];          // [B, H, D]
  S* p_cache;                  // [B, T, CACHES, H, D]
  S* p_kept;                   // [B, T, H, D]
  int64_t B, T, H;
  int64_t stride_wx_b, stride_wx_t, stride_wx_g, stride_wx_h;
  int64_t stride_r_g, stride_r_h, stride_r_out, stride_r_in;
  Pairs pairs;
  bool reverse, relu;
};

template <class Cell>
__device__ __forceinline__ void forward(const Forward& a) {
  constexpr int G = Cell::GATES, N = Cell::STATES, KEPT = Cell::CACHES + Cell::KEEPS;
  using Multiplier = Product<G, PADDED>;
  using Input = typename Multiplier::Input;
  SHARED_DYNAMIC(char, p_shared);
  Input* const s_h = reinterpret_cast<Input*>(p_shared);  // [2][INPUTS]
  p_shared += 2 * Multiplier::INPUTS * sizeof(Input);
  const int64_t head = blockIdx.x % a.H, width = a.H * DIM;
  const Rows rows(a.p_lengths, blockIdx.x / a.H, a.B, a.T, a.reverse);
  const int unit = first_unit();
  const int64_t place = head * DIM + unit;  // of the lane's first unit among all

  Multiplier product;
  product.template load<Slots<G>::WORDS>(
      p_shared, Weights{a.p_r + head * a.stride_r_h, a.stride_r_g, a.stride_r_out, a.stride_r_in});
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * Multiplier::INPUTS; i += THREADS) s_h[i] = Input{};
  const Slots<G> slots(p_shared);
  const auto fetch = [&](int step) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      if (step >= rows.length[i]) continue;
      const S* const p =
          a.p_wx + rows.row(i) * a.stride_wx_b + rows.time(i, step) * a.stride_wx_t + head * a.stride_wx_h + unit;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) slots.fetch(step % RING, gate, i, p + gate * a.stride_wx_g);
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < RING; ++step) fetch(step);

  Number bias[G][LANE_UNITS], state[LANE_ROWS][LANE_UNITS][N];
  __syncthreads();  // the zeros lie
#pragma unroll
  for (int u = 0; u < LANE_UNITS; ++u) {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      bias[gate][u] = a.p_b != nullptr && unit + u < DIM ? a.p_b[gate * width + place + u] : Number(0);
    }
  }
#pragma unroll
  for (int i = 0; i < LANE_ROWS; ++i) {
    Number h[LANE_UNITS];
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      const bool inside = rows.row(i) < a.B && unit + u < DIM;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        state[i][u][n] =
            inside ? initial_state(a.p_initial[n], rows.row(i) * width + place + u, Cell::absent(n)) : Number(0);
      }
      h[u] = state[i][u][0];
    }
    Multiplier::put(s_h, i / 2, i % 2, unit, h);
  }
  __syncthreads();

  for (int step = 0; step < rows.longest; ++step) {
    Sums<G, PADDED> y;
    product.multiply(s_h + step % 2 * Multiplier::INPUTS, y);
    cp_async_wait<RING - 1>();
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      if (step >= rows.length[i] || unit >= DIM) continue;
      Number h[LANE_UNITS], kept[KEPT ? KEPT : 1][LANE_UNITS];
#pragma unroll
      for (int u = 0; u < LANE_UNITS; ++u) {
        Number wx[G], y_u[G], cache[KEPT ? KEPT : 1];
#pragma unroll
        for (int gate = 0; gate < G; ++gate) {
          wx[gate] = unit + u < DIM ? slots.read(step % RING, gate, i, u) : Number(0);
          y_u[gate] = y.value[i / 2][gate][u][i % 2] + bias[gate][u];
        }
        Cell::forward(wx, y_u, state[i][u], cache, a.relu);
        h[u] = unit + u < DIM ? state[i][u][0] : Number(0);
#pragma unroll
        for (int k = 0; k < KEPT; ++k) kept[k][u] = cache[k];
      }
      Multiplier::put(s_h + (step + 1) % 2 * Multiplier::INPUTS, i / 2, i % 2, unit, h);
      const int64_t pair = rows.pair(a.pairs, i, step);
      store_units(a.p_h + pair * width + place, h);
      if constexpr (TRAIN) {
#pragma unroll
        for (int k = 0; k < Cell::CACHES; ++k) {
          store_units(a.p_cache + (pair * Cell::CACHES + k) * width + place, kept[k]);
        }
        if constexpr (Cell::KEEPS) store_units(a.p_kept + pair * width + place, kept[Cell::CACHES]);
      }
    }
    fetch(step + RING);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < LANE_ROWS; ++i) {
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      if (rows.row(i) >= a.B || unit + u >= DIM) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) a.p_final[n][rows.row(i) * width + place + u] = state[i][u][n];
    }
  }
}

// The kernel of a cell: the same arguments for all cells, null where one has no such tensor.
#define CELL_KERNEL(cell, Cell)                                                                                      \
  KERNEL(cell##_forward, BOUNDS)                                                                                     \
  (const S* p_wx, const S* p_r, const Number* p_b, const Number* p_h0, const Number* p_c0, const Number* p_n0,       \
   const Number* p_m0, const int64_t* p_lengths, S* p_h, Number* p_h_n, Number* p_c_n, Number* p_n_n, Number* p_m_n, \
   S* p_cache, S* p_kept, int64_t B, int64_t T, int64_t H, int64_t stride_wx_b, int64_t stride_wx_t,                 \
   int64_t stride_wx_g, int64_t stride_wx_h, int64_t stride_r_g, int64_t stride_r_h, int64_t stride_r_out,           \
   int64_t stride_r_in, int64_t pair_b, int64_t pair_t, bool reverse, bool relu) {                                   \
    forward<Cell>({p_wx,                                                                                             \
                   p_r,                                                                                              \
                   p_b,                                                                                              \
                   {p_h0, p_c0, p_n0, p_m0},                                                                         \
                   p_lengths,                                                                                        \
                   p_h,                                                                                              \
                   {p_h_n, p_c_n, p_n_n, p_m_n},                                                                     \
                   p_cache,                                                                                          \
                   p_kept,                                                                                           \
                   B,                                                                                                \
                   T,                                                                                                \
                   H,                                                                                                \
                   stride_wx_b,                                                                                      \
                   stride_wx_t,                                                                                      \
                   stride_wx_g,                                                                                      \
                   stride_wx_h,                                                                                      \
                   stride_r_g,                                                                                       \
                   stride_r_h,                                                                                       \
                   stride_r_out,                                                                                     \
                   stride_r_in,                                                                                      \
                   {pair_b, pair_t},                                                                                 \
                   reverse,                                                                                          \
                   relu});                                                                                           \
  }                                                                                                                  \
  EXPORT(cell##_forward)

#else

// ------------------------------------------------------------------------------------------------ backward

// A cell has, beside the above, READS and
//   source(read)                                where to read it
//   begin(dstate, c_n, n_n)                     before the last step, with the final states 1 and 2 (sLSTM)
//   backward(read, e, dstate, dp, dy, relu)     dp is the gradient of wx, dy that of the product. dstate[0] is what
//                                               reaches the h before without the product, where CARRIES
//   finish(dstate, c_0, n_0)                    after the first step, with the initial states 1 and 2 (sLSTM)
struct Backward {
  const S* p_dh;              // [B, T, H, D] or null: zeros
  const Number* p_dfinal[4];  // [B, H, D] or null: zeros
  const S* p_r;
  const S* p_cache;
  const S* p_kept;
  const S* p_h;
  const Number* p_final[4];    // 1 and 2 of the sLSTM
  const Number* p_initial[4];  // [B, H, D] or null: zeros
  const int64_t* p_lengths;
  S* p_dwx;               // [B, T, G, H, D]
  S* p_dy;                // of the last gate [B, T, H, D], where it is not dwx's
  Number* p_dinitial[4];  // [B, H, D]
  int64_t B, T, H;
  int64_t stride_dh_b, stride_dh_t, stride_dh_h;
  int64_t stride_r_g, stride_r_h, stride_r_out, stride_r_in;
  Pairs pairs;
  Number grad_clip;  // negative: none
  bool reverse, relu;
};

// Input k of the product is gate k / PADDED of unit k % PADDED.
struct TransposedWeights {
  Weights weights;

  __device__ __forceinline__ S operator()(int, int unit, int first, int k) const {
    return weights(first / PADDED, first % PADDED + k, 0, unit);
  }
};

template <class Cell>
__device__ __forceinline__ void backward(const Backward& a) {
  constexpr int G = Cell::GATES, N = Cell::STATES, READS = Cell::READS;
  using Multiplier = Product<1, G * PADDED>;
  using Input = typename Multiplier::Input;
  SHARED_DYNAMIC(char, p_shared);
  Input* const s_dy = reinterpret_cast<Input*>(p_shared);  // [2][INPUTS]
  p_shared += 2 * Multiplier::INPUTS * sizeof(Input);
  const int64_t head = blockIdx.x % a.H, width = a.H * DIM;
  const Rows rows(a.p_lengths, blockIdx.x / a.H, a.B, a.T, a.reverse);
  const int unit = first_unit();
  const int64_t place = head * DIM + unit;

  Multiplier product;
  product.template load<Slots<READS + 1>::WORDS>(
      p_shared, TransposedWeights{{a.p_r + head * a.stride_r_h, a.stride_r_g, a.stride_r_out, a.stride_r_in}});
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * Multiplier::INPUTS; i += THREADS) s_dy[i] = Input{};
  const Slots<READS + 1> slots(p_shared);  // dh is the last
  const auto fetch = [&](int step, int turn) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      if (step < 0 || step >= rows.length[i]) continue;
      const int64_t pair = rows.pair(a.pairs, i, step), before = pair + (a.reverse ? a.pairs.t : -a.pairs.t);
#pragma unroll
      for (int k = 0; k < READS; ++k) {
        const Source source = Cell::source(k);
        if (source.before >= 0 && step == 0) continue;
        const int64_t from = source.before >= 0 ? before : pair;
        const S* const p = source.tensor == Source::CACHE  ? a.p_cache + (from * Cell::CACHES + source.index) * width
                           : source.tensor == Source::KEPT ? a.p_kept + from * width
                                                           : a.p_h + from * width;
        slots.fetch(turn, k, i, p + place);
      }
      if (a.p_dh != nullptr) {
        slots.fetch(
            turn, READS, i,
            a.p_dh + rows.row(i) * a.stride_dh_b + rows.time(i, step) * a.stride_dh_t + head * a.stride_dh_h + unit);
      }
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int turn = 0; turn < RING; ++turn) fetch(rows.longest - 1 - turn, turn);

  Number dstate[LANE_ROWS][LANE_UNITS][N];
  const auto state_place = [&](int i, int u) { return rows.row(i) * width + place + u; };
#pragma unroll
  for (int i = 0; i < LANE_ROWS; ++i) {
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      const bool inside = rows.row(i) < a.B && unit + u < DIM;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dstate[i][u][n] = inside ? initial_state(a.p_dfinal[n], state_place(i, u), 0) : Number(0);
      }
      if constexpr (N == 4) {
        if (inside && rows.length[i] > 0) {
          Cell::begin(dstate[i][u], a.p_final[1][state_place(i, u)], a.p_final[2][state_place(i, u)]);
        }
      }
    }
  }
  __syncthreads();  // zeros and weights lie

  // The gradient of the h that a step began with, from the product of that step's dy.
  const auto entering = [&](const Sums<1, G * PADDED>& sums, int i, int u) {
    Number value = sums.value[i / 2][0][u][i % 2];
    if constexpr (Cell::CARRIES) value += dstate[i][u][0];
    return a.grad_clip < 0 ? value : clamp(value, a.grad_clip);
  };

  int turn = 0;
  for (int step = rows.longest - 1; step >= 0; --step) {
    Sums<1, G * PADDED> sums;
    product.multiply(s_dy + (step + 1) % 2 * Multiplier::INPUTS, sums);
    cp_async_wait<RING - 1>();
    Input* const s_current = s_dy + step % 2 * Multiplier::INPUTS;
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      if (step >= rows.length[i] || unit >= DIM) continue;
      Number dp[G][LANE_UNITS], dy[G][LANE_UNITS];
#pragma unroll
      for (int u = 0; u < LANE_UNITS; ++u) {
        const bool inside = unit + u < DIM;
        Number read[READS];
#pragma unroll
        for (int k = 0; k < READS; ++k) {
          const int before = Cell::source(k).before;
          if (!inside) {
            read[k] = 0;
          } else if (before >= 0 && step == 0) {
            read[k] = initial_state(a.p_initial[before], state_place(i, u), 0);
          } else {
            read[k] = slots.read(turn, k, i, u);
          }
        }
        Number e = step + 1 == rows.length[i] ? dstate[i][u][0] : entering(sums, i, u);
        if (a.p_dh != nullptr && inside) e += slots.read(turn, READS, i, u);
        Number dp_u[G], dy_u[G];
        Cell::backward(read, e, dstate[i][u], dp_u, dy_u, a.relu);
#pragma unroll
        for (int gate = 0; gate < G; ++gate) {
          dp[gate][u] = dp_u[gate];
          dy[gate][u] = inside ? dy_u[gate] : Number(0);
        }
      }
      const int64_t pair = rows.pair(a.pairs, i, step);
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        store_units(a.p_dwx + (pair * G + gate) * width + place, dp[gate]);
        Multiplier::put(s_current, i / 2, i % 2, gate * PADDED + unit, dy[gate]);
      }
      if constexpr (Cell::CARRIES) store_units(a.p_dy + pair * width + place, dy[G - 1]);
    }
    fetch(step - RING, turn);
    turn = turn + 1 == RING ? 0 : turn + 1;
    __syncthreads();
  }

  Sums<1, G * PADDED> sums;
  product.multiply(s_dy, sums);
#pragma unroll
  for (int i = 0; i < LANE_ROWS; ++i) {
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      if (rows.row(i) >= a.B || unit + u >= DIM) continue;
      if (rows.length[i] > 0) {
        dstate[i][u][0] = entering(sums, i, u);
        if constexpr (N == 4) {
          Cell::finish(dstate[i][u], initial_state(a.p_initial[1], state_place(i, u), 0),
                       initial_state(a.p_initial[2], state_place(i, u), 0));
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) a.p_dinitial[n][state_place(i, u)] = dstate[i][u][n];
    }
  }
}

// The kernel of a cell: the same arguments for all cells, null where one has no such tensor. grad_clip: the bits of a
// double.
#define CELL_KERNEL(cell, Cell)                                                                                      \
  KERNEL(cell##_backward, BOUNDS)                                                                                    \
  (const S* p_dh, const Number* p_dh_n, const Number* p_dc_n, const Number* p_dn_n, const Number* p_dm_n,            \
   const S* p_r, const S* p_cache, const S* p_kept, const S* p_h, const Number* p_c_n, const Number* p_n_n,          \
   const Number* p_h0, const Number* p_c0, const Number* p_n0, const int64_t* p_lengths, S* p_dwx, S* p_dy,          \
   Number* p_dh0, Number* p_dc0, Number* p_dn0, Number* p_dm0, int64_t B, int64_t T, int64_t H, int64_t stride_dh_b, \
   int64_t stride_dh_t, int64_t stride_dh_h, int64_t stride_r_g, int64_t stride_r_h, int64_t stride_r_out,           \
   int64_t stride_r_in, int64_t pair_b, int64_t pair_t, int64_t grad_clip, bool reverse, bool relu) {                \
    backward<Cell>({p_dh,                                                                                            \
                    {p_dh_n, p_dc_n, p_dn_n, p_dm_n},                                                                \
                    p_r,                                                                                             \
                    p_cache,                                                                                         \
                    p_kept,                                                                                          \
                    p_h,                                                                                             \
                    {nullptr, p_c_n, p_n_n},                                                                         \
                    {p_h0, p_c0, p_n0},                                                                              \
                    p_lengths,                                                                                       \
                    p_dwx,                                                                                           \
                    p_dy,                                                                                            \
                    {p_dh0, p_dc0, p_dn0, p_dm0},                                                                    \
                    B,                                                                                               \
                    T,                                                                                               \
                    H,                                                                                               \
                    stride_dh_b,                                                                                     \
                    stride_dh_t,                                                                                     \
                    stride_dh_h,                                                                                     \
                    stride_r_g,                                                                                      \
                    stride_r_h,                                                                                      \
                    stride_r_out,                                                                                    \
                    stride_r_in,                                                                                     \
                    {pair_b, pair_t},                                                                                \
                    Number(__longlong_as_double(grad_clip)),                                                         \
                    reverse,                                                                                         \
                    relu});                                                                                          \
  }                                                                                                                  \
  EXPORT(cell##_backward)

#endif
