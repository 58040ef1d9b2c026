// Summaries of spans, and running pools down the columns of a grid. See combiner.h.
//
// Rows of a span may lie a page apart, so a pass takes whole cache lines of each: GROUP vectors of channels at a time.
// A maximum is the first of equal ones, and a NaN is above all numbers.
#include "combiner.h"

#include "../common/vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

constexpr int GROUP = 4;

// The integer in the place of a number.
template <class T>
SEQOPS_INLINE int64_t integer_at(const T* p) {
  decltype(Bits<T>{}[0] + 0) value;
  static_assert(sizeof(value) == sizeof(T));
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

template <class T>
SEQOPS_INLINE Vector<T> choose(Bits<T> mask, Vector<T> yes, Vector<T> no) {
  return (Vector<T>)((mask & (Bits<T>)yes) | (~mask & (Bits<T>)no));
}

// Whether x takes the place of `best`, of which x comes after or (OR_EQUAL) before.
template <class T, bool OR_EQUAL = false>
SEQOPS_INLINE Bits<T> takes(Vector<T> x, Vector<T> best) {
  const Bits<T> above = OR_EQUAL ? (Bits<T>)(x >= best) : (Bits<T>)(x > best);
  const Bits<T> nan = (Bits<T>)(x != x);
  return OR_EQUAL ? (above | nan) : (above | (nan & (Bits<T>)(best == best)));
}

template <class T>
SEQOPS_INLINE T sum_of(Vector<T> v) {
  T sum = v[0];
  if constexpr (LANES<T> >= 4) {
    Bits<T> lane;
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; ++i) lane[i] = i;
#pragma GCC unroll 4
    for (int half = LANES<T> / 2; half >= 1; half /= 2) v += permute<T>(v, lane ^ half);
    sum = v[0];
  } else {
    for (int i = 1; i < LANES<T>; ++i) sum += v[i];
  }
  return sum;
}

// Calls step(c, n, G) for channels c, ..., with vectors of n valid lanes, GROUP or one at a time.
template <class T, class Step>
SEQOPS_INLINE void for_channels(int64_t D, Step step) {
  constexpr int64_t L = LANES<T>;
  int64_t c = 0;
  for (; c + GROUP * L <= D; c += GROUP * L) step.template operator()<GROUP>(c, L);
  for (; c + L <= D; c += L) step.template operator()<1>(c, L);
  if (c < D) step.template operator()<1>(c, D - c);
}

template <class S>
struct Rows {  // of one head
  const S* data;
  int64_t stride;
  Rows(const HeadRows& x, int64_t b, int64_t h, int64_t first)
      : data(static_cast<const S*>(x.data) + b * x.b + h * x.h + first * x.t), stride(x.t) {}
  SEQOPS_INLINE const S* operator[](int64_t j) const { return data + j * stride; }
};

template <class T>
SEQOPS_INLINE T* row_at(const HeadRows& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<T*>(x.data) + b * x.b + t * x.t + h * x.h;
}

// The pool of n rows; `at`, where wanted: which of them has the maximum, as integers of the width of T.
template <class S, class T>
void pool_rows(const Rows<S>& x, int64_t n, int64_t D, bool mean, T* value, T* at) {
  using V = Vector<T>;
  for_channels<T>(D, [&]<int G>(int64_t c, int64_t lanes) __attribute__((always_inline)) {
    constexpr int64_t L = LANES<T>;
    V best[G];
    Bits<T> index[G] = {};
    for (int g = 0; g < G; ++g) best[g] = load(x[0] + c + g * L, lanes);
    if (mean) {
      for (int64_t j = 1; j < n; ++j) {
        for (int g = 0; g < G; ++g) best[g] += load(x[j] + c + g * L, lanes);
      }
      for (int g = 0; g < G; ++g) best[g] = best[g] / static_cast<T>(n);
    } else {
      Bits<T> number = {};
      for (int64_t j = 1; j < n; ++j) {
        number += 1;
        for (int g = 0; g < G; ++g) {
          const V value = load(x[j] + c + g * L, lanes);
          const Bits<T> take = takes<T>(value, best[g]);
          best[g] = choose<T>(take, value, best[g]);
          index[g] = (take & number) | (~take & index[g]);
        }
      }
    }
    for (int g = 0; g < G; ++g) {
      store<T>(value + c + g * L, best[g], lanes);
      if (at != nullptr) store<T>(at + c + g * L, (V)index[g], lanes);
    }
  });
}

// out_j = scale <x_j, with>
template <class S, class T>
void products(const Rows<S>& x, int64_t n, int64_t D, const T* with, T scale, T* out) {
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  const auto rows = [&]<int G>(int64_t j) __attribute__((always_inline)) {
    V sums[G] = {};
    for (int64_t c = 0; c < D; c += L) {
      const int64_t lanes = c + L <= D ? L : D - c;
      const V w = load(with + c, lanes);
      for (int g = 0; g < G; ++g) sums[g] += w * load(x[j + g] + c, lanes);
    }
    for (int g = 0; g < G; ++g) out[j + g] = scale * sum_of<T>(sums[g]);
  };
  int64_t j = 0;
  for (; j + GROUP <= n; j += GROUP) rows.template operator()<GROUP>(j);
  for (; j < n; ++j) rows.template operator()<1>(j);
}

// Scores become weights that sum to 1. There is room for whole vectors.
template <class T>
void softmax(T* scores, int64_t n) {
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  T most = scores[0];
  for (int64_t j = 1; j < n; ++j) most = scores[j] > most || scores[j] != scores[j] ? scores[j] : most;
  const int64_t whole = (n + L - 1) / L * L;
  for (int64_t j = n; j < whole; ++j) scores[j] = -__builtin_inf();
  V total = {};
  for (int64_t j = 0; j < whole; j += L) {
    const V weight = exp<T>(load(scores + j) - most);
    store<T>(scores + j, weight);
    total += weight;
  }
  const T sum = sum_of<T>(total);
  for (int64_t j = 0; j < whole; j += L) store<T>(scores + j, load(scores + j) / sum);
}

template <class S>
void span_summaries(const SpanSummaries& k, int64_t b, int64_t h, const Span& span, void* scratch) {
  using T = Compute<S>;
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  const int64_t n = span.end - span.first, D = k.D;
  T *weights = static_cast<T*>(scratch), *qhat = weights + 2 * SpanSummaries::padded(n);
  T* khat = qhat + SpanSummaries::padded(D);
  const Rows<S> q(k.q, b, h, span.first), keys(k.k, b, h, span.first), v(k.v, b, h, span.first);
  pool_rows<S, T>(q, n, D, k.mean, qhat, nullptr);
  pool_rows<S, T>(keys, n, D, k.mean, khat, nullptr);
  products<S, T>(keys, n, D, qhat, static_cast<T>(k.scale), weights);
  softmax<T>(weights, n);
  S *out_k = row_at<S>(k.khat, b, span.row, h), *out_v = row_at<S>(k.vhat, b, span.row, h);
  for_channels<T>(D, [&]<int G>(int64_t c, int64_t lanes) __attribute__((always_inline)) {
    V sums[G] = {};
    for (int64_t j = 0; j < n; ++j) {
      for (int g = 0; g < G; ++g) sums[g] += weights[j] * load(v[j] + c + g * L, lanes);
    }
    for (int g = 0; g < G; ++g) {
      store<S>(out_v + c + g * L, sums[g], lanes);
      store<S>(out_k + c + g * L, load(khat + c + g * L, lanes), lanes);
    }
  });
}

// With weights w_j and c_j = <v_j, dvhat>, C = sum_j w_j c_j:
//   g_j = w_j (c_j - C)    dv_j += w_j dvhat    dk_j += scale g_j qhat    dqhat = scale sum_j g_j k_j
// and dkhat and dqhat go to the rows that were maxima, or to all in equal parts.
template <class S>
void span_summaries_backward(const SpanSummaries& k, int64_t b, int64_t h, const Span& span, void* scratch) {
  using T = Compute<S>;
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  const int64_t n = span.end - span.first, D = k.D, row = SpanSummaries::padded(D);
  T *weights = static_cast<T*>(scratch), *g = weights + SpanSummaries::padded(n);
  T* qhat = g + SpanSummaries::padded(n);
  T *q_at = qhat + row, *k_at = q_at + row, *dvhat = k_at + row, *dkhat = dvhat + row, *dqhat = dkhat + row;
  const Rows<S> q(k.q, b, h, span.first), keys(k.k, b, h, span.first), v(k.v, b, h, span.first);
  const S *in_v = row_at<S>(k.vhat, b, span.row, h), *in_k = row_at<S>(k.khat, b, span.row, h);
  const T scale = static_cast<T>(k.scale);
  for_channels<T>(D, [&]<int G>(int64_t c, int64_t lanes) __attribute__((always_inline)) {
    for (int i = 0; i < G; ++i) {
      store<T>(dvhat + c + i * L, load(in_v + c + i * L, lanes), lanes);
      store<T>(dkhat + c + i * L, load(in_k + c + i * L, lanes), lanes);
    }
  });
  if (!k.mean) pool_rows<S, T>(keys, n, D, false, dqhat, k_at);  // dqhat is free till later
  pool_rows<S, T>(q, n, D, k.mean, qhat, q_at);
  products<S, T>(keys, n, D, qhat, scale, weights);
  softmax<T>(weights, n);
  products<S, T>(v, n, D, dvhat, T{1}, g);
  T mean = 0;
  for (int64_t j = 0; j < n; ++j) mean += weights[j] * g[j];
  for (int64_t j = 0; j < n; ++j) g[j] = scale * (weights[j] * (g[j] - mean));
  T *dk = row_at<T>(k.dk, b, span.first, h), *dv = row_at<T>(k.dv, b, span.first, h);
  T* dq = row_at<T>(k.dq, b, span.first, h);
  for_channels<T>(D, [&]<int G>(int64_t c, int64_t lanes) __attribute__((always_inline)) {
    V own_q[G], own_v[G], share[G], sums[G] = {};
    for (int i = 0; i < G; ++i) {
      own_q[i] = load(qhat + c + i * L, lanes);
      own_v[i] = load(dvhat + c + i * L, lanes);
      share[i] = k.mean ? load(dkhat + c + i * L, lanes) / static_cast<T>(n) : V{};
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int i = 0; i < G; ++i) {
        T *to_k = dk + j * k.dk.t + c + i * L, *to_v = dv + j * k.dv.t + c + i * L;
        sums[i] += g[j] * load(keys[j] + c + i * L, lanes);
        store<T>(to_k, (k.add ? load(to_k, lanes) : V{}) + (share[i] + g[j] * own_q[i]), lanes);
        store<T>(to_v, (k.add ? load(to_v, lanes) : V{}) + weights[j] * own_v[i], lanes);
      }
    }
    for (int i = 0; i < G; ++i) store<T>(dqhat + c + i * L, sums[i], lanes);
    if (!k.mean && k.add) return;  // the maxima follow below
    for (int i = 0; i < G; ++i) sums[i] = k.mean ? sums[i] / static_cast<T>(n) : V{};
    for (int64_t j = 0; j < n; ++j) {
      for (int i = 0; i < G; ++i) {
        T* to = dq + j * k.dq.t + c + i * L;
        store<T>(to, (k.add ? load(to, lanes) : V{}) + sums[i], lanes);
      }
    }
  });
  if (k.mean) return;
  for (int64_t c = 0; c < D; ++c) {
    dq[integer_at(q_at + c) * k.dq.t + c] += dqhat[c];
    dk[integer_at(k_at + c) * k.dk.t + c] += dkhat[c];
  }
}

// ---- running pools

// Positions of a column in the order of the walk; `back`: against it.
template <class Step>
SEQOPS_INLINE void walk(const RunningPool& k, int64_t column, bool back, Step step) {
  const int64_t count = (k.T - column + k.stride - 1) / k.stride;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t done = back ? count - 1 - i : i;  // steps of the walk before this one
    step(column + (k.reverse ? count - 1 - done : done) * k.stride, done);
  }
}

template <class S, bool REVERSE>
void running_pool(const RunningPool& k, int64_t b, int64_t column, void* scratch) {
  using T = Compute<S>;
  using V = Vector<T>;
  T* sums = static_cast<T*>(scratch);
  const int64_t before = REVERSE ? k.stride : -k.stride;
  walk(k, column, false, [&](int64_t t, int64_t done) __attribute__((always_inline)) {
    for (int64_t h = 0; h < k.H; ++h) {
      const S* x = row_at<const S>(k.x, b, t, h);
      S *y = row_at<S>(k.y, b, t, h), *last = done > 0 ? row_at<S>(k.y, b, t + before, h) : nullptr;
      T* sum = sums + h * k.D;
      for_channels<T>(k.D, [&]<int G>(int64_t c, int64_t lanes) __attribute__((always_inline)) {
        for (int i = 0; i < G; ++i, c += LANES<T>) {
          V value = load(x + c, lanes);
          if (k.mean) {
            if (done > 0) value += load(sum + c, lanes);
            store<T>(sum + c, value, lanes);
            value = value / static_cast<T>(done + 1);
          } else if (done > 0) {
            const V best = load(last + c, lanes);
            value = choose<T>(takes<T, REVERSE>(value, best), value, best);
          }
          store<S>(y + c, value, lanes);
        }
      });
    }
  });
}

template <class S, bool REVERSE>
void running_pool_backward(const RunningPool& k, int64_t b, int64_t column, void* scratch) {
  using T = Compute<S>;
  using V = Vector<T>;
  T* sums = static_cast<T*>(scratch);
  for (int64_t i = 0; i < k.H * k.D; ++i) sums[i] = 0;
  const int64_t before = REVERSE ? k.stride : -k.stride;
  walk(k, column, true, [&](int64_t t, int64_t done) __attribute__((always_inline)) {
    for (int64_t h = 0; h < k.H; ++h) {
      const S* dy = row_at<const S>(k.dy, b, t, h);
      S* dx = row_at<S>(k.dx, b, t, h);
      T* sum = sums + h * k.D;
      const bool compare = !k.mean && done > 0;
      const S* x = compare ? row_at<const S>(k.x, b, t, h) : nullptr;
      const S* last = compare ? row_at<const S>(k.y, b, t + before, h) : nullptr;
      for_channels<T>(k.D, [&]<int G>(int64_t c, int64_t lanes) __attribute__((always_inline)) {
        for (int i = 0; i < G; ++i, c += LANES<T>) {
          const V own = load(dy + c, lanes);
          const V all = load(sum + c, lanes) + (k.mean ? own / static_cast<T>(done + 1) : own);
          V given = all, kept = k.mean ? all : V{};
          if (compare) {
            const Bits<T> take = takes<T, REVERSE>(load(x + c, lanes), load(last + c, lanes));
            given = choose<T>(take, all, V{}), kept = choose<T>(take, V{}, all);
          }
          store<S>(dx + c, given, lanes);
          store<T>(sum + c, kept, lanes);
        }
      });
    }
  });
}

template <class S>
void pool(const RunningPool& k, int64_t b, int64_t column, void* scratch) {
  k.reverse ? running_pool<S, true>(k, b, column, scratch) : running_pool<S, false>(k, b, column, scratch);
}

template <class S>
void pool_backward(const RunningPool& k, int64_t b, int64_t column, void* scratch) {
  k.reverse ? running_pool_backward<S, true>(k, b, column, scratch)
            : running_pool_backward<S, false>(k, b, column, scratch);
}

}  // namespace

#define SEQOPS_TYPES(kernel) {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}

extern const CombinerKernels combiner_kernels = {SEQOPS_TYPES(span_summaries), SEQOPS_TYPES(span_summaries_backward),
                                                 SEQOPS_TYPES(pool), SEQOPS_TYPES(pool_backward)};

}  // namespace seqops::SEQOPS_ISA
