// Softmax scan: with weights e^s, the running average of v. State (m, u, o): the largest s so far, u = sum e^(s-m), o.
//
//   m' = max(m, s)   u' = u e^(m-m') + e^(s-m')   p = e^(s-m') / u'   alpha = u e^(m-m') / u'   o' = alpha o + p v
//   backward, the other way:  R_t = do_t + alpha_{t+1} R_{t+1}   dv_t = p_t R_t
//
// Scores are one number for the D values of a head, so a pass of their own finds alpha and p [B, T, H] of all steps at
// 1/D of the bytes; what is left for the values is a linear scan, with gate alpha and input p v. The backward also
// gives <R_t, v_t> and <do_t, o_t>, from which a linear scan over [B, T, H] makes the gradients of the scores:
//
//   r_t = <do_t, o_t> - dlse_t + alpha_{t+1} r_{t+1}   ds_t = p_t (<R_t, v_t> - r_t)
//
// s = -inf is a step that is absent: p = 0, and a value with p = 0 is not read even if it is NaN. alpha is exactly 0
// only where nothing came before; one that underflows is the smallest normal number.
//
// Constants, beside those of device.h: PASS · STORAGE of v (SCORE of s) · MARCH 1 or 0.
// Limit: device memory; 2 (forward) or 4 (backward) accesses of sizeof(S) a step and value.
#include "scan/device.h"

#define SCORES 1     // s -> m, u, lse, alpha, p
#define WEIGHTS 2    // s, m, u -> alpha, p
#define FORWARD 3    // alpha, p, v -> o
#define BACKWARD 4   // alpha, p, v, o, do -> dv, <R, v>, <do, o>
#define GRADIENTS 5  // alpha, p, <R, v>, <do, o>, dlse -> ds

using S = STORAGE;
using R = Real<S>;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// ------------------------------------------------------------------------------------------------ scores

#if PASS == SCORES || PASS == WEIGHTS || PASS == GRADIENTS
using G = SCORE;
#endif

#if PASS == SCORES || PASS == WEIGHTS

// u e^m. u is a double, so that its value, once rounded to R, does not depend on where slices and tiles begin: alpha
// and p are quotients of rounded u, each in two of them, and the errors of u cancel from step to step.
struct LogSum {
  R m;
  double u;
};
__device__ __forceinline__ LogSum of_score(R s) { return {s, s == -R(INFINITY) ? 0.0 : 1.0}; }
__device__ __forceinline__ LogSum of_lse(const R* p_lse, int64_t place) {  // null: nothing came before
  return p_lse == nullptr ? of_score(-R(INFINITY)) : of_score(p_lse[place]);
}

// The larger of two maxima, and what sums relative to them are worth relative to it. The larger itself is worth exactly
// 1: +inf once is the limit of large scores, and twice is NaN.
struct Larger {
  R m, past, present;
};
__device__ __forceinline__ Larger larger(R past, R present) {
  const bool above = present > past;
  const R high = above ? present : past, low = above ? past : present;
  const R weight = exponential(low - (high == -R(INFINITY) ? R(0) : high));  // any finite base will do if all is absent
  return {high, above ? weight : R(1), above ? R(1) : weight};
}
__device__ __forceinline__ LogSum sum(const Larger& of, LogSum past, LogSum present) {
  return {of.m, of.past * past.u + of.present * present.u};
}

struct Shares {
  R alpha, p;
};
// 0 stands for nothing there: what is merely too small stays the smallest normal number.
__device__ __forceinline__ R share(R weight, R part, R whole) {
  const R share = weight * part / whole;
  return share == 0 && part != 0 ? Limits<R>::SMALLEST_NORMAL : share;
}
__device__ __forceinline__ Shares shares(const Larger& of, LogSum past, LogSum present, LogSum after) {
  const R u = R(after.u);
  if (u == 0) return {0, 0};
  return {share(of.past, R(past.u), u), share(of.present, R(present.u), u)};
}

#endif

#if PASS == SCORES

// Some steps, to be added to what came before; `cut`: a sequence began among them, and what came before counts no more.
struct Scored {
  LogSum steps;
  uint32_t cut;

  using Running = Scored;
  static __device__ __forceinline__ Scored identity() { return {{-R(INFINITY), 0}, 0}; }
  static __device__ __forceinline__ Scored constant(LogSum state) { return {state, 1}; }
  static __device__ __forceinline__ Scored held(LogSum state) { return {state, 1}; }
  static __device__ __forceinline__ Scored run(const Scored& scored) { return scored; }
  __device__ __forceinline__ LogSum state() const { return steps; }
  __device__ __forceinline__ Scored map() const { return *this; }
  __device__ __forceinline__ void append(R s) { steps = sum(larger(steps.m, s), steps, of_score(s)); }
  __device__ __forceinline__ LogSum operator()(LogSum before) const {
    return cut ? steps : sum(larger(before.m, steps.m), before, steps);
  }
  __device__ __forceinline__ Scored then(const Scored& newer) const { return {newer(steps), cut | newer.cut}; }
};

struct Scores {
  static constexpr int SUMS = 0, BYTES = sizeof(Pack<G, 1>);
  using State = LogSum;
  using Map = Scored;
  using Raw = R;

  const G* p_s;  // [B, T, H]
  int64_t stride_b, stride_t;
  const R* p_initial;                    // [N, H], or null
  R *p_lse, *p_m, *p_u, *p_alpha, *p_p;  // [B, T, H], m and u may be null
  int64_t H, head;
  Line<const G> s;
  Line<R> lse, m, u, alpha, p;
  Pack<G, 1>* s_s;

  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t lane) {
    head = lane;
    const int64_t row = b * walk.T * H + head;
    s = walk.line(p_s + b * stride_b + head, stride_t);
    lse = walk.line(p_lse + row, H);
    m = walk.line(p_m + row, H);
    u = walk.line(p_u + row, H);
    alpha = walk.line(p_alpha + row, H);
    p = walk.line(p_p + row, H);
  }
  __device__ __forceinline__ void buffers(char* p_shared) { s_s = own_slots<Pack<G, 1>>(p_shared); }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const { copy_to_slot(s_s[slot * THREADS], s(i)); }
  __device__ __forceinline__ R read(int slot) const { return widen(s_s[slot * THREADS][0]); }
  __device__ __forceinline__ void extend(R score, Scored (&running)[1]) const { running[0].append(score); }
  __device__ __forceinline__ void step(int64_t i, R score, LogSum (&carry)[1], int64_t) const {
    const Larger of = larger(carry[0].m, score);
    const LogSum after = sum(of, carry[0], of_score(score));
    const Shares share = shares(of, carry[0], of_score(score), after);
    carry[0] = after;
    const R rounded = R(after.u);
    *alpha(i) = share.alpha;
    *p(i) = share.p;
    *lse(i) = rounded == 0 ? -R(INFINITY) : after.m + logarithm(rounded);
    if (p_m != nullptr) *m(i) = after.m;
    if (p_u != nullptr) *u(i) = rounded;
  }
  __device__ __forceinline__ LogSum initial(int64_t n, int) const { return of_lse(p_initial, n * H + head); }
  __device__ __forceinline__ void finish(int64_t, const LogSum (&)[1]) const {}
};

//   p_s [B, T, H] · p_initial [N, H] or null · p_lse, p_m, p_u, p_alpha, p_p [B, T, H], p_m and p_u may be null
//   p_cu_seqlens [N + 1] or null · p_workspace and lanes, group: of tiles, in device.h
KERNEL(softmax_scan_scores, BOUNDS)
(const G* p_s, const R* p_initial, R* p_lse, R* p_m, R* p_u, R* p_alpha, R* p_p, const int64_t* p_cu_seqlens,
 uint64_t* p_workspace, int64_t B, int64_t T, int64_t H, int64_t N, int64_t stride_b, int64_t stride_t, int64_t lanes,
 int64_t group, bool flip) {
  Scores scores = {p_s, stride_b, stride_t, p_initial, p_lse, p_m, p_u, p_alpha, p_p, H};
  tiles(scores, Walk{T, N, p_cu_seqlens, flip}, B, H, lanes, group, p_workspace);
}
EXPORT(softmax_scan_scores)

#elif PASS == WEIGHTS

// alpha and p again, from the states after the steps: one thread a step and head.
//   p_s [B, T, H] · p_m, p_u, p_alpha, p_p [B, T, H] · p_initial [N, H] or null · p_cu_seqlens [N + 1] or null
KERNEL(softmax_scan_weights, THREADS)
(const G* p_s, const R* p_m, const R* p_u, const R* p_initial, R* p_alpha, R* p_p, const int64_t* p_cu_seqlens,
 int64_t B, int64_t T, int64_t H, int64_t N, int64_t stride_b, int64_t stride_t, bool flip) {
  const Walk walk = {T, N, p_cu_seqlens, flip};
  const int64_t place = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (place >= B * T * H) return;
  const int64_t head = place % H, t = place / H % T, b = place / H / T;
  const int64_t i = walk.time(t);
  const Span span = walk.find(i, b);
  const int64_t before = place + (flip ? H : -H);
  const LogSum past = i == span.begin ? of_lse(p_initial, span.n * H + head) : LogSum{p_m[before], p_u[before]};
  const LogSum score = of_score(widen(p_s[b * stride_b + t * stride_t + head]));
  const Shares share = shares(larger(past.m, score.m), past, score, LogSum{p_m[place], p_u[place]});
  p_alpha[place] = share.alpha;
  p_p[place] = share.p;
}
EXPORT(softmax_scan_weights)

// ------------------------------------------------------------------------------------------------ values

#elif PASS == FORWARD

struct Forward {
  static constexpr int SUMS = 0, BYTES = sizeof(Pack<S, VEC>) + 2 * sizeof(R);
  using State = R;
  using Map = Affine<R, R>;
  struct Raw {
    Pack<S, VEC> v;
    R alpha, p;
  };

  const S* p_v;  // [B, T, H D]
  int64_t stride_b, stride_t;
  const R *p_alpha, *p_p;  // [B, T, H]
  const R* p_initial;      // [N, H D], or null: zeros
  S* p_o;                  // [B, T, H D]
  int64_t H, D, channel;
  Line<const S> v;
  Line<const R> alpha, p;
  Line<S> o;
  Pack<S, VEC>* s_v;
  Pack<R, 1>*s_alpha, *s_p;

  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t lane) {
    channel = lane * VEC;
    const int64_t row = b * walk.T * H;
    v = walk.line(p_v + b * stride_b + channel, stride_t);
    o = walk.line(p_o + row * D + channel, H * D);
    alpha = walk.line(p_alpha + row + channel / D, H);
    p = walk.line(p_p + row + channel / D, H);
  }
  __device__ __forceinline__ void buffers(char* p_shared) {
    s_v = own_slots<Pack<S, VEC>>(p_shared);
    s_alpha = own_slots<Pack<R, 1>>(p_shared);
    s_p = own_slots<Pack<R, 1>>(p_shared);
  }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const {
    copy_to_slot(s_v[slot * THREADS], v(i));
    copy_to_slot(s_alpha[slot * THREADS], alpha(i));
    copy_to_slot(s_p[slot * THREADS], p(i));
  }
  __device__ __forceinline__ Raw read(int slot) const {
    return {s_v[slot * THREADS], s_alpha[slot * THREADS][0], s_p[slot * THREADS][0]};
  }
  static __device__ __forceinline__ R input(const Raw& raw, int v) {
    return raw.p == 0 ? R(0) : raw.p * widen(raw.v, v);
  }
  __device__ __forceinline__ void extend(const Raw& raw, typename Map::Running (&running)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) running[v].append(raw.alpha, input(raw, v));
  }
  __device__ __forceinline__ void step(int64_t i, const Raw& raw, R (&carry)[VEC], int64_t) const {
    Pack<S, VEC> pack;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const R x = input(raw, v);
      carry[v] = raw.alpha == 0 ? x : multiply_add(raw.alpha, carry[v], x);
      pack[v] = narrow<S>(carry[v]);
    }
    store<S, VEC>(o(i), pack);
  }
  __device__ __forceinline__ R initial(int64_t n, int v) const {
    return p_initial == nullptr ? R(0) : p_initial[n * H * D + channel + v];
  }
  __device__ __forceinline__ void finish(int64_t, const R (&)[VEC]) const {}
};

//   p_v [B, T, H, D] · p_alpha, p_p [B, T, H] · p_initial [N, H, D] or null · p_o [B, T, H, D]
//   p_cu_seqlens [N + 1] or null · p_workspace and lanes, group: of tiles, in device.h
KERNEL(softmax_scan_forward, BOUNDS)
(const S* p_v, const R* p_alpha, const R* p_p, const R* p_initial, S* p_o, const int64_t* p_cu_seqlens,
 uint64_t* p_workspace, int64_t B, int64_t T, int64_t H, int64_t D, int64_t N, int64_t stride_b, int64_t stride_t,
 int64_t lanes, int64_t group, bool flip) {
  const Walk walk = {T, N, p_cu_seqlens, flip};
  Forward forward = {p_v, stride_b, stride_t, p_alpha, p_p, p_initial, p_o, H, D};
#if MARCH
  march(forward, walk, N, H * D / VEC);
#else
  tiles(forward, walk, B, H * D, lanes, group, p_workspace);
#endif
}
EXPORT(softmax_scan_forward)

#elif PASS == BACKWARD

struct Backward {
  static constexpr int SUMS = 0, BYTES = 3 * sizeof(Pack<S, VEC>) + 2 * sizeof(R);
  using State = R;
  using Map = Affine<R, R>;
  struct Raw {
    Pack<S, VEC> grad_o, v, o;
    R alpha, p;
  };

  const S *p_do, *p_v;  // [B, T, H D]
  int64_t stride_do_b, stride_do_t, stride_v_b, stride_v_t;
  const S* p_o;                  // [B, T, H D]
  const R *p_alpha, *p_p;        // [B, T, H]
  S* p_dv;                       // [B, T, H D]
  R *p_product_v, *p_product_o;  // [B, T, H, D / VEC / seam]: parts of <R, v> and <do, o>
  R* p_dinitial;                 // [N, H D]
  int64_t seam;                  // neighbouring lanes of one head, a power of two
  int64_t H, D, lane;
  Line<const S> grad_o, v, o;
  Line<const R> alpha, p;
  Line<S> dv;
  Line<R> product_v, product_o;
  Pack<S, VEC>*s_do, *s_v, *s_o;
  Pack<R, 1>*s_alpha, *s_p;

  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t lane) {
    this->lane = lane;
    const int64_t channel = lane * VEC, row = b * walk.T * H, columns = H * D / VEC;
    grad_o = walk.line(p_do + b * stride_do_b + channel, stride_do_t);
    v = walk.line(p_v + b * stride_v_b + channel, stride_v_t);
    o = walk.line(p_o + row * D + channel, H * D);
    dv = walk.line(p_dv + row * D + channel, H * D);
    alpha = walk.line(p_alpha + row + channel / D, H);
    p = walk.line(p_p + row + channel / D, H);
    const int64_t place = (b * walk.T * columns + lane) / seam;
    product_v = walk.line(p_product_v + place, columns / seam);
    product_o = walk.line(p_product_o + place, columns / seam);
  }
  __device__ __forceinline__ void buffers(char* p_shared) {
    s_do = own_slots<Pack<S, VEC>>(p_shared);
    s_v = own_slots<Pack<S, VEC>>(p_shared);
    s_o = own_slots<Pack<S, VEC>>(p_shared);
    s_alpha = own_slots<Pack<R, 1>>(p_shared);
    s_p = own_slots<Pack<R, 1>>(p_shared);
  }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const {
    copy_to_slot(s_do[slot * THREADS], grad_o(i));
    copy_to_slot(s_v[slot * THREADS], v(i));
    copy_to_slot(s_o[slot * THREADS], o(i));
    copy_to_slot(s_alpha[slot * THREADS], alpha(i));
    copy_to_slot(s_p[slot * THREADS], p(i));
  }
  __device__ __forceinline__ Raw read(int slot) const {
    return {s_do[slot * THREADS], s_v[slot * THREADS], s_o[slot * THREADS], s_alpha[slot * THREADS][0],
            s_p[slot * THREADS][0]};
  }
  __device__ __forceinline__ void extend(const Raw& raw, typename Map::Running (&running)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      running[v].append(raw.alpha, raw.alpha == 0 ? R(0) : raw.alpha * widen(raw.grad_o, v));
    }
  }
  __device__ __forceinline__ void step(int64_t i, const Raw& raw, R (&carry)[VEC], int64_t) const {
    Pack<S, VEC> pack;
    R sum_v = 0, sum_o = 0;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const R own = widen(raw.grad_o, v), total = carry[v] + own;
      sum_o = multiply_add(own, R(widen(raw.o, v)), sum_o);
      sum_v = multiply_add(total, R(widen(raw.v, v)), sum_v);
      pack[v] = narrow<S>(raw.p == 0 ? R(0) : raw.p * total);
      carry[v] = raw.alpha == 0 ? R(0) : raw.alpha * total;
    }
    store<S, VEC>(dv(i), pack);
    sum_v = sum_lanes(sum_v, int(seam));
    sum_o = sum_lanes(sum_o, int(seam));
    if (lane % seam == 0) {
      *product_v(i) = sum_v;
      *product_o(i) = sum_o;
    }
  }
  __device__ __forceinline__ R initial(int64_t, int) const { return 0; }
  __device__ __forceinline__ void finish(int64_t n, const R (&carry)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; ++v) p_dinitial[n * H * D + lane * VEC + v] = carry[v];
  }
};

//   p_do, p_v, p_o, p_dv [B, T, H, D] · p_alpha, p_p [B, T, H] · p_product_v, p_product_o: see Backward
//   p_dinitial [N, H, D] · p_cu_seqlens [N + 1] or null · flip: the walk begins at the last step, unless reverse
KERNEL(softmax_scan_backward, BOUNDS)
(const S* p_do, const S* p_v, const S* p_o, const R* p_alpha, const R* p_p, S* p_dv, R* p_product_v, R* p_product_o,
 R* p_dinitial, const int64_t* p_cu_seqlens, uint64_t* p_workspace, int64_t B, int64_t T, int64_t H, int64_t D,
 int64_t N, int64_t stride_do_b, int64_t stride_do_t, int64_t stride_v_b, int64_t stride_v_t, int64_t seam,
 int64_t lanes, int64_t group, bool flip) {
  const Walk walk = {T, N, p_cu_seqlens, flip};
  Backward backward = {p_do, p_v,  stride_do_b, stride_do_t, stride_v_b, stride_v_t, p_o, p_alpha,
                       p_p,  p_dv, p_product_v, p_product_o, p_dinitial, seam,       H,   D};
#if MARCH
  march(backward, walk, N, H * D / VEC);
#else
  tiles(backward, walk, B, H * D, lanes, group, p_workspace);
#endif
}
EXPORT(softmax_scan_backward)

// ------------------------------------------------------------------------------------------------ gradients of scores

#elif PASS == GRADIENTS

struct Gradients {
  static constexpr int SUMS = 0, BYTES = 5 * sizeof(R);
  using State = R;
  using Map = Affine<R, R>;
  struct Raw {
    R alpha, p, product_v, gradient;
  };

  const R *p_alpha, *p_p, *p_product_v, *p_product_o, *p_dlse;  // [B, T, H]; dlse null: zeros
  G* p_ds;                                                      // [B, T, H]
  R* p_dinitial;                                                // [N, H] alpha_0 r_0
  int64_t H, head;
  Line<const R> alpha, p, product_v, product_o, dlse;
  Line<G> ds;
  Pack<R, 1>*s_alpha, *s_p, *s_product_v, *s_product_o, *s_dlse;

  __device__ __forceinline__ void place(const Walk& walk, int64_t b, int64_t lane) {
    head = lane;
    const int64_t row = b * walk.T * H + head;
    alpha = walk.line(p_alpha + row, H);
    p = walk.line(p_p + row, H);
    product_v = walk.line(p_product_v + row, H);
    product_o = walk.line(p_product_o + row, H);
    dlse = walk.line(p_dlse + row, H);
    ds = walk.line(p_ds + row, H);
  }
  __device__ __forceinline__ void buffers(char* p_shared) {
    s_alpha = own_slots<Pack<R, 1>>(p_shared);
    s_p = own_slots<Pack<R, 1>>(p_shared);
    s_product_v = own_slots<Pack<R, 1>>(p_shared);
    s_product_o = own_slots<Pack<R, 1>>(p_shared);
    s_dlse = own_slots<Pack<R, 1>>(p_shared);
  }
  __device__ __forceinline__ void fetch(int64_t i, int slot) const {
    copy_to_slot(s_alpha[slot * THREADS], alpha(i));
    copy_to_slot(s_p[slot * THREADS], p(i));
    copy_to_slot(s_product_v[slot * THREADS], product_v(i));
    copy_to_slot(s_product_o[slot * THREADS], product_o(i));
    if (p_dlse != nullptr) copy_to_slot(s_dlse[slot * THREADS], dlse(i));
  }
  __device__ __forceinline__ Raw read(int slot) const {
    const R own = p_dlse == nullptr ? R(0) : s_dlse[slot * THREADS][0];
    return {s_alpha[slot * THREADS][0], s_p[slot * THREADS][0], s_product_v[slot * THREADS][0],
            s_product_o[slot * THREADS][0] - own};
  }
  __device__ __forceinline__ void extend(const Raw& raw, typename Map::Running (&running)[1]) const {
    running[0].append(raw.alpha, raw.alpha == 0 ? R(0) : raw.alpha * raw.gradient);
  }
  __device__ __forceinline__ void step(int64_t i, const Raw& raw, R (&carry)[1], int64_t) const {
    const R r = raw.gradient + carry[0];
    *ds(i) = narrow<G>(raw.p == 0 ? R(0) : raw.p * (raw.product_v - r));
    carry[0] = raw.alpha == 0 ? R(0) : raw.alpha * r;
  }
  __device__ __forceinline__ R initial(int64_t, int) const { return 0; }
  __device__ __forceinline__ void finish(int64_t n, const R (&carry)[1]) const { p_dinitial[n * H + head] = carry[0]; }
};

//   p_alpha, p_p, p_product_v, p_product_o, p_dlse, p_ds [B, T, H], p_dlse may be null · p_dinitial [N, H]
//   p_cu_seqlens [N + 1] or null · p_workspace and lanes, group: of tiles · flip: as in the backward
KERNEL(softmax_scan_gradients, BOUNDS)
(const R* p_alpha, const R* p_p, const R* p_product_v, const R* p_product_o, const R* p_dlse, G* p_ds, R* p_dinitial,
 const int64_t* p_cu_seqlens, uint64_t* p_workspace, int64_t B, int64_t T, int64_t H, int64_t N, int64_t lanes,
 int64_t group, bool flip) {
  Gradients gradients = {p_alpha, p_p, p_product_v, p_product_o, p_dlse, p_ds, p_dinitial, H};
  tiles(gradients, Walk{T, N, p_cu_seqlens, flip}, B, H, lanes, group, p_workspace);
}
EXPORT(softmax_scan_gradients)

#endif
