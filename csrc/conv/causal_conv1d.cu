// causal_conv1d of up to 16 taps: the window that the taps see stays in registers.
//
// Forward: a run is walked forwards. Each step loads one row, STEPS of them ahead, which enters a window of W rows; the
// W - 1 rows before the run are read again. Backward: backwards, through the W - 1 later steps whose dz the run reads.
// The window holds dz; where z has to be computed anew, a second one holds x. Each x meets all dz that it has a part in,
// so that a thread has the gradients of its taps in registers until its runs are done.
//
// Constants, beside those of device.h: WEIGHT, the storage of weight and bias · TAPS = W · RUN, STEPS · BACKWARD
#include "conv/device.h"

using G = WEIGHT;
static_assert(RUN % STEPS == 0, "a run is read STEPS rows at a time");

#if !BACKWARD

// Rows of the last state, bit for bit: the last S of the state and x one after the other.
__device__ __forceinline__ void copy_state(const Rows<E>& rows, const Sequence& q, int64_t first, E* p_final) {
  for (int64_t i = first; i < least(first + RUN, rows.steps); ++i) {
    const E* row = rows.address(q, q.end - rows.steps + i);
    Pack<E, VEC> pack = {};
    if (row != nullptr) pack = load<E, VEC>(row);
    store(p_final + (q.n * rows.steps + i) * rows.D, pack);
  }
}

//   p_x, p_y [B, T, D] · p_weight [D, W], any strides · p_bias [D] or null · p_initial [N, S, D] or null, p_final
//   p_cu_seqlens [N + 1] or null. After the runs, every group copies RUN rows of a last state.
KERNEL(causal_conv1d_forward, BOUNDS)
(const E* p_x, const G* p_weight, const G* p_bias, const E* p_initial, E* p_y, E* p_final, const int64_t* p_cu_seqlens,
 int64_t B, int64_t T, int64_t D, int64_t N, int64_t dilation, int64_t stride_x_b, int64_t stride_x_t,
 int64_t stride_w_d, int64_t stride_w_k) {
  const Place at = place(blockIdx.x, D);
  if (at.idle) return;
  const Runs runs(B, T, dilation, RUN);
  int64_t item = at.block * GROUPS + at.group;
  Rows<E> rows = {p_x + at.channel, stride_x_t, p_initial == nullptr ? nullptr : p_initial + at.channel,
                  (TAPS - 1) * dilation, D};
  if (item >= runs.count) {
    item -= runs.count;
    const int64_t pieces = ceil_div(rows.steps, RUN);
    if (pieces == 0 || item >= N * pieces) return;
    const Sequence q = sequence_of(p_cu_seqlens, T, item / pieces);
    if (!PACKED) rows.p_rows += q.n * stride_x_b;
    return copy_state(rows, q, item % pieces * RUN, p_final + at.channel);
  }
  const int64_t b = runs.row(item);
  int64_t t = runs.first(item);
  if (t >= T) return;
  rows.p_rows += b * stride_x_b;
  E* p_out = p_y + b * T * D + at.channel;
  Values weight[TAPS], window[TAPS];
  const Values bias = parameters(p_bias == nullptr ? nullptr : p_bias + at.channel, 1);
#pragma unroll
  for (int k = 0; k < TAPS; ++k)
    weight[k] = parameters(p_weight + at.channel * stride_w_d + k * stride_w_k, stride_w_d);

  Sequence q = {b, 0, T};
  const auto fill = [&](int64_t now) {  // what the step before had
    if (PACKED) q = sequence_at(p_cu_seqlens, N, T, now);
#pragma unroll
    for (int k = 1; k < TAPS; ++k) window[k] = rows.at(q, now - (TAPS - k) * dilation);
  };
  fill(t);
#pragma unroll 1
  for (int i = 0; i < RUN; i += STEPS, t += STEPS * dilation) {
    Pack<E, VEC> raw[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      if (t + s * dilation < T) raw[s] = load<E, VEC>(rows.p_rows + (t + s * dilation) * stride_x_t);
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int64_t now = t + s * dilation;
      if (now >= T) return;
      if (PACKED && now >= q.end) fill(now);
#pragma unroll
      for (int k = 0; k + 1 < TAPS; ++k) window[k] = window[k + 1];
      window[TAPS - 1] = widened(raw[s]);
      Values z = bias;
#pragma unroll
      for (int k = 0; k < TAPS; ++k) add_product(z, weight[k], window[k]);
#pragma unroll
      for (int v = 0; v < VEC; ++v) z[v] = activated(z[v]);
      store_values(p_out + now * D, z);
    }
  }
}
EXPORT(causal_conv1d_forward)

#else

struct Backward {
  Rows<E> rows;
  const E* p_dy;  // of the batch row; null: zeros
  int64_t stride_dy;
  const E* p_dfinal;  // [N, S, D] or null
  E *p_dx, *p_dinitial;
  const int64_t* p_cu_seqlens;
  int64_t N, T, d;
  Values weight[TAPS], bias, dweight[TAPS], dbias;

  // `count` steps of a class from `first` on, which may be steps of the state, the latest first.
  __device__ __forceinline__ void walk(Sequence q, int64_t first, int count) {
    constexpr int X = SILU ? TAPS : 1;
    Values dz[TAPS], x[X];  // dz_k: of t + (W-1-k)d; x_k: of t - (W-1-k)d
#pragma unroll
    for (int k = 0; k < TAPS; ++k) dz[k] = zeros();
    const auto enter = [&](int64_t t) {  // a sequence, at its step t
#pragma unroll
      for (int k = 0; k < TAPS; ++k) dz[k] = zeros();
      if (SILU) {
#pragma unroll
        for (int k = 0; k + 1 < X; ++k) x[k] = rows.at(q, t - (TAPS - 2 - k) * d);
      }
    };
    const bool changes = PACKED && first >= q.start;  // a run of steps, not of a state
    const int steps = count + TAPS - 1;
    if (changes) q = sequence_at(p_cu_seqlens, N, T, least(first + (steps - 1) * d, T - 1));
    enter(first + (steps - 1) * d);
#pragma unroll 1
    for (int i = ceil_div(steps, STEPS) * STEPS - STEPS; i >= 0; i -= STEPS) {
      Pack<E, VEC> raw_dy[STEPS], raw_x[STEPS];
#pragma unroll
      for (int s = STEPS - 1; s >= 0; --s) {
        const int64_t t = first + (i + s) * d, row = SILU ? t - (TAPS - 1) * d : t;
        if (i + s < steps && t >= (changes ? 0 : q.start) && t < T) {
          if (p_dy != nullptr) raw_dy[s] = load<E, VEC>(p_dy + t * stride_dy);
        }
        if (i + s < steps && row >= 0 && row < T) raw_x[s] = load<E, VEC>(rows.p_rows + row * rows.stride);
      }
#pragma unroll
      for (int s = STEPS - 1; s >= 0; --s) {
        const int64_t t = first + (i + s) * d, row = SILU ? t - (TAPS - 1) * d : t;
        if (i + s >= steps) continue;
        if (changes && t < q.start) {
          q = sequence_at(p_cu_seqlens, N, T, t);
          enter(t);
        }
#pragma unroll
        for (int k = X - 1; k > 0; --k) x[k] = x[k - 1];
        x[0] = row >= q.start && row < q.end ? widened(raw_x[s]) : rows.at(q, row);
        step(q, t, i + s < count, raw_dy[s], x, dz);
      }
    }
  }

  template <int X>
  __device__ __forceinline__ void step(const Sequence& q, int64_t t, bool own, const Pack<E, VEC>& raw_dy,
                                       const Values (&x)[X], Values (&dz)[TAPS]) {
#pragma unroll
    for (int k = 0; k + 1 < TAPS; ++k) dz[k] = dz[k + 1];
    dz[TAPS - 1] = zeros();
    if (t >= q.start && t < q.end && p_dy != nullptr) {
      const Values dy = widened(raw_dy);
      Values z = bias;
      if (SILU) {
#pragma unroll
        for (int k = 0; k < X; ++k) add_product(z, weight[k], x[k]);
      }
#pragma unroll
      for (int v = 0; v < VEC; ++v) dz[TAPS - 1][v] = activated_gradient(z[v], dy[v]);
    }
    if (!own || t >= T) return;
    const int64_t kept = t - (q.end - rows.steps), at = rows.steps + t - q.start;
    Values dx = kept >= 0 && p_dfinal != nullptr ? load_values(p_dfinal + (q.n * rows.steps + kept) * rows.D) : zeros();
#pragma unroll
    for (int k = 0; k < TAPS; ++k) {
      add_product(dx, weight[k], dz[k]);
      add_product(dweight[k], x[X - 1], dz[k]);
    }
#pragma unroll
    for (int v = 0; v < VEC; ++v) dbias[v] += dz[TAPS - 1][v];
    store_values(t >= q.start ? p_dx + t * rows.D : p_dinitial + (q.n * rows.steps + at) * rows.D, dx);
  }
};

//   p_dy, p_x, p_dx [B, T, D] · p_weight [D, W], any strides · p_bias [D] or null · p_initial, p_dfinal [N, S, D] or null
//   p_dinitial [N, S, D], where there is p_initial · p_cu_seqlens [N + 1] or null
//   p_sums [blocks, W + 1, D]: gradients of the taps and the bias, of what a block does: `turns` items for each group.
//   After the runs, every item is a class of a state.
KERNEL(causal_conv1d_backward, BOUNDS)
(const E* p_dy, const E* p_x, const G* p_weight, const G* p_bias, const E* p_initial, const E* p_dfinal, E* p_dx,
 E* p_dinitial, R* p_sums, const int64_t* p_cu_seqlens, int64_t B, int64_t T, int64_t D, int64_t N, int64_t dilation,
 int64_t stride_dy_b, int64_t stride_dy_t, int64_t stride_x_b, int64_t stride_x_t, int64_t stride_w_d,
 int64_t stride_w_k, int64_t turns) {
  SHARED_DYNAMIC(R, s_sums);
  const Place at = place(blockIdx.x, D);
  const Runs runs(B, T, dilation, RUN);
  const int64_t channel = at.idle ? 0 : at.channel;
  Backward walker;
  walker.rows = {nullptr, stride_x_t, p_initial == nullptr ? nullptr : p_initial + channel, (TAPS - 1) * dilation, D};
  walker.stride_dy = stride_dy_t;
  walker.p_dfinal = p_dfinal == nullptr ? nullptr : p_dfinal + channel;
  walker.p_dinitial = p_dinitial == nullptr ? nullptr : p_dinitial + channel;
  walker.p_cu_seqlens = p_cu_seqlens, walker.N = N, walker.T = T, walker.d = dilation;
  walker.bias = parameters(p_bias == nullptr ? nullptr : p_bias + channel, 1);
  walker.dbias = zeros();
#pragma unroll
  for (int k = 0; k < TAPS; ++k) {
    walker.weight[k] = parameters(p_weight + channel * stride_w_d + k * stride_w_k, stride_w_d);
    walker.dweight[k] = zeros();
  }
  const int64_t states = p_initial == nullptr || TAPS == 1 ? 0 : N * dilation;
#pragma unroll 1
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t item = (at.block * turns + turn) * GROUPS + at.group, state = item - runs.count;
    if (at.idle || state >= states) continue;
    Sequence q = {0, 0, T};
    int64_t first, b = 0;
    if (state < 0) {
      b = q.n = runs.row(item);
      first = runs.first(item);
      if (first >= T) continue;
    } else {
      q = sequence_of(p_cu_seqlens, T, state / dilation);
      if (!PACKED) b = q.n;
      first = q.start - walker.rows.steps + state % dilation;
    }
    walker.rows.p_rows = p_x + b * stride_x_b + channel;
    walker.p_dy = p_dy == nullptr ? nullptr : p_dy + b * stride_dy_b + channel;
    walker.p_dx = p_dx + b * T * D + channel;
    walker.walk(q, first, state < 0 ? RUN : TAPS - 1);
  }
  R* p_own = p_sums + at.block * (TAPS + 1) * D + at.channel;
#pragma unroll
  for (int k = 0; k < TAPS; ++k) store_group_sums(s_sums, walker.dweight[k], p_own + k * D, at);
  store_group_sums(s_sums, walker.dbias, p_own + TAPS * D, at);
}
EXPORT(causal_conv1d_backward)

#endif
