// Linear scan, forward:   h_t = a_t h_{t-1} + x_t
//   backward, the other way: g_t = dh_t + conj(a_{t+1}) g_{t+1}   dx_t = g_t   da_t = g_t conj(h_{t-1})
//
// a_t = 0 exactly is a reset: nothing passes it, not even NaN, and da_t is 0 where it would read such an h_{t-1}.
// One gate may serve several channels: channel c has gate (c / gate_div) % gate_mod. Strides are in elements and may be
// 0 for the batch or the time of a; channels are contiguous. The arithmetic is in Compute<S>, states are too.
//
// Constants, beside those of device.h: STORAGE, GATE_STORAGE of x and a · GATES a thread: VEC, or 1 for all its
// channels · MARCH 1 or 0 · BACKWARD 1 or 0.
// Limit: device memory, 3 (forward) or 5 (backward) accesses of sizeof(S) a step and channel.
#include "scan/device.h"

using S = STORAGE;
using G = GATE_STORAGE;

// The product of all gates of a tile is real where they are.
template <class C, bool COMPLEX_GATE>
struct GateType {
  using type = Real<C>;
};
template <class C>
struct GateType<C, true> {
  using type = C;
};
using Carry = Compute<S>;
using Gate = GateType<Carry, Types<G>::COMPLEX>::type;

template <class R>
__device__ __forceinline__ R gate_gradient(R g, R h, R) {
  return g * h;
}
template <class R>
__device__ __forceinline__ Complex<R> gate_gradient(Complex<R> g, Complex<R> h, Complex<R>) {
  return multiply(g, conjugate(h));
}
template <class R>
__device__ __forceinline__ R gate_gradient(Complex<R> g, Complex<R> h, R) {
  return g.re * h.re + g.im * h.im;
}

// The gates of a thread's channels.
struct Gates {
  const G* p_a;  // [B or 1, T or 1, gates]
  int64_t stride_b, stride_t, div, mod;
  Line<const G> a;
  Pack<G, GATES>* s_a;

  __device__ __forceinline__ bool constant() const { return stride_t == 0; }
  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t channel) {
    a = walk.line(p_a + b * stride_b + channel / div % mod, stride_t);
  }
  // A gate that is the same at all steps is read once, into all slots.
  __device__ __forceinline__ void buffers(char*& p_shared) {
    s_a = own_slots<Pack<G, GATES>>(p_shared);
    if (constant() && a.p != nullptr) {
      const Pack<G, GATES> gates = load<G, GATES>(a.p);
      for (int slot = 0; slot < STEPS; ++slot) s_a[slot * THREADS] = gates;
    }
  }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const {
    if (!constant()) copy_to_slot(s_a[slot * THREADS], a(i));
  }
  __device__ __forceinline__ Pack<G, GATES> read(int slot) const { return s_a[slot * THREADS]; }
};

__device__ __forceinline__ Gate gate(const Pack<G, GATES>& a, int v) { return widen(a, GATES == VEC ? v : 0); }

// States [N, C] in Carry; null: zeros.
struct States {
  const Carry* p_initial;
  Carry* p_final;
  int64_t C;
  int64_t channel;

  __device__ __forceinline__ Carry initial(int64_t n, int v) const {
    return p_initial == nullptr ? number<Carry>(0) : p_initial[n * C + channel + v];
  }
  __device__ __forceinline__ void finish(int64_t n, const Carry (&carry)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) p_final[n * C + channel + v] = carry[v];
  }
};

#if !BACKWARD

struct Forward {
  static constexpr int SUMS = 0;
  using State = Carry;
  using Map = Affine<Gate, Carry>;
  struct Raw {
    Pack<S, VEC> x;
    Pack<G, GATES> a;
  };
  static constexpr int BYTES = sizeof(Pack<S, VEC>) + sizeof(Pack<G, GATES>);

  const S* p_x;  // [B, T, C]
  int64_t stride_x_b, stride_x_t;
  S* p_h;  // [B, T, C]
  Gates gates;
  States states;
  Line<const S> x;
  Line<S> h;
  Pack<S, VEC>* s_x;

  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t lane) {
    states.channel = lane * VEC;
    x = walk.line(p_x + b * stride_x_b + states.channel, stride_x_t);
    h = walk.line(p_h + b * walk.T * states.C + states.channel, states.C);
    gates.place(walk, b, states.channel);
  }
  __device__ __forceinline__ void buffers(char* p_shared) {
    s_x = own_slots<Pack<S, VEC>>(p_shared);
    gates.buffers(p_shared);
  }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const {
    copy_to_slot(s_x[slot * THREADS], x(i));
    gates.fetch(i, slot);
  }
  __device__ __forceinline__ Raw read(int slot) const { return {s_x[slot * THREADS], gates.read(slot)}; }
  __device__ __forceinline__ void extend(const Raw& raw, typename Map::Running (&running)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) running[v].append(gate(raw.a, v), widen(raw.x, v));
  }
  __device__ __forceinline__ void step(int64_t i, const Raw& raw, Carry (&carry)[VEC], int64_t) const {
    Pack<S, VEC> pack;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const Gate a = gate(raw.a, v);
      const Carry x = widen(raw.x, v);
      carry[v] = is_zero(a) ? x : multiply_add(a, carry[v], x);
      pack[v] = narrow<S>(carry[v]);
    }
    store<S, VEC>(h(i), pack);
  }
  __device__ __forceinline__ Carry initial(int64_t n, int v) const { return states.initial(n, v); }
  __device__ __forceinline__ void finish(int64_t n, const Carry (&carry)[VEC]) const { states.finish(n, carry); }
};

//   p_x [B, T, C] · p_a [B or 1, T or 1, gates] · p_initial [N, C] or null · p_h [B, T, C] · p_final [N, C], Carry
//   p_cu_seqlens [N + 1] or null · p_workspace and lanes, group: of tiles, in device.h
KERNEL(linear_scan_forward, BOUNDS)
(const S* p_x, const G* p_a, const Carry* p_initial, S* p_h, Carry* p_final, const int64_t* p_cu_seqlens,
 uint64_t* p_workspace, int64_t B, int64_t T, int64_t C, int64_t N, int64_t stride_x_b, int64_t stride_x_t,
 int64_t stride_a_b, int64_t stride_a_t, int64_t gate_div, int64_t gate_mod, int64_t lanes, int64_t group, bool flip) {
  const Walk walk = {T, N, p_cu_seqlens, flip};
  Forward forward = {p_x,
                     stride_x_b,
                     stride_x_t,
                     p_h,
                     {p_a, stride_a_b, stride_a_t, gate_div, gate_mod, {}, nullptr},
                     {p_initial, p_final, C, 0}};
#if MARCH
  march(forward, walk, N, C / VEC);
#else
  tiles(forward, walk, B, C, lanes, group, p_workspace);
#endif
}
EXPORT(linear_scan_forward)

#else

struct Backward {
  static constexpr int SUMS = GATES;
  using State = Carry;
  using Map = Affine<Gate, Carry>;
  using Sum = Gate;
  struct Raw {
    Pack<S, VEC> dh;
    Pack<G, GATES> a;
    Pack<S, VEC> h;  // of the step before in time, which the walk meets next
  };
  static constexpr int BYTES = 2 * sizeof(Pack<S, VEC>) + sizeof(Pack<G, GATES>);

  const S* p_dh;  // [B, T, C], or null: zeros
  int64_t stride_dh_b, stride_dh_t;
  const S* p_h;          // [B, T, C], or null: no gate gradient
  S* p_dx;               // [B, T, C]
  void* p_da;            // G [B, T, C]; partial: Gate [B, T, columns / seam], or [.., columns] of sums over time
  const Carry* p_start;  // [N, C] the state before the first step, or null: zeros
  bool partial;
  int64_t seam;  // neighbouring lanes with the same gate: a power of two, 1 unless GATES is 1
  int64_t T;
  Gates gates;
  States states;
  int64_t lane;
  Line<const S> dh, h;  // h of the step before in time, which the walk meets next
  Line<S> dx;
  Line<G> da;
  Line<Gate> da_partial;
  Pack<S, VEC>*s_dh, *s_h;
  Gate sum[GATES];

  __device__ __forceinline__ int64_t columns() const { return states.C / VEC * GATES; }
  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t lane) {
    this->lane = lane;
    states.channel = lane * VEC;
    const int64_t row = b * walk.T * states.C + states.channel;
    dh = walk.line(p_dh + b * stride_dh_b + states.channel, stride_dh_t);
    h = walk.line(p_h + row, states.C);
    dx = walk.line(p_dx + row, states.C);
    da = walk.line(static_cast<G*>(p_da) + row, states.C);
    da_partial = walk.line(static_cast<Gate*>(p_da) + (b * walk.T * columns() + lane * GATES) / seam, columns() / seam);
    gates.place(walk, b, states.channel);
#pragma unroll
    for (int v = 0; v < GATES; ++v) sum[v] = number<Gate>(0);
  }
  __device__ __forceinline__ void buffers(char* p_shared) {
    s_dh = own_slots<Pack<S, VEC>>(p_shared);
    s_h = own_slots<Pack<S, VEC>>(p_shared);
    gates.buffers(p_shared);
  }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const {
    if (p_dh != nullptr) copy_to_slot(s_dh[slot * THREADS], dh(i));
    if (p_h != nullptr && i + 1 < T) copy_to_slot(s_h[slot * THREADS], h(i + 1));
    gates.fetch(i, slot);
  }
  __device__ __forceinline__ Raw read(int slot) const {
    return {s_dh[slot * THREADS], gates.read(slot), s_h[slot * THREADS]};
  }
  __device__ __forceinline__ Carry input(const Raw& raw, int v) const {
    return p_dh == nullptr ? number<Carry>(0) : Carry(widen(raw.dh, v));
  }
  __device__ __forceinline__ void extend(const Raw& raw, typename Map::Running (&running)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const Gate a = conjugate(gate(raw.a, v));
      running[v].append(a, is_zero(a) ? number<Carry>(0) : multiply(a, input(raw, v)));
    }
  }
  __device__ __forceinline__ void step(int64_t i, const Raw& raw, Carry (&carry)[VEC], int64_t ending) {
    Pack<S, VEC> pack;
    Carry before[VEC];
    Gate gradient[VEC];
    if (p_h != nullptr) {
      if (ending < 0) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) before[v] = widen(raw.h, v);
      } else {
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          before[v] = p_start == nullptr ? number<Carry>(0) : p_start[ending * states.C + states.channel + v];
        }
      }
    }
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const Gate a = gate(raw.a, v);
      const Carry g = carry[v] + input(raw, v);
      pack[v] = narrow<S>(g);
      if (p_h != nullptr) {
        gradient[v] = is_zero(a) && !is_finite(before[v]) ? number<Gate>(0) : gate_gradient(g, before[v], Gate());
      }
      carry[v] = is_zero(a) ? number<Carry>(0) : multiply(conjugate(a), g);
    }
    store<S, VEC>(dx(i), pack);
    if (p_h != nullptr) store_gate_gradient(i, gradient);
  }
  __device__ __forceinline__ void store_gate_gradient(int64_t i, const Gate (&gradient)[VEC]) {
    if constexpr (GATES == VEC) {
      if (sums_over_time()) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[v] = sum[v] + gradient[v];
      } else if (partial) {
        Pack<Gate, VEC> pack;
#pragma unroll
        for (int v = 0; v < VEC; ++v) pack[v] = gradient[v];
        store<Gate, VEC>(da_partial(i), pack);
      } else {
        Pack<G, VEC> pack;
#pragma unroll
        for (int v = 0; v < VEC; ++v) pack[v] = narrow<G>(gradient[v]);
        store<G, VEC>(da(i), pack);
      }
    } else {
      Gate total = gradient[0];
#pragma unroll
      for (int v = 1; v < VEC; ++v) total = total + gradient[v];
      if (sums_over_time()) {
        sum[0] = sum[0] + total;
      } else {
        total = sum_lanes(total, int(seam));
        if (lane % seam == 0) *da_partial(i) = total;
      }
    }
  }
  __device__ __forceinline__ bool sums_over_time() const { return p_h != nullptr && gates.constant(); }
  __device__ __forceinline__ void store_sums(int64_t row, int64_t lane, const Gate (&sum)[GATES]) const {
#pragma unroll
    for (int v = 0; v < GATES; ++v) {
      static_cast<Gate*>(p_da)[row * columns() + lane * GATES + v] = sum[v];
    }
  }
  __device__ __forceinline__ Carry initial(int64_t n, int v) const { return states.initial(n, v); }
  __device__ __forceinline__ void finish(int64_t n, const Carry (&carry)[VEC]) const { states.finish(n, carry); }
};

//   p_dh, p_h [B, T, C] or null · p_a [B or 1, T or 1, gates] · p_dfinal, p_start [N, C] or null · p_dx [B, T, C]
//   p_da: see Backward · p_dinitial [N, C] · flip: the walk begins at the last step, as it does unless reverse
KERNEL(linear_scan_backward, BOUNDS)
(const S* p_dh, const G* p_a, const S* p_h, const Carry* p_dfinal, const Carry* p_start, S* p_dx, void* p_da,
 Carry* p_dinitial, const int64_t* p_cu_seqlens, uint64_t* p_workspace, int64_t B, int64_t T, int64_t C, int64_t N,
 int64_t stride_dh_b, int64_t stride_dh_t, int64_t stride_a_b, int64_t stride_a_t, int64_t gate_div, int64_t gate_mod,
 int64_t seam, int64_t lanes, int64_t group, bool partial, bool flip) {
  const Walk walk = {T, N, p_cu_seqlens, flip};
  Backward backward = {p_dh,
                       stride_dh_b,
                       stride_dh_t,
                       p_h,
                       p_dx,
                       p_da,
                       p_start,
                       partial,
                       seam,
                       T,
                       {p_a, stride_a_b, stride_a_t, gate_div, gate_mod, {}, nullptr},
                       {p_dfinal, p_dinitial, C, 0}};
#if MARCH
  march(backward, walk, N, C / VEC);
#else
  tiles(backward, walk, B, C, lanes, group, p_workspace);
#endif
}
EXPORT(linear_scan_backward)

#endif
