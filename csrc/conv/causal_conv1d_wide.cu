// causal_conv1d of any number of taps: OUTPUTS steps of a class, and as many rows, stay in registers while the taps pass
// by one after the other; the tap and one row are read for each, through the caches. Where OUTPUTS is 8 and a lane 16
// bytes that is as many bytes from the first cache as its bandwidth gives beside the multiplications.
//
//   causal_conv1d_wide   PASS FORWARD: y · DZ: dz, for the gradients · DX: dx, classes walked backwards in time
//   causal_conv1d_taps   gradients of TILE taps in registers; the rows of a run pass by
//
// Constants, beside those of device.h: PASS · DZ_STORAGE of dz, R where there is an activation · OUTPUTS or TILE, RUN
#define FORWARD 0
#define DZ 1
#define DX 2
#define TAPS_GRADIENT 3
#include "conv/device.h"

using Z = DZ_STORAGE;

#if PASS != TAPS_GRADIENT

// sums[r] += sum_k weight_k row(k + r)
template <class Row>
__device__ __forceinline__ void add_taps(Values (&sums)[OUTPUTS], const R* p_weight, int64_t W, int64_t D, Row row) {
  Values window[OUTPUTS];  // at tap k row i is at i % OUTPUTS, for k <= i < k + OUTPUTS
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) window[i] = row(i);
#pragma unroll 1
  for (int64_t first = 0; first < W; first += OUTPUTS) {
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) {
      if (first + j >= W) break;
      const Values weight = load_values(p_weight + (first + j) * D);
#pragma unroll
      for (int r = 0; r < OUTPUTS; ++r) add_product(sums[r], weight, window[(r + j) % OUTPUTS]);
      if (first + j + 1 < W) window[j] = row(first + j + OUTPUTS);
    }
  }
}

//   p_weight [W, D], p_bias [D] in R · p_x, p_out [B, T, D] · p_state, p_state_out [N, S, D] or null · p_cu_seqlens [N + 1]
//   FORWARD  p_x and p_state are read, p_out is y, p_state_out the final state
//   DZ       p_out is dz [B, T, D] in Z; p_dy
//   DX       p_x is dz in Z, p_state dfinal, p_out dx, p_state_out dinitial
KERNEL(causal_conv1d_wide, BOUNDS)
#if PASS == DX
(const Z* p_x, const R* p_weight, const R* p_bias, const E* p_dy, const E* p_state, E* p_out, E* p_state_out,
#elif PASS == DZ
(const E* p_x, const R* p_weight, const R* p_bias, const E* p_dy, const E* p_state, Z* p_out, E* p_state_out,
#else
(const E* p_x, const R* p_weight, const R* p_bias, const E* p_dy, const E* p_state, E* p_out, E* p_state_out,
#endif
 const int64_t* p_cu_seqlens, int64_t B, int64_t T, int64_t D, int64_t N, int64_t W, int64_t dilation,
 int64_t stride_x_b, int64_t stride_x_t, int64_t stride_dy_b, int64_t stride_dy_t) {
  const Place at = place(blockIdx.x, D);
  if (at.idle) return;
  const Runs runs(B, T, dilation, OUTPUTS);
  const int64_t item = at.block * GROUPS + at.group, state = item - runs.count, S = (W - 1) * dilation;
  p_weight += at.channel;
  Sequence q = {0, 0, T};
  int64_t first, last, b = 0;  // steps first, first + dilation, ... before `last`
  if (state < 0) {
    b = q.n = runs.row(item);
    first = runs.first(item);
    last = least(first + OUTPUTS * dilation, T);
  } else {
    const int64_t pieces = ceil_div(W - 1, OUTPUTS), of_state = pieces * dilation;
    if (p_state_out == nullptr || PASS == DZ || of_state == 0 || state >= N * of_state) return;
    q = sequence_of(p_cu_seqlens, T, state / of_state);
    if (!PACKED) b = q.n;
    const int64_t begin = (PASS == FORWARD ? q.end : q.start) - S;
    first = begin + state % of_state / dilation * (OUTPUTS * dilation) + state % dilation;
    last = least(first + OUTPUTS * dilation, begin + S);
  }

#if PASS == DX
  const E* p_dfinal = p_state == nullptr ? nullptr : p_state + at.channel;
  const Z* p_rows = p_x + b * stride_x_b + at.channel;
  while (first < last) {
    if (PACKED && state < 0) q = sequence_at(p_cu_seqlens, N, T, first);
    const int64_t end = state < 0 ? least(q.end, last) : last, latest = first + (OUTPUTS - 1) * dilation;
    Values sums[OUTPUTS];  // of step latest - r dilation
#pragma unroll
    for (int r = 0; r < OUTPUTS; ++r) {
      const int64_t t = latest - r * dilation, kept = t - (q.end - S);
      const bool survives = p_dfinal != nullptr && t < end && kept >= 0;
      sums[r] = survives ? load_values(p_dfinal + (q.n * S + kept) * D) : zeros();
    }
    add_taps(sums, p_weight, W, D, [&](int64_t i) {
      const int64_t t = latest + S - i * dilation;
      return t >= q.start && t < q.end ? load_values(p_rows + t * stride_x_t) : zeros();
    });
#pragma unroll
    for (int r = 0; r < OUTPUTS; ++r) {
      const int64_t t = latest - r * dilation;
      if (t >= end) continue;
      E* out = t >= q.start ? p_out + (b * T + t) * D : p_state_out + (q.n * S + S + t - q.start) * D;
      store_values(out + at.channel, sums[r]);
    }
    first += ceil_div(end - first, dilation) * dilation;
  }
#else
  const Rows<E> rows = {p_x + b * stride_x_b + at.channel, stride_x_t,
                        p_state == nullptr ? nullptr : p_state + at.channel, S, D};
#if PASS == FORWARD
  if (state >= 0) {  // rows of the last state, bit for bit
    for (int64_t t = first; t < last; t += dilation) {
      const E* row = rows.address(q, t);
      Pack<E, VEC> pack = {};
      if (row != nullptr) pack = load<E, VEC>(row);
      store(p_state_out + (q.n * S + S + t - q.end) * D + at.channel, pack);
    }
    return;
  }
#endif
  const Values bias = parameters(p_bias == nullptr ? nullptr : p_bias + at.channel, 1);
  while (first < last) {
    if (PACKED) q = sequence_at(p_cu_seqlens, N, T, first);
    const int64_t end = least(q.end, last);
    Values sums[OUTPUTS];  // of step first + r dilation
#pragma unroll
    for (int r = 0; r < OUTPUTS; ++r) sums[r] = bias;
    add_taps(sums, p_weight, W, D, [&](int64_t i) { return rows.at(q, first - S + i * dilation); });
#pragma unroll
    for (int r = 0; r < OUTPUTS; ++r) {
      const int64_t t = first + r * dilation;
      if (t >= end) continue;
#if PASS == DZ
      const Values dy = load_values(p_dy + b * stride_dy_b + t * stride_dy_t + at.channel);
#pragma unroll
      for (int v = 0; v < VEC; ++v) sums[r][v] = activated_gradient(sums[r][v], dy[v]);
#else
#pragma unroll
      for (int v = 0; v < VEC; ++v) sums[r][v] = activated(sums[r][v]);
#endif
      store_values(p_out + (b * T + t) * D + at.channel, sums[r]);
    }
    first += ceil_div(end - first, dilation) * dilation;
  }
#endif
}
EXPORT(causal_conv1d_wide)

#else

//   p_dz [B, T, D] in Z · p_x [B, T, D] · p_initial [N, S, D] or null · p_cu_seqlens [N + 1] or null
//   p_sums [blocks, W + 1, D]: gradients of the taps and the bias, of what a block does: `turns` runs for each group.
//   A block has one tile of taps.
KERNEL(causal_conv1d_taps, BOUNDS)
(const Z* p_dz, const E* p_x, const E* p_initial, R* p_sums, const int64_t* p_cu_seqlens, int64_t B, int64_t T,
 int64_t D, int64_t N, int64_t W, int64_t dilation, int64_t stride_dz_b, int64_t stride_dz_t, int64_t stride_x_b,
 int64_t stride_x_t, int64_t turns) {
  SHARED_DYNAMIC(R, s_sums);
  const int64_t tiles = ceil_div(W, TILE), tap = int64_t(blockIdx.x) % tiles * TILE;
  const Place at = place(blockIdx.x / tiles, D);
  const Runs runs(B, T, dilation, RUN);
  const int64_t channel = at.idle ? 0 : at.channel;
  Values sums[TILE], bias = zeros();
#pragma unroll
  for (int k = 0; k < TILE; ++k) sums[k] = zeros();
#pragma unroll 1
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t item = (at.block * turns + turn) * GROUPS + at.group;
    if (at.idle || item >= runs.count) continue;
    const int64_t b = runs.row(item), first = runs.first(item), end = least(first + RUN * dilation, T);
    const Rows<E> rows = {p_x + b * stride_x_b + channel, stride_x_t,
                          p_initial == nullptr ? nullptr : p_initial + channel, (W - 1) * dilation, D};
    const Z* p_rows = p_dz + b * stride_dz_b + channel;
    Sequence q = {b, 0, T};
    Values window[TILE];  // x_{t - (W-1-tap-k) d}
    const auto enter = [&](int64_t t) {
      if (PACKED) q = sequence_at(p_cu_seqlens, N, T, t);
#pragma unroll
      for (int k = 1; k < TILE; ++k) window[k] = rows.at(q, t - (W - tap - k) * dilation);
    };
    enter(first);
#pragma unroll 4
    for (int64_t t = first; t < end; t += dilation) {
      if (PACKED && t >= q.end) enter(t);
#pragma unroll
      for (int k = 0; k + 1 < TILE; ++k) window[k] = window[k + 1];
      window[TILE - 1] = rows.at(q, t - (W - tap - TILE) * dilation);
      const Values dz = load_values(p_rows + t * stride_dz_t);
#pragma unroll
      for (int k = 0; k < TILE; ++k) add_product(sums[k], dz, window[k]);
#pragma unroll
      for (int v = 0; v < VEC; ++v) bias[v] += dz[v];
    }
  }
  R* p_own = p_sums + at.block * (W + 1) * D + at.channel;
#pragma unroll
  for (int k = 0; k < TILE; ++k) {
    if (tap + k < W) store_group_sums(s_sums, sums[k], p_own + (tap + k) * D, at);
  }
  if (tap == 0) store_group_sums(s_sums, bias, p_own + W * D, at);
}
EXPORT(causal_conv1d_taps)

#endif
