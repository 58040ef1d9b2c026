// The pointwise part of one step of a recurrent cell, for all rows, heads and units; a batched product in torch comes
// before each step, and the two take turns:
//
//   forward    y [H, B, G, D] = h [H, B, D] r^T        then Cell::forward
//   backward   a [H, B, D] = dy [H, B, G, D] r         then Cell::backward
//
// A thread owns VEC neighbouring units of one row and head. Steps count in the order of the recurrence, from 0; the
// forward begins with step -1, which lays out the initial states, and the backward ends with it, which finishes their
// gradients. Between steps states lie where the final ones will: in p_final and p_dinitial. A row takes part in as many
// steps as it has, and what it stores past them nobody wrote.
//
// Letters: B batch, T time, H heads, D units of a head, G gates. Constants:
//   STORAGE of sequences · INPUT what the product reads: STORAGE, or wider where no product takes that
//   THREADS of a block · VEC units a thread: 1 or, where addresses are even, 2 · BACKWARD 1 or 0
#pragma once

#include "rnn/sequences.h"

using Input = INPUT;

// ------------------------------------------------------------------------------------------------ places

struct Sizes {
  int64_t B, T, H, D;
};

// The units of this thread: a row is dealt out to whole blocks.
struct Place {
  int64_t row, width;  // of all heads
  int head, unit;      // its first one
  bool inside;

  __device__ __forceinline__ explicit Place(const Sizes& n) : width(n.H * n.D) {
    const unsigned blocks = unsigned((width / VEC + THREADS - 1) / THREADS);
    const int64_t first = int64_t(blockIdx.x % blocks) * THREADS + threadIdx.x;
    row = blockIdx.x / blocks;
    inside = first * VEC < width;
    head = int(unsigned(first * VEC) / unsigned(n.D));
    unit = int(unsigned(first * VEC) % unsigned(n.D));
  }
  // In [B, H, D], and in [H, B, G, D].
  __device__ __forceinline__ int64_t state(const Sizes& n) const { return row * width + head * n.D + unit; }
  __device__ __forceinline__ int64_t product(const Sizes& n, int gates, int gate) const {
    return ((head * n.B + row) * gates + gate) * n.D + unit;
  }
};

// ------------------------------------------------------------------------------------------------ units of a thread

template <class Stored>
__device__ __forceinline__ void read_units(const Stored* p, Number (&value)[VEC]) {
  const Pack<Stored, VEC> pack = *reinterpret_cast<const Pack<Stored, VEC>*>(p);
#pragma unroll
  for (int u = 0; u < VEC; ++u) value[u] = widen(pack, u);
}

template <class Stored>
__device__ __forceinline__ void write_units(Stored* p, const Number (&value)[VEC]) {
  Pack<Stored, VEC> pack;
#pragma unroll
  for (int u = 0; u < VEC; ++u) pack[u] = narrow<Stored>(value[u]);
  *reinterpret_cast<Pack<Stored, VEC>*>(p) = pack;
}

// States [B, H, D]; null: `absent`.
__device__ __forceinline__ void read_state(const Number* p, int64_t place, Number absent, Number (&value)[VEC]) {
#pragma unroll
  for (int u = 0; u < VEC; ++u) value[u] = absent;
  if (p != nullptr) read_units(p + place, value);
}

// What enters the product has the storage type's digits, whatever it is stored in.
__device__ __forceinline__ void write_input(Input* p, const Number (&value)[VEC]) {
  Number rounded[VEC];
#pragma unroll
  for (int u = 0; u < VEC; ++u) rounded[u] = widen(narrow<S>(value[u]));
  write_units(p, rounded);
}

// ------------------------------------------------------------------------------------------------ forward

#if !BACKWARD

// Cells: see device.h.
struct Forward {
  const S* p_wx;               // [B, T, G, H, D]
  const Number* p_b;           // [G, H, D] or null
  const Number* p_y;           // [H, B, G, D]
  const Number* p_initial[4];  // [B, H, D] or null
  const int64_t* p_lengths;    // [B] or null
  S* p_h;                      // [B, T, H, D]
  Number* p_final[4];          // [B, H, D]
  S* p_cache;                  // [B, T, CACHES, H, D] or null
  S* p_kept;                   // [B, T, H, D] or null
  Input* p_input;              // [H, B, D]: h for the next product
  Sizes n;
  int64_t stride_wx_b, stride_wx_t, stride_wx_g, stride_wx_h;
  Pairs pairs;
  bool reverse, relu;
  int64_t step;
};

template <class Cell>
__device__ __forceinline__ void forward(const Forward& a) {
  constexpr int G = Cell::GATES, N = Cell::STATES, KEPT = Cell::CACHES + Cell::KEEPS;
  const Place at(a.n);
  if (!at.inside) return;
  const int64_t place = at.state(a.n), length = length_of(a.p_lengths, at.row, a.n.T);
  if (a.step < 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Number state[VEC];
      read_state(a.p_initial[n], place, Cell::absent(n), state);
      write_units(a.p_final[n] + place, state);
      if (n == 0) write_input(a.p_input + at.product(a.n, 1, 0), state);
    }
    return;
  }
  if (a.step >= length) return;

  const int64_t time = a.reverse ? length - 1 - a.step : a.step, pair = at.row * a.pairs.b + time * a.pairs.t;
  const S* const p_wx = a.p_wx + at.row * a.stride_wx_b + time * a.stride_wx_t + at.head * a.stride_wx_h + at.unit;
  Number wx[G][VEC], y[G][VEC], bias[G][VEC], state[N][VEC], kept[KEPT ? KEPT : 1][VEC];
#pragma unroll
  for (int gate = 0; gate < G; ++gate) {
    read_units(p_wx + gate * a.stride_wx_g, wx[gate]);
    read_units(a.p_y + at.product(a.n, G, gate), y[gate]);
    read_state(a.p_b, gate * at.width + at.head * a.n.D + at.unit, 0, bias[gate]);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) read_units(a.p_final[n] + place, state[n]);
#pragma unroll
  for (int u = 0; u < VEC; ++u) {
    Number wx_u[G], y_u[G], state_u[N], cache[KEPT ? KEPT : 1];
#pragma unroll
    for (int gate = 0; gate < G; ++gate) wx_u[gate] = wx[gate][u], y_u[gate] = y[gate][u] + bias[gate][u];
#pragma unroll
    for (int n = 0; n < N; ++n) state_u[n] = state[n][u];
    Cell::forward(wx_u, y_u, state_u, cache, a.relu);
#pragma unroll
    for (int n = 0; n < N; ++n) state[n][u] = state_u[n];
#pragma unroll
    for (int k = 0; k < KEPT; ++k) kept[k][u] = cache[k];
  }

  write_input(a.p_input + at.product(a.n, 1, 0), state[0]);
  write_units(a.p_h + pair * at.width + at.head * a.n.D + at.unit, state[0]);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    // Only a cell that CARRIES reads h here: other cells' h goes on through the product.
    if (n > 0 || Cell::CARRIES || a.step + 1 == length) write_units(a.p_final[n] + place, state[n]);
  }
  if (a.p_cache != nullptr) {
#pragma unroll
    for (int k = 0; k < Cell::CACHES; ++k) {
      write_units(a.p_cache + (pair * Cell::CACHES + k) * at.width + at.head * a.n.D + at.unit, kept[k]);
    }
    if constexpr (Cell::KEEPS) {
      write_units(a.p_kept + pair * at.width + at.head * a.n.D + at.unit, kept[Cell::CACHES]);
    }
  }
}

// The kernel of a cell: the same arguments for all cells, null where one has no such tensor.
#define CELL_KERNEL(cell, Cell)                                                                                      \
  KERNEL(cell##_forward_step, THREADS)                                                                               \
  (const S* p_wx, const Number* p_b, const Number* p_y, const Number* p_h0, const Number* p_c0, const Number* p_n0,  \
   const Number* p_m0, const int64_t* p_lengths, S* p_h, Number* p_h_n, Number* p_c_n, Number* p_n_n, Number* p_m_n, \
   S* p_cache, S* p_kept, Input* p_input, int64_t B, int64_t T, int64_t H, int64_t D, int64_t stride_wx_b,           \
   int64_t stride_wx_t, int64_t stride_wx_g, int64_t stride_wx_h, int64_t pair_b, int64_t pair_t, bool reverse,      \
   bool relu, int64_t step) {                                                                                        \
    forward<Cell>({p_wx,                                                                                             \
                   p_b,                                                                                              \
                   p_y,                                                                                              \
                   {p_h0, p_c0, p_n0, p_m0},                                                                         \
                   p_lengths,                                                                                        \
                   p_h,                                                                                              \
                   {p_h_n, p_c_n, p_n_n, p_m_n},                                                                     \
                   p_cache,                                                                                          \
                   p_kept,                                                                                           \
                   p_input,                                                                                          \
                   {B, T, H, D},                                                                                     \
                   stride_wx_b,                                                                                      \
                   stride_wx_t,                                                                                      \
                   stride_wx_g,                                                                                      \
                   stride_wx_h,                                                                                      \
                   {pair_b, pair_t},                                                                                 \
                   reverse,                                                                                          \
                   relu,                                                                                             \
                   step});                                                                                           \
  }                                                                                                                  \
  EXPORT(cell##_forward_step)

#else

// ------------------------------------------------------------------------------------------------ backward

struct Backward {
  const S* p_dh;              // [B, T, H, D] or null: zeros
  const Number* p_dfinal[4];  // [B, H, D] or null: zeros
  const Number* p_a;          // [H, B, D]
  Kept kept;
  const Number* p_final[4];    // 1 and 2 of the sLSTM
  const Number* p_initial[4];  // [B, H, D] or null: zeros
  const int64_t* p_lengths;
  S* p_dwx;               // [B, T, G, H, D]
  S* p_dy;                // of the last gate [B, T, H, D], where it is not dwx's
  Number* p_dinitial[4];  // [B, H, D]
  Input* p_input;         // [H, B, G, D]: dy for the next product
  Sizes n;
  int64_t stride_dh_b, stride_dh_t, stride_dh_h;
  Pairs pairs;
  Number grad_clip;  // negative: none
  bool reverse, relu;
  int64_t step;
};

// The gradients of the states that a step ended with; that of h without dh.
template <class Cell>
__device__ __forceinline__ void leaving(const Backward& a, const Place& at, int64_t length,
                                        Number (&dstate)[Cell::STATES][VEC]) {
  constexpr int N = Cell::STATES;
  const int64_t place = at.state(a.n);
  if (a.step + 1 == length) {
#pragma unroll
    for (int n = 0; n < N; ++n) read_state(a.p_dfinal[n], place, 0, dstate[n]);
    if constexpr (N == 4) {
      if (length == 0) return;
      Number c[VEC], n[VEC];
      read_units(a.p_final[1] + place, c);
      read_units(a.p_final[2] + place, n);
#pragma unroll
      for (int u = 0; u < VEC; ++u) {
        Number dstate_u[N] = {dstate[0][u], dstate[1][u], dstate[2][u], dstate[3][u]};
        Cell::begin(dstate_u, c[u], n[u]);
        dstate[3][u] = dstate_u[3];
      }
    }
    return;
  }
#pragma unroll
  for (int n = 1; n < N; ++n) read_units(a.p_dinitial[n] + place, dstate[n]);
  read_units(a.p_a + at.product(a.n, 1, 0), dstate[0]);
  if constexpr (Cell::CARRIES) {
    Number carried[VEC];
    read_units(a.p_dinitial[0] + place, carried);
#pragma unroll
    for (int u = 0; u < VEC; ++u) dstate[0][u] += carried[u];
  }
#pragma unroll
  for (int u = 0; u < VEC; ++u) dstate[0][u] = a.grad_clip < 0 ? dstate[0][u] : clamp(dstate[0][u], a.grad_clip);
}

template <class Cell>
__device__ __forceinline__ void backward(const Backward& a) {
  constexpr int G = Cell::GATES, N = Cell::STATES, READS = Cell::READS;
  const Place at(a.n);
  if (!at.inside) return;
  const int64_t place = at.state(a.n), length = length_of(a.p_lengths, at.row, a.n.T);
  if (a.step >= length) return;
  Number dstate[N][VEC];
  leaving<Cell>(a, at, length, dstate);

  if (a.step < 0) {
    if constexpr (N == 4) {
      Number c[VEC], n[VEC];
      read_state(a.p_initial[1], place, 0, c);
      read_state(a.p_initial[2], place, 0, n);
#pragma unroll
      for (int u = 0; u < VEC; ++u) {
        if (length == 0) continue;
        Number dstate_u[N] = {dstate[0][u], dstate[1][u], dstate[2][u], dstate[3][u]};
        Cell::finish(dstate_u, c[u], n[u]);
        dstate[3][u] = dstate_u[3];
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) write_units(a.p_dinitial[n] + place, dstate[n]);
    return;
  }

  const int64_t time = a.reverse ? length - 1 - a.step : a.step, pair = at.row * a.pairs.b + time * a.pairs.t;
  const int64_t before = pair + (a.reverse ? a.pairs.t : -a.pairs.t), own = at.head * a.n.D + at.unit;
  Number read[READS][VEC], dh[VEC] = {};
#pragma unroll
  for (int k = 0; k < READS; ++k) {
    const Source source = Cell::source(k);
    if (source.before >= 0 && a.step == 0) {
      read_state(a.p_initial[source.before < 0 ? 0 : source.before], place, 0, read[k]);
      continue;
    }
    const int64_t from = source.before >= 0 ? before : pair;
    read_units(a.kept.at(source, from, Cell::CACHES, at.width) + own, read[k]);
  }
  if (a.p_dh != nullptr) {
    read_units(a.p_dh + at.row * a.stride_dh_b + time * a.stride_dh_t + at.head * a.stride_dh_h + at.unit, dh);
  }
  Number dp[G][VEC], dy[G][VEC];
#pragma unroll
  for (int u = 0; u < VEC; ++u) {
    Number read_u[READS], dstate_u[N], dp_u[G], dy_u[G];
#pragma unroll
    for (int k = 0; k < READS; ++k) read_u[k] = read[k][u];
#pragma unroll
    for (int n = 0; n < N; ++n) dstate_u[n] = dstate[n][u];
    Cell::backward(Cell::ready(read_u), dstate_u[0] + dh[u], dstate_u, dp_u, dy_u, a.relu);
#pragma unroll
    for (int n = 0; n < N; ++n) dstate[n][u] = dstate_u[n];
#pragma unroll
    for (int gate = 0; gate < G; ++gate) dp[gate][u] = dp_u[gate], dy[gate][u] = dy_u[gate];
  }

#pragma unroll
  for (int gate = 0; gate < G; ++gate) {
    write_input(a.p_input + at.product(a.n, G, gate), dy[gate]);
    write_units(a.p_dwx + (pair * G + gate) * at.width + own, dp[gate]);
  }
  if constexpr (Cell::CARRIES) write_units(a.p_dy + pair * at.width + own, dy[G - 1]);
#pragma unroll
  for (int n = Cell::CARRIES ? 0 : 1; n < N; ++n) write_units(a.p_dinitial[n] + place, dstate[n]);
}

// The kernel of a cell: the same arguments for all cells, null where one has no such tensor. grad_clip: the bits of a
// double.
#define CELL_KERNEL(cell, Cell)                                                                                  \
  KERNEL(cell##_backward_step, THREADS)                                                                          \
  (const S* p_dh, const Number* p_dh_n, const Number* p_dc_n, const Number* p_dn_n, const Number* p_dm_n,        \
   const Number* p_a, const S* p_cache, const S* p_kept, const S* p_h, const Number* p_c_n, const Number* p_n_n, \
   const Number* p_h0, const Number* p_c0, const Number* p_n0, const int64_t* p_lengths, S* p_dwx, S* p_dy,      \
   Number* p_dh0, Number* p_dc0, Number* p_dn0, Number* p_dm0, Input* p_input, int64_t B, int64_t T, int64_t H,  \
   int64_t D, int64_t stride_dh_b, int64_t stride_dh_t, int64_t stride_dh_h, int64_t pair_b, int64_t pair_t,     \
   int64_t grad_clip, bool reverse, bool relu, int64_t step) {                                                   \
    backward<Cell>({p_dh,                                                                                        \
                    {p_dh_n, p_dc_n, p_dn_n, p_dm_n},                                                            \
                    p_a,                                                                                         \
                    {p_cache, p_kept, p_h},                                                                      \
                    {nullptr, p_c_n, p_n_n},                                                                     \
                    {p_h0, p_c0, p_n0},                                                                          \
                    p_lengths,                                                                                   \
                    p_dwx,                                                                                       \
                    p_dy,                                                                                        \
                    {p_dh0, p_dc0, p_dn0, p_dm0},                                                                \
                    p_input,                                                                                     \
                    {B, T, H, D},                                                                                \
                    stride_dh_b,                                                                                 \
                    stride_dh_t,                                                                                 \
                    stride_dh_h,                                                                                 \
                    {pair_b, pair_t},                                                                            \
                    Number(__longlong_as_double(grad_clip)),                                                     \
                    reverse,                                                                                     \
                    relu,                                                                                        \
                    step});                                                                                      \
  }                                                                                                              \
  EXPORT(cell##_backward_step)

#endif
