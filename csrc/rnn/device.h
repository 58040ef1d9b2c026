// What the CUDA kernels of the recurrent cells share: blocks own a head for a few batch rows and walk their steps.
//
//   forward    y[gate, unit, row] = sum_k r[gate, unit, k] h[k, row]                      then Cell::forward
//   backward   a[unit, row] = sum_{gate, k} r[gate, k, unit] dy[gate, k, row]             then Cell::backward
//
// One block owns a head, or BLOCKS of them, each some of its units with all their gates. The weights stay where they
// are: in registers, then in shared memory, and what neither holds is read from the second cache in every step
// (device_product.h). In the forward every block needs h of all units, and blocks hand it to each other; in the backward
// each computes from its own dy a part of all units' gradients, and hands those to the owners (device_exchange.h). A
// step's input lies in one of two buffers in shared memory, so that it is written while the other is read.
//
// A lane gets all gates of its units and rows from the product, and holds their states and biases. Units past D and rows
// past B are never stored.
//
// Letters: B batch, T time, H heads, D units of a head, G gates. Constants:
//   STORAGE of sequences and weights · DIM the units D · BACKWARD 1 or 0
//   TRAIN 1: the forward stores what the backward reads
//   EXCHANGE between the BLOCKS of a head: 0 one block, 1 a cluster, 2 through the second cache
//   UNIT_WARPS, K_WARPS: a block's warps, those that share its units times those that share a unit's sums
//   VEC units an access of global memory: LANE_UNITS, or 1 where addresses are odd · TILES of 8 rows a block
//   K_REGS, K_SHARED parts of the weights in registers and in shared memory · DIRECT 1: the others as r lies
//   SPLIT independent sums, so that one need not wait for the other · RING steps that a lane reads ahead
#pragma once

#include "rnn/device_exchange.h"
#include "rnn/sequences.h"

// ------------------------------------------------------------------------------------------------ rows and sequences

// The batch rows that this lane owns.
struct Rows {
  int first;    // of the team
  int longest;  // steps of its longest row
  int length[OWNED];
  bool reverse;

  __device__ __forceinline__ Rows(const int64_t* p_lengths, int64_t tile, int64_t B, int64_t T, bool reverse)
      : first(int(tile) * 8 * TILES), longest(0), reverse(reverse) {
#pragma unroll
    for (int i = 0; i < OWNED; ++i) length[i] = is_owner() ? steps_of(p_lengths, row(i), B, T) : 0;
    for (int i = 0; i < 8 * TILES; ++i) longest = max(longest, steps_of(p_lengths, first + i, B, T));
  }
  static __device__ __forceinline__ int steps_of(const int64_t* p_lengths, int row, int64_t B, int64_t T) {
    return row < B ? int(length_of(p_lengths, row, T)) : 0;
  }
  __device__ __forceinline__ int row(int i) const { return first + tile_row(owned_row(i)); }
  __device__ __forceinline__ bool inside(int i, int64_t B) const { return is_owner() && row(i) < B; }
  __device__ __forceinline__ int time(int i, int step) const { return reverse ? length[i] - 1 - step : step; }
  __device__ __forceinline__ int64_t pair(const Pairs& pairs, int i, int step) const {
    return row(i) * pairs.b + time(i, step) * pairs.t;
  }
};

// What a lane reads of a step goes into slots of its own, RING steps ahead: no barrier, and no registers.
//   [RING][READS][OWNED][VECS][OWNER_THREADS], so that a warp's accesses are next to each other
template <int READS>
struct Slots {
  static constexpr bool HALVES = VEC * sizeof(S) == 2;  // of words, the least that cp.async moves
  using Slot = Pack<S, HALVES ? 2 : VEC>;
  static constexpr int COUNT = RING * READS * OWNED * VECS * OWNER_THREADS;
  static constexpr int BYTES = COUNT * sizeof(Slot);

  Slot* s_own;

  __device__ __forceinline__ explicit Slots(char*& p_shared) : s_own(take<Slot>(p_shared, COUNT) + threadIdx.x) {}

  __device__ __forceinline__ Slot& slot(int turn, int read, int i, int v) const {
    return s_own[(((turn * READS + read) * OWNED + i) * VECS + v) * OWNER_THREADS];
  }
  // `units` of this lane, of which p is the first; visible after cp_async_wait.
  __device__ __forceinline__ void fetch(int turn, int read, int i, const S* p, int units) const {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (v * VEC >= units) continue;
      Slot& to = slot(turn, read, i, v);
      if constexpr (HALVES) {
        cp_async_2_of_word(&to, p + v);
      } else if constexpr (sizeof(to) == 4) {
        cp_async_4(&to, p + v * VEC);
      } else {
        cp_async_8(&to, p + v * VEC);
      }
    }
  }
  // Unit u of those that were fetched from p.
  __device__ __forceinline__ Number read(int turn, int read, int i, int u, const S* p) const {
    if constexpr (HALVES) return widen(slot(turn, read, i, u)[reinterpret_cast<uintptr_t>(p + u) / 2 % 2]);
    return widen(slot(turn, read, i, u / VEC), u % VEC);
  }
};

// `units` of this lane to global memory, of which p is the first.
__device__ __forceinline__ void store_units(S* p, const Number (&value)[LANE_UNITS], int units) {
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    if (v * VEC >= units) continue;
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

  __device__ __forceinline__ S at(int gate, int unit, int k) const {
    return unit < DIM && k < DIM ? p[gate * g + unit * out + k * in] : S{};
  }
};

// Fragments of a lane that fit in shared memory while they go to registers: in all that the block has, and one part.
template <class Multiplier>
constexpr int stage(int others) {
  constexpr int FRAGMENT = sizeof(typename Multiplier::Fragment) * THREADS;
  const int held = (Multiplier::HELD - Multiplier::KEPT) * Multiplier::CHUNKED + others / FRAGMENT;
  return held < Multiplier::CHUNKED ? Multiplier::CHUNKED : held;
}

// ------------------------------------------------------------------------------------------------ forward

#if !BACKWARD

// Output `gate` of a unit of the block, of which `unit` is the first; of input `k` and on.
struct GateWeights {
  Weights weights;
  int unit, k;

  __device__ __forceinline__ S operator()(int gate, int own, int first, int each) const {
    return weights.at(gate, unit + own, k + first + each);
  }
};

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
  void* p_workspace;    // weights that are streamed, in parts: see device_product.h
  uint64_t* p_packets;  // zeros
  int64_t first;        // teams in earlier launches
};

template <class Cell>
__device__ __forceinline__ void forward(const Forward& a) {
  constexpr int G = Cell::GATES, N = Cell::STATES, KEPT = Cell::CACHES + Cell::KEEPS;
  constexpr int SHARE = (PADDED / PART + K_WARPS - 1) / K_WARPS * PART;  // of the sum, by one of the K_WARPS
  using Multiplier = Product<G, G, SHARE, SHARE * K_WARPS>;
  using Fragment = typename Multiplier::Fragment;
  using Exchange = Gather<Multiplier>;
  SHARED_DYNAMIC(char, p_shared);
  const Team team(a.first);
  const int64_t head = team.index % a.H, width = a.H * DIM;
  const Rows rows(a.p_lengths, team.index / a.H, a.B, a.T, a.reverse);
  const int unit = team.rank * UNITS + own_unit(), units = DIM - unit;
  const int64_t place = head * DIM + unit;  // of the lane's first unit among all

  Multiplier product;
  const GateWeights weights{
      {a.p_r + head * a.stride_r_h, a.stride_r_g, a.stride_r_out, a.stride_r_in}, team.rank * UNITS, k_warp() * SHARE};
  product.template load<stage<Multiplier>(Slots<G>::BYTES + Sum<G>::BYTES + Exchange::BYTES)>(
      p_shared, static_cast<Fragment*>(a.p_workspace) + int64_t(blockIdx.x) * Multiplier::STREAMED * G * THREADS,
      weights);
  __syncthreads();
  const Slots<G> slots(p_shared);
  const Sum<G> sum(p_shared);
  const Exchange exchange(p_shared, a.p_packets, team);
  const auto wx_of = [&](int i, int step) {
    return a.p_wx + rows.row(i) * a.stride_wx_b + rows.time(i, step) * a.stride_wx_t + head * a.stride_wx_h + unit;
  };
  const auto fetch = [&](int step) {
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
      if (step >= rows.length[i]) continue;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        slots.fetch(step % RING, gate, i, wx_of(i, step) + gate * a.stride_wx_g, units);
      }
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < RING; ++step) fetch(step);

  Number bias[G][LANE_UNITS], state[OWNED][LANE_UNITS][N];
#pragma unroll
  for (int u = 0; u < LANE_UNITS; ++u) {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      bias[gate][u] = a.p_b != nullptr && u < units ? a.p_b[gate * width + place + u] : Number(0);
    }
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        state[i][u][n] = rows.inside(i, a.B) && u < units
                             ? initial_state(a.p_initial[n], rows.row(i) * width + place + u, Cell::absent(n))
                             : Number(0);
      }
    }
  }
  exchange.template begin<SHARE * K_WARPS>([&](int row, int k) {
    const bool given = a.p_initial[0] != nullptr && k < DIM && rows.first + row < a.B;
    return narrow<typename Exchange::Input>(given ? a.p_initial[0][(rows.first + row) * width + head * DIM + k]
                                                  : Number(0));
  });

  for (int step = 0; step < rows.longest; ++step) {
    Sums<G> part;
    product.template multiply<0>(Multiplier::from(exchange.wait(step), k_warp() * SHARE), weights, part);
    Number y[OWNED][G][LANE_UNITS];
    sum.add(part, y);
    if (!is_owner()) continue;
    cp_async_wait<RING - 1>();
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
      const bool valid = step < rows.length[i] && units > 0;
      Number h[LANE_UNITS], kept[KEPT ? KEPT : 1][LANE_UNITS];
#pragma unroll
      for (int u = 0; u < LANE_UNITS; ++u) {
        // No branch: the cells of a lane are computed side by side.
        const bool own = valid && u < units;
        Number wx[G], y_u[G], cache[KEPT ? KEPT : 1], next[N];
#pragma unroll
        for (int n = 0; n < N; ++n) next[n] = state[i][u][n];
#pragma unroll
        for (int gate = 0; gate < G; ++gate) {
          wx[gate] = slots.read(step % RING, gate, i, u, wx_of(i, step) + gate * a.stride_wx_g);
          y_u[gate] = y[i][gate][u] + bias[gate][u];
        }
        Cell::forward(wx, y_u, next, cache, a.relu);
#pragma unroll
        for (int n = 0; n < N; ++n) state[i][u][n] = own ? next[n] : state[i][u][n];
        h[u] = own ? next[0] : Number(0);
#pragma unroll
        for (int k = 0; k < KEPT; ++k) kept[k][u] = cache[k];
      }
      if (step + 1 < rows.longest) exchange.put(step + 1, owned_row(i), h);
      if (!valid) continue;
      const int64_t pair = rows.pair(a.pairs, i, step);
      store_units(a.p_h + pair * width + place, h, units);
      if constexpr (TRAIN) {
#pragma unroll
        for (int k = 0; k < Cell::CACHES; ++k) {
          store_units(a.p_cache + (pair * Cell::CACHES + k) * width + place, kept[k], units);
        }
        if constexpr (Cell::KEEPS) store_units(a.p_kept + pair * width + place, kept[Cell::CACHES], units);
      }
    }
    fetch(step + RING);
  }

#pragma unroll
  for (int i = 0; i < OWNED; ++i) {
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      if (!rows.inside(i, a.B) || u >= units) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) a.p_final[n][rows.row(i) * width + place + u] = state[i][u][n];
    }
  }
  if constexpr (CLUSTERED) cluster_barrier();  // nobody leaves while others may still write here
}

// The kernel of a cell: the same arguments for all cells, null where one has no such tensor.
#define CELL_KERNEL(cell, Cell)                                                                                      \
  TEAM_KERNEL(cell##_forward)                                                                                        \
  (const S* p_wx, const S* p_r, const Number* p_b, const Number* p_h0, const Number* p_c0, const Number* p_n0,       \
   const Number* p_m0, const int64_t* p_lengths, S* p_h, Number* p_h_n, Number* p_c_n, Number* p_n_n, Number* p_m_n, \
   S* p_cache, S* p_kept, int64_t B, int64_t T, int64_t H, int64_t stride_wx_b, int64_t stride_wx_t,                 \
   int64_t stride_wx_g, int64_t stride_wx_h, int64_t stride_r_g, int64_t stride_r_h, int64_t stride_r_out,           \
   int64_t stride_r_in, int64_t pair_b, int64_t pair_t, bool reverse, bool relu, void* p_workspace,                  \
   uint64_t* p_packets, int64_t first) {                                                                             \
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
                   relu,                                                                                             \
                   p_workspace,                                                                                      \
                   p_packets,                                                                                        \
                   first});                                                                                          \
  }                                                                                                                  \
  EXPORT(cell##_forward)

#else

// ------------------------------------------------------------------------------------------------ backward

// A cell has, beside the above, READS and
//   source(read)                                where to read it
//   begin(dstate, c_n, n_n)                     before the last step, with the final states 1 and 2 (sLSTM)
//   ready(read)                                 what does not depend on e, the gradient of h, which comes last
//   backward(ready, e, dstate, dp, dy, relu)    dp is the gradient of wx, dy that of the product. dstate[0] is what
//                                               reaches the h before without the product, where CARRIES
//   finish(dstate, c_0, n_0)                    after the first step, with the initial states 1 and 2 (sLSTM)
struct Backward {
  const S* p_dh;              // [B, T, H, D] or null: zeros
  const Number* p_dfinal[4];  // [B, H, D] or null: zeros
  const S* p_r;
  Kept kept;
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
  void* p_workspace;
  uint64_t* p_packets;
  int64_t first;
};

// Of a unit of the block that output `out` belongs to. Input k is gate k / UNITS of unit k % UNITS of this block.
struct TransposedWeights {
  Weights weights;
  int rank;

  __device__ __forceinline__ S operator()(int out, int own, int first, int each) const {
    return weights.at(first / UNITS, rank * UNITS + first % UNITS + each, Scatter::block_of(out, rank) * UNITS + own);
  }
};

template <class Cell>
__device__ __forceinline__ void backward(const Backward& a) {
  constexpr int G = Cell::GATES, N = Cell::STATES, READS = Cell::READS;
  constexpr int CHUNK = PER % 4 == 0 ? 4 : PER % 3 == 0 ? 3 : PER % 2 == 0 ? 2 : 1;
  static_assert(PER * K_WARPS == BLOCKS, "warps share the blocks evenly");
  using Multiplier = Product<PER, CHUNK, G * UNITS, G * UNITS>;
  using Input = typename Multiplier::Input;
  using Fragment = typename Multiplier::Fragment;
  constexpr int INPUT_BYTES = 2 * Multiplier::INPUTS * sizeof(Input);
  SHARED_DYNAMIC(char, p_shared);
  const Team team(a.first);
  const int64_t head = team.index % a.H, width = a.H * DIM;
  const Rows rows(a.p_lengths, team.index / a.H, a.B, a.T, a.reverse);
  const int unit = team.rank * UNITS + own_unit(), units = DIM - unit;
  const int64_t place = head * DIM + unit;

  Multiplier product;
  char* p_others = p_shared + sizeof(Fragment) * CHUNK * THREADS * (Multiplier::HELD - Multiplier::KEPT);
  const Slots<READS + 1> slots(p_others);  // dh is the last
  const Sum<1> sum(p_others);
  const Scatter scatter(p_others, a.p_packets, team);
  Input* const s_dy = take<Input>(p_others, 2 * Multiplier::INPUTS);  // [2][INPUTS]
  const TransposedWeights weights{{a.p_r + head * a.stride_r_h, a.stride_r_g, a.stride_r_out, a.stride_r_in},
                                  team.rank};
  product.template load<stage<Multiplier>(Slots<READS + 1>::BYTES + Sum<1>::BYTES + Scatter::BYTES + INPUT_BYTES)>(
      p_shared, static_cast<Fragment*>(a.p_workspace) + int64_t(blockIdx.x) * Multiplier::STREAMED * CHUNK * THREADS,
      weights);
  __syncthreads();
  // Where the cell's read k of a step lies; of the last, dh.
  const auto read_of = [&](int k, int i, int step) {
    if (k == READS) {
      return a.p_dh + rows.row(i) * a.stride_dh_b + rows.time(i, step) * a.stride_dh_t + head * a.stride_dh_h + unit;
    }
    const Source source = Cell::source(k);
    const int64_t pair = rows.pair(a.pairs, i, step), before = a.reverse ? a.pairs.t : -a.pairs.t;
    const int64_t from = source.before >= 0 ? pair + before : pair;
    return a.kept.at(source, from, Cell::CACHES, width) + place;
  };
  const auto fetch = [&](int step, int turn) {
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
      if (step < 0 || step >= rows.length[i]) continue;
#pragma unroll
      for (int k = 0; k < READS; ++k) {
        if (Cell::source(k).before >= 0 && step == 0) continue;
        slots.fetch(turn, k, i, read_of(k, i, step), units);
      }
      if (a.p_dh != nullptr) slots.fetch(turn, READS, i, read_of(READS, i, step), units);
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int turn = 0; turn < RING; ++turn) fetch(rows.longest - 1 - turn, turn);

  Number dstate[OWNED][LANE_UNITS][N];
  const auto state_place = [&](int i, int u) { return rows.row(i) * width + place + u; };
#pragma unroll
  for (int i = 0; i < OWNED; ++i) {
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      const bool inside = rows.inside(i, a.B) && u < units;
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
  scatter.begin();

  // The gradient of the h that a step began with, from the product of that step's dy.
  const auto entering = [&](Number value, const Number(&dstate)[N]) {
    if constexpr (Cell::CARRIES) value += dstate[0];
    return a.grad_clip < 0 ? value : clamp(value, a.grad_clip);
  };

  // What a step needs beside the gradient that comes last.
  typename Cell::Ready ready[OWNED][LANE_UNITS];
  Number above[OWNED][LANE_UNITS];  // dh
  const auto prepare = [&](int step, int turn) {
    cp_async_wait<RING - 1>();
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
#pragma unroll
      for (int u = 0; u < LANE_UNITS; ++u) {
        const bool own = step < rows.length[i] && u < units;
        Number read[READS];
#pragma unroll
        for (int k = 0; k < READS; ++k) {
          const int before = Cell::source(k).before;
          if (before >= 0 && step == 0) {
            read[k] = own ? initial_state(a.p_initial[before], state_place(i, u), 0) : Number(0);
          } else {
            read[k] = slots.read(turn, k, i, u, read_of(k, i, step));
          }
        }
        ready[i][u] = Cell::ready(read);
        above[i][u] = a.p_dh != nullptr ? slots.read(turn, READS, i, u, read_of(READS, i, step)) : Number(0);
      }
    }
  };

  Sums<1> part = {};
  Number dh[OWNED][1][LANE_UNITS];
  int turn = 0;
  if (is_owner() && rows.longest > 0) prepare(rows.longest - 1, turn);
  for (int n = 0; n < rows.longest; ++n) {
    const int step = rows.longest - 1 - n;
    if (!ALONE && n > 0) scatter.wait(n, part);
    sum.add(part, dh);
    Input* const s_now = s_dy + n % 2 * Multiplier::INPUTS;
    if (is_owner()) {
#pragma unroll
      for (int i = 0; i < OWNED; ++i) {
        const bool valid = step < rows.length[i] && units > 0;
        Number dp[G][LANE_UNITS], dy[G][LANE_UNITS];
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) {
          const bool own = valid && u < units;
          Number dp_u[G], dy_u[G], next[N];
#pragma unroll
          for (int k = 0; k < N; ++k) next[k] = dstate[i][u][k];
          const Number e = step + 1 == rows.length[i] ? next[0] : entering(dh[i][0][u], next);
          Cell::backward(ready[i][u], e + above[i][u], next, dp_u, dy_u, a.relu);
#pragma unroll
          for (int k = 0; k < N; ++k) dstate[i][u][k] = own ? next[k] : dstate[i][u][k];
#pragma unroll
          for (int gate = 0; gate < G; ++gate) dp[gate][u] = dp_u[gate], dy[gate][u] = own ? dy_u[gate] : Number(0);
        }
#pragma unroll
        for (int gate = 0; gate < G; ++gate) {
          Pack<Input, LANE_UNITS> item;
#pragma unroll
          for (int u = 0; u < LANE_UNITS; ++u) item[u] = narrow<Input>(dy[gate][u]);
          Input* const to = Multiplier::input(s_now, tile_row(owned_row(i)), gate * UNITS + own_unit());
          *reinterpret_cast<Pack<Input, LANE_UNITS>*>(to) = item;
        }
        if (!valid) continue;
        const int64_t pair = rows.pair(a.pairs, i, step);
#pragma unroll
        for (int gate = 0; gate < G; ++gate) {
          store_units(a.p_dwx + (pair * G + gate) * width + place, dp[gate], units);
        }
        if constexpr (Cell::CARRIES) store_units(a.p_dy + pair * width + place, dy[G - 1], units);
      }
    }
    __syncthreads();
    if constexpr (ALONE) {
      product.template multiply<0>(s_now, weights, part);
    } else {
      unrolled<0, PER / CHUNK>([&]<int CHUNKTH>() {
        Sums<CHUNK> sums;
        product.template multiply<CHUNKTH>(s_now, weights, sums);
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            scatter.send(n + 1, Scatter::block_of(CHUNKTH * CHUNK + each, team.rank), tile, sums.value[tile][each]);
          }
        }
      });
    }
    // While others' parts are on their way.
    if (is_owner()) {
      fetch(step - RING, turn);
      turn = turn + 1 == RING ? 0 : turn + 1;
      if (step > 0) prepare(step - 1, turn);
    }
  }

  if (!ALONE && rows.longest > 0) scatter.wait(rows.longest, part);
  sum.add(part, dh);
#pragma unroll
  for (int i = 0; i < OWNED; ++i) {
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) {
      if (!rows.inside(i, a.B) || u >= units) continue;
      if (rows.length[i] > 0) {
        dstate[i][u][0] = entering(dh[i][0][u], dstate[i][u]);
        if constexpr (N == 4) {
          Cell::finish(dstate[i][u], initial_state(a.p_initial[1], state_place(i, u), 0),
                       initial_state(a.p_initial[2], state_place(i, u), 0));
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) a.p_dinitial[n][state_place(i, u)] = dstate[i][u][n];
    }
  }
  if constexpr (CLUSTERED) cluster_barrier();
}

// The kernel of a cell: the same arguments for all cells, null where one has no such tensor. grad_clip: the bits of a
// double.
#define CELL_KERNEL(cell, Cell)                                                                                        \
  TEAM_KERNEL(cell##_backward)                                                                                         \
  (const S* p_dh, const Number* p_dh_n, const Number* p_dc_n, const Number* p_dn_n, const Number* p_dm_n,              \
   const S* p_r, const S* p_cache, const S* p_kept, const S* p_h, const Number* p_c_n, const Number* p_n_n,            \
   const Number* p_h0, const Number* p_c0, const Number* p_n0, const int64_t* p_lengths, S* p_dwx, S* p_dy,            \
   Number* p_dh0, Number* p_dc0, Number* p_dn0, Number* p_dm0, int64_t B, int64_t T, int64_t H, int64_t stride_dh_b,   \
   int64_t stride_dh_t, int64_t stride_dh_h, int64_t stride_r_g, int64_t stride_r_h, int64_t stride_r_out,             \
   int64_t stride_r_in, int64_t pair_b, int64_t pair_t, int64_t grad_clip, bool reverse, bool relu, void* p_workspace, \
   uint64_t* p_packets, int64_t first) {                                                                               \
    backward<Cell>({p_dh,                                                                                              \
                    {p_dh_n, p_dc_n, p_dn_n, p_dm_n},                                                                  \
                    p_r,                                                                                               \
                    {p_cache, p_kept, p_h},                                                                            \
                    {nullptr, p_c_n, p_n_n},                                                                           \
                    {p_h0, p_c0, p_n0},                                                                                \
                    p_lengths,                                                                                         \
                    p_dwx,                                                                                             \
                    p_dy,                                                                                              \
                    {p_dh0, p_dc0, p_dn0, p_dm0},                                                                      \
                    B,                                                                                                 \
                    T,                                                                                                 \
                    H,                                                                                                 \
                    stride_dh_b,                                                                                       \
                    stride_dh_t,                                                                                       \
                    stride_dh_h,                                                                                       \
                    stride_r_g,                                                                                        \
                    stride_r_h,                                                                                        \
                    stride_r_out,                                                                                      \
                    stride_r_in,                                                                                       \
                    {pair_b, pair_t},                                                                                  \
                    Number(__longlong_as_double(grad_clip)),                                                           \
                    reverse,                                                                                           \
                    relu,                                                                                              \
                    p_workspace,                                                                                       \
                    p_packets,                                                                                         \
                    first});                                                                                           \
  }                                                                                                                    \
  EXPORT(cell##_backward)

#endif
