// Scores of pairs of queries and keys, and their log-softmax; compiled once per instruction set.
#include "pointer_scores.h"

#include "../common/vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
constexpr int64_t WIDTH = 2 * LANES<T>;  // channels of a block
// (1 + e^{2x}) (1 + e^{2x'}) stays finite.
template <class T>
constexpr T CALM = sizeof(T) == 4 ? 10 : 80;

template <class S>
SEQOPS_INLINE const S* row_of(const PointerView& view, int64_t b, int64_t t) {
  return static_cast<const S*>(view.data) + b * view.stride_b + t * view.stride_t;
}

template <class T>
SEQOPS_INLINE int64_t task_of(const T& p) {
  return __atomic_fetch_add(p.next, 1, __ATOMIC_RELAXED);
}

template <class T>
SEQOPS_INLINE T sum_of(Vector<T> v) {
  T lanes[LANES<T>];
  __builtin_memcpy(lanes, &v, sizeof(v));
#pragma GCC unroll 4
  for (int distance = LANES<T> / 2; distance > 0; distance /= 2) {
#pragma GCC unroll 16
    for (int lane = 0; lane < distance; ++lane) lanes[lane] += lanes[lane + distance];
  }
  return lanes[0];
}

// The sum of each of LANES vectors.
template <class T>
SEQOPS_INLINE Vector<T> sums_of(Vector<T> (&rows)[LANES<T>]) {
  transpose<T>(rows);
#pragma GCC unroll 4
  for (int distance = LANES<T> / 2; distance > 0; distance /= 2) {
#pragma GCC unroll 16
    for (int lane = 0; lane < distance; ++lane) rows[lane] += rows[lane + distance];
  }
  return rows[0];
}

SEQOPS_INLINE int64_t at_most_of(int64_t n, int64_t most) { return n < most ? n : most; }

// ---- rows as the pairs read them

// `row` in blocks that lie `stride` apart; returns whether a number is not calm.
template <class S, bool CLIPPED>
SEQOPS_INLINE bool prepare_row(const S* row, Compute<S>* out, int64_t stride, int64_t blocks, int64_t A) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  Vector<T> calm = constant<T>(1);
  for (int64_t c = 0; c < blocks; ++c) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t a = c * WIDTH<T> + half * L, left = A - a;
      Vector<T> x = left > 0 ? load<S>(row + a, at_most_of(left, L)) : Vector<T>{};
      if constexpr (!CLIPPED) {
        const Vector<T> size = x < static_cast<T>(0) ? -x : x;
        calm = size <= CALM<T> ? calm : Vector<T>{};  // not for NaN either
        x = exp<T>(x + x);
      }
      store<T>(out + c * stride + half * L, x);
    }
  }
  return sum_of<T>(calm) != static_cast<T>(L);
}

template <class S, bool CLIPPED>
void prepare(const PointerScores& p) {
  using T = Compute<S>;
  for (;;) {
    const int64_t first = task_of(p) * ROWS_OF_TASK, rows = p.B * (p.Tq + p.Tk);
    if (first >= rows) return;
    for (int64_t i = first; i < at_most_of(rows, first + ROWS_OF_TASK); ++i) {
      const int64_t b = i / (p.Tq + p.Tk), place = i % (p.Tq + p.Tk);
      const bool is_query = place < p.Tq;
      const int64_t t = is_query ? place : place - p.Tq, steps = is_query ? p.Tq : p.Tk;
      if (!is_query && t >= p.lengths[b]) continue;  // nobody reads it
      T* out = static_cast<T*>(is_query ? p.queries : p.keys) + (b * p.blocks * steps + t) * WIDTH<T>;
      const S* row = row_of<S>(is_query ? p.query : p.key, b, t);
      const bool wild = prepare_row<S, CLIPPED>(row, out, steps * WIDTH<T>, p.blocks, p.A);
      (is_query ? p.wild_queries : p.wild_keys)[b * steps + t] = wild || p.wild_weight;
    }
  }
}

template <class T>
SEQOPS_INLINE const T* query_block(const PointerScores& p, int64_t b, int64_t c, int64_t i) {
  return static_cast<const T*>(p.queries) + ((b * p.blocks + c) * p.Tq + i) * WIDTH<T>;
}

template <class T>
SEQOPS_INLINE const T* key_block(const PointerScores& p, int64_t b, int64_t c, int64_t j) {
  return static_cast<const T*>(p.keys) + ((b * p.blocks + c) * p.Tk + j) * WIDTH<T>;
}

// ---- scores

// tanh(query_i + key_j) of channels from `a` on, where there are any.
template <class S>
SEQOPS_INLINE Vector<Compute<S>> wild_tanh(const PointerScores& p, int64_t b, int64_t i, int64_t j, int64_t a) {
  using T = Compute<S>;
  const int64_t left = p.A - a, n = at_most_of(left, LANES<T>);
  if (left <= 0) return Vector<T>{};
  return tanh<T>(load<S>(row_of<S>(p.query, b, i) + a, n) + load<S>(row_of<S>(p.key, b, j) + a, n));
}

template <class S>
SEQOPS_INLINE Compute<S> wild_score(const PointerScores& p, int64_t b, int64_t i, int64_t j) {
  using T = Compute<S>;
  const T* weight = static_cast<const T*>(p.weight);
  Vector<T> sum = {};
  for (int64_t a = 0; a < p.A; a += LANES<T>) {
    sum += load<T>(weight + a) * wild_tanh<S>(p, b, i, j, a);
  }
  return sum_of<T>(sum);
}

// Scores, or dot products, of query i with LANES keys from j on; past the last key the last one's.
template <class T, bool CLIPPED>
SEQOPS_INLINE Vector<T> calm_scores(const PointerScores& p, int64_t b, int64_t i, int64_t j, int64_t length) {
  constexpr int L = LANES<T>;
  const T* weight = static_cast<const T*>(p.weight);
  Vector<T> sums[L] = {}, total = {};
  int64_t places[L];
  for (int lane = 0; lane < L; ++lane) places[lane] = at_most_of(j + lane, length - 1) * WIDTH<T>;
  for (int64_t c = 0; c < p.blocks; ++c) {
    const T *q = query_block<T>(p, b, c, i), *k = key_block<T>(p, b, c, 0);
    const Vector<T> q0 = load<T>(q), q1 = load<T>(q + L);
    if constexpr (CLIPPED) {
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) {
        sums[lane] += q0 * load<T>(k + places[lane]) + q1 * load<T>(k + places[lane] + L);
      }
    } else {
      const Vector<T> w0 = load<T>(weight + c * WIDTH<T>), w1 = load<T>(weight + c * WIDTH<T> + L);
      total += w0 + w1;
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) {
        const Vector<T> d0 = q0 * load<T>(k + places[lane]) + static_cast<T>(1);
        const Vector<T> d1 = q1 * load<T>(k + places[lane] + L) + static_cast<T>(1);
        sums[lane] += (w0 * d1 + w1 * d0) * reciprocal<T>(d0 * d1);
      }
    }
  }
  const Vector<T> sum = sums_of<T>(sums);
  return CLIPPED ? sum : sum_of<T>(total) - (sum + sum);
}

template <class T>
SEQOPS_INLINE T root_of(int64_t A) {
  return static_cast<T>(1 / __builtin_sqrt(static_cast<double>(A)));
}

template <class S, bool CLIPPED>
SEQOPS_INLINE void score_row(const PointerScores& p, int64_t b, int64_t i, int64_t length, Compute<S>* scores) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  const bool wild = !CLIPPED && p.wild_queries[b * p.Tq + i];
  const T root = root_of<T>(p.A), clip = static_cast<T>(p.clip);
  for (int64_t j = 0; j < length; j += L) {
    if (!wild) {
      const Vector<T> values = calm_scores<T, CLIPPED>(p, b, i, j, length);
      store<T>(scores + j, CLIPPED ? tanh<T>(values * root) * clip : values);
    }
    if constexpr (!CLIPPED) {
      for (int64_t each = j; each < at_most_of(length, j + L); ++each) {
        if (wild || p.wild_keys[b * p.Tk + each]) scores[each] = wild_score<S>(p, b, i, each);
      }
    }
  }
}

// ---- the log-softmax

template <class T>
SEQOPS_INLINE Vector<T> first_of(Vector<T> v, int64_t n, T other) {
  if (n >= LANES<T>) return v;
  for (int64_t lane = n; lane < LANES<T>; ++lane) v[lane] = other;
  return v;
}

// log sum_j e^{scores_j}, as what is subtracted twice: the largest score, and the logarithm of the rest.
template <class T>
SEQOPS_INLINE void normaliser(const T* scores, int64_t length, T& largest, T& rest) {
  constexpr int64_t L = LANES<T>;
  constexpr T NOTHING = static_cast<T>(-__builtin_inf());
  Vector<T> most = constant<T>(NOTHING);
  for (int64_t j = 0; j < length; j += L) {
    const Vector<T> v = first_of<T>(load<T>(scores + j), length - j, NOTHING);
    most = v > most ? v : most;
  }
  largest = most[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < L; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  Vector<T> sum = {};
  for (int64_t j = 0; j < length; j += L) {
    sum += first_of<T>(exp<T>(load<T>(scores + j) - largest), length - j, static_cast<T>(0));
  }
  rest = log<T>(Vector<T>{} + sum_of<T>(sum))[0];
}

template <class S, bool CLIPPED>
void forward(const PointerScores& p, int64_t worker) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  T* scores = reinterpret_cast<T*>(static_cast<char*>(p.scratch) + worker * p.scratch_bytes);
  const Vector<T> nothing = constant<T>(-__builtin_inf());
  for (;;) {
    const int64_t first = task_of(p) * ROWS_OF_TASK, rows = p.B * p.Tq;
    if (first >= rows) return;
    for (int64_t row = first; row < at_most_of(rows, first + ROWS_OF_TASK); ++row) {
      const int64_t b = row / p.Tq, length = p.lengths[b];
      score_row<S, CLIPPED>(p, b, row % p.Tq, length, scores);
      T largest = 0, rest = 0;
      if (length > 0) normaliser<T>(scores, length, largest, rest);
      S* out = static_cast<S*>(p.log_p) + row * p.Tk;
      for (int64_t j = 0; j < p.Tk; j += L) {
        const int64_t n = at_most_of(p.Tk - j, L), seen = length - j;
        Vector<T> value = nothing;
        if (seen > 0) value = first_of<T>((load<T>(scores + j) - largest) - rest, seen, nothing[0]);
        store<S>(out + j, value, n);
        if constexpr (sizeof(S) == 2) {
          if (p.exact != nullptr) store<T>(static_cast<T*>(p.exact) + row * p.Tk + j, value, n);
        }
      }
    }
  }
}

// ---- backward

// ds_ij of visible keys; for the clipped dot times clip (1 - tanh^2) / sqrt(A).
template <class S, bool CLIPPED>
void score_gradient(const PointerScores& p, int64_t) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  const T root = root_of<T>(p.A), clip = static_cast<T>(p.clip);
  for (;;) {
    const int64_t first = task_of(p) * ROWS_OF_TASK, rows = p.B * p.Tq;
    if (first >= rows) return;
    for (int64_t row = first; row < at_most_of(rows, first + ROWS_OF_TASK); ++row) {
      const int64_t b = row / p.Tq, i = row % p.Tq, length = p.lengths[b];
      const S* grad = row_of<S>(p.grad, b, i);
      const T* saved = static_cast<const T*>(p.saved) + row * p.Tk;
      T* ds = static_cast<T*>(p.ds) + row * p.Tk;
      Vector<T> sum = {};
      for (int64_t j = 0; j < length; j += L) sum += load<S>(grad + j, at_most_of(length - j, L));
      const T total = sum_of<T>(sum);
      for (int64_t j = 0; j < length; j += L) {
        const int64_t n = at_most_of(length - j, L);
        Vector<T> value = load<S>(grad + j, n) - exp<T>(load<T>(saved + j, n)) * total;
        if constexpr (CLIPPED) {
          const Vector<T> t = tanh<T>(calm_scores<T, true>(p, b, i, j, length) * root);
          value = value * (static_cast<T>(1) - t) * (static_cast<T>(1) + t) * (clip * root);
        }
        store<T>(ds + j, value, n);
      }
    }
  }
}

// r = 1 / (1 + e^{2x}) of a block.
template <class T>
struct Block {
  Vector<T> low, high;
};

template <class T>
SEQOPS_INLINE Block<T> load_block(const T* from) {
  return {load<T>(from), load<T>(from + LANES<T>)};
}

template <class T>
SEQOPS_INLINE void store_block(T* to, const Block<T>& block) {
  store<T>(to, block.low);
  store<T>(to + LANES<T>, block.high);
}

template <class T>
SEQOPS_INLINE Block<T> calm_block(const Block<T>& q, const Block<T>& k) {
  const Vector<T> low = q.low * k.low + static_cast<T>(1), high = q.high * k.high + static_cast<T>(1);
  const Vector<T> inverse = reciprocal<T>(low * high);
  return {high * inverse, low * inverse};
}

template <class S>
SEQOPS_INLINE Block<Compute<S>> wild_block(const PointerScores& p, int64_t b, int64_t i, int64_t j, int64_t a) {
  using T = Compute<S>;
  constexpr T HALF = static_cast<T>(0.5);
  return {HALF - HALF * wild_tanh<S>(p, b, i, j, a), HALF - HALF * wild_tanh<S>(p, b, i, j, a + LANES<T>)};
}

// sum += factor * r (1 - r)
template <class T>
SEQOPS_INLINE void add_slope(Block<T>& sum, const Block<T>& r, T factor) {
  sum.low += (r.low - r.low * r.low) * factor;
  sum.high += (r.high - r.high * r.high) * factor;
}

template <class T>
SEQOPS_INLINE void add_scaled(Block<T>& sum, const Block<T>& x, T factor) {
  sum.low += x.low * factor;
  sum.high += x.high * factor;
}

// A block's channels that exist, times `scale`.
template <class S>
SEQOPS_INLINE void write_block(S* row, int64_t a, int64_t A, const Block<Compute<S>>& value,
                               const Block<Compute<S>>& scale) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  store<S>(row + a, value.low * scale.low, at_most_of(A - a, L));
  if (A - a > L) store<S>(row + a + L, value.high * scale.high, at_most_of(A - a - L, L));
}

// COUNT queries from i on with all keys of a block of channels: dquery, and what they add to dkeys and dweight.
template <class S, bool CLIPPED, int COUNT>
SEQOPS_INLINE void add_queries(const PointerScores& p, int64_t b, int64_t c, int64_t i, int64_t length,
                               const Block<Compute<S>>& scale, Compute<S>* dkeys, Block<Compute<S>>& dweight) {
  using T = Compute<S>;
  const int64_t a = c * WIDTH<T>;
  const T* keys = key_block<T>(p, b, c, 0);
  const T* ds[COUNT];
  Block<T> query[COUNT], dquery[COUNT] = {}, dw = {};
  bool wild = false;
#pragma GCC unroll 4
  for (int n = 0; n < COUNT; ++n) {
    ds[n] = static_cast<const T*>(p.ds) + (b * p.Tq + i + n) * p.Tk;
    query[n] = load_block<T>(query_block<T>(p, b, c, i + n));
    if constexpr (!CLIPPED) wild |= p.wild_queries[b * p.Tq + i + n] != 0;
  }
  for (int64_t j = 0; j < length; ++j) {
    const Block<T> key = load_block<T>(keys + j * WIDTH<T>);
    Block<T> dkey = load_block<T>(dkeys + j * WIDTH<T>);
    if constexpr (CLIPPED) {
#pragma GCC unroll 4
      for (int n = 0; n < COUNT; ++n) {
        add_scaled<T>(dquery[n], key, ds[n][j]);
        add_scaled<T>(dkey, query[n], ds[n][j]);
      }
    } else {
      const bool exactly = wild || p.wild_keys[b * p.Tk + j];
#pragma GCC unroll 4
      for (int n = 0; n < COUNT; ++n) {
        const Block<T> r =
            __builtin_expect(exactly, 0) ? wild_block<S>(p, b, i + n, j, a) : calm_block<T>(query[n], key);
        add_slope<T>(dquery[n], r, ds[n][j]);
        add_slope<T>(dkey, r, ds[n][j]);
        add_scaled<T>(dw, r, ds[n][j]);
      }
    }
    store_block<T>(dkeys + j * WIDTH<T>, dkey);
  }
  dweight.low += dw.low, dweight.high += dw.high;
#pragma GCC unroll 4
  for (int n = 0; n < COUNT; ++n) {
    write_block<S>(static_cast<S*>(p.dquery) + (b * p.Tq + i + n) * p.A, a, p.A, dquery[n], scale);
  }
}

template <class S, bool CLIPPED>
void backward(const PointerScores& p, int64_t worker) {
  using T = Compute<S>;
  T* dkeys = reinterpret_cast<T*>(static_cast<char*>(p.scratch) + worker * p.scratch_bytes);
  for (;;) {
    const int64_t task = task_of(p);
    if (task >= p.B * p.blocks) return;
    const int64_t b = task / p.blocks, c = task % p.blocks, a = c * WIDTH<T>, length = p.lengths[b];
    Block<T> scale = {constant<T>(1), constant<T>(1)}, dweight = {};
    if constexpr (!CLIPPED) {
      scale = load_block<T>(static_cast<const T*>(p.weight) + a);
      scale.low *= static_cast<T>(4), scale.high *= static_cast<T>(4);
      if (length == 0) scale = Block<T>{};  // a gradient of 0, even where the weight is infinite
    }
    for (int64_t j = 0; j < length; ++j) store_block<T>(dkeys + j * WIDTH<T>, Block<T>{});
    int64_t i = 0;
    for (; i + 2 <= p.Tq; i += 2) add_queries<S, CLIPPED, 2>(p, b, c, i, length, scale, dkeys, dweight);
    for (; i < p.Tq; ++i) add_queries<S, CLIPPED, 1>(p, b, c, i, length, scale, dkeys, dweight);
    for (int64_t j = 0; j < p.Tk; ++j) {
      const Block<T> dkey = j < length ? load_block<T>(dkeys + j * WIDTH<T>) : Block<T>{};
      const Block<T> none = {};
      write_block<S>(static_cast<S*>(p.dkey) + (b * p.Tk + j) * p.A, a, p.A, dkey, j < length ? scale : none);
    }
    if constexpr (!CLIPPED) {
      const Block<T> minus_two = {constant<T>(-2), constant<T>(-2)};
      write_block<T>(static_cast<T*>(p.dweight) + b * p.A, a, p.A, dweight, minus_two);
    }
  }
}

template <class S>
constexpr int64_t LANES_OF = LANES<Compute<S>>;

#define SEQOPS_EACH(pass)                                                               \
  {                                                                                     \
    {pass<float, false>, pass<float, true>}, {pass<double, false>, pass<double, true>}, \
        {pass<bfloat16, false>, pass<bfloat16, true>}, {                                \
      pass<float16, false>, pass<float16, true>                                         \
    }                                                                                   \
  }

}  // namespace

extern const PointerScoresKernels pointer_scores_kernels;
const PointerScoresKernels pointer_scores_kernels = {
    {LANES_OF<float>, LANES_OF<double>, LANES_OF<bfloat16>, LANES_OF<float16>},
    SEQOPS_EACH(prepare),
    SEQOPS_EACH(forward),
    SEQOPS_EACH(score_gradient),
    SEQOPS_EACH(backward),
};
#undef SEQOPS_EACH

}  // namespace seqops::SEQOPS_ISA
