// The measure of prob_sparse_attention and what it fills unselected rows with; compiled once per instruction set.
#include "../common/vector.h"
#include "prob_sparse.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class S>
SEQOPS_INLINE const S* row_of(const ProbSparseView& view, int64_t b, int64_t t, int64_t h) {
  return static_cast<const S*>(view.data) + b * view.stride_b + t * view.stride_t + h * view.stride_h;
}

// ---- the measure

// A row in T, filled up with zeros.
template <class S>
SEQOPS_INLINE void pack(const S* from, Compute<S>* to, int64_t D) {
  constexpr int64_t L = LANES<Compute<S>>;
  for (int64_t d = 0; d < D; d += L) store<Compute<S>>(to + d, load<S>(from + d, D - d < L ? D - d : L));
}

// <query, row> of LANES rows.
template <class T>
SEQOPS_INLINE Vector<T> products(const T* query, const T* const (&rows)[LANES<T>], int64_t padded) {
  constexpr int L = LANES<T>;
  Vector<T> sums[L] = {};
  for (int64_t d = 0; d < padded; d += L) {
    const Vector<T> part = load<T>(query + d);
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) sums[lane] += part * load<T>(rows[lane] + d);
  }
  transpose<T>(sums);
#pragma GCC unroll 8
  for (int distance = L / 2; distance > 0; distance /= 2) {
#pragma GCC unroll 16
    for (int lane = 0; lane < distance; ++lane) sums[lane] += sums[lane + distance];
  }
  return sums[0];
}

template <class T>
SEQOPS_INLINE T measure_row(const ProbSparseMeasure& m, int64_t i, const T* query, const T* keys, int64_t padded) {
  constexpr int L = LANES<T>;
  const int32_t* samples = m.samples + i * m.U;
  const int64_t count = m.counts[i];
  if (count == 0) return static_cast<T>(-__builtin_inf());
  Vector<T> most = constant<T>(-__builtin_inf()), sum = {};
  for (int64_t u = 0; u < count; u += L) {
    const T* rows[L];
    const int64_t left = count - u;
    for (int lane = 0; lane < L; ++lane) rows[lane] = keys + (lane < left ? samples[u + lane] : m.T) * padded;
    Vector<T> scores = products<T>(query, rows, padded);
    sum += scores;
    // Past the last sample is the row of zeros: it adds nothing to the sum unless q is not finite, and M is NaN then.
    if (left < L) {
      for (int64_t lane = left; lane < L; ++lane) scores[lane] = static_cast<T>(-__builtin_inf());
    }
    most = scores > most ? scores : most;
  }
  T largest = most[0], total = sum[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < L; ++lane) {
    largest = most[lane] > largest ? most[lane] : largest;
    total += sum[lane];
  }
  return largest - total / static_cast<T>(m.T);
}

template <class S>
void measure(const ProbSparseMeasure& m, int64_t worker) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  const int64_t padded = (m.D + L - 1) / L * L, group = m.H / m.Hk;
  T* keys = reinterpret_cast<T*>(static_cast<char*>(m.scratch) + worker * m.scratch_bytes);
  T* query = keys + (m.T + 1) * padded;
  for (int64_t d = 0; d < padded; ++d) keys[m.T * padded + d] = 0;
  int64_t packed = -1;
  for (;;) {
    const int64_t task = __atomic_fetch_add(m.next, 1, __ATOMIC_RELAXED);
    if (task >= m.B * m.Hk * m.stretches) return;
    const int64_t owner = task / m.stretches, b = owner / m.Hk, hk = owner % m.Hk;
    if (owner != packed) {
      for (int64_t t = 0; t < m.T; ++t) pack<S>(row_of<S>(m.k, b, t, hk), keys + t * padded, m.D);
      packed = owner;
    }
    const int64_t first = task % m.stretches * m.steps, end = first + m.steps < m.T ? first + m.steps : m.T;
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      T* out = static_cast<T*>(m.measure) + (b * m.H + h) * m.T;
      for (int64_t i = first; i < end; ++i) {
        pack<S>(row_of<S>(m.q, b, i, h), query, m.D);
        out[i] = measure_row<T>(m, i, query, keys, padded);
      }
    }
  }
}

// ---- the fill

// Calls `body(b, hk, first channel, channels, own scratch)` for each task.
template <class Body>
SEQOPS_INLINE void for_each_task(const ProbSparseFill& f, int64_t worker, const Body& body) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(f.next, 1, __ATOMIC_RELAXED);
    if (task >= f.B * f.Hk * f.stretches) return;
    const int64_t owner = task / f.stretches, first = task % f.stretches * f.width;
    const int64_t channels = f.D - first < f.width ? f.D - first : f.width;
    body(owner / f.Hk, owner % f.Hk, first, channels, static_cast<char*>(f.scratch) + worker * f.scratch_bytes);
  }
}

template <class T>
SEQOPS_INLINE void clear(T* p, int64_t count) {
  for (int64_t d = 0; d < count; ++d) p[d] = 0;
}

// to += from
template <class T, class S>
SEQOPS_INLINE void add(T* to, const S* from, int64_t count) {
  constexpr int64_t L = LANES<T>;
  for (int64_t d = 0; d < count; d += L) {
    store<T>(to + d, load<T>(to + d) + load<S>(from + d, count - d < L ? count - d : L));
  }
}

// to = from * factor, or from + other
template <class S, class T>
SEQOPS_INLINE void write(S* to, const T* from, const T* other, int64_t count) {
  constexpr int64_t L = LANES<T>;
  for (int64_t d = 0; d < count; d += L) {
    store<S>(to + d, load<T>(from + d) + load<T>(other + d), count - d < L ? count - d : L);
  }
}

template <class S>
SEQOPS_INLINE void copy(S* to, const S* from, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(S));
}

// A sum is what blocks before this one add up to, `past`, and this block's own, `block`.
template <class T>
struct Sums {
  T *past, *block;
  int64_t* places;  // [heads of a group]: which of the selected rows is next

  Sums(const ProbSparseFill& f, char* scratch) {
    const int64_t padded = (f.width + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
    past = reinterpret_cast<T*>(scratch), block = past + padded;
    places = reinterpret_cast<int64_t*>(block + padded);
    clear(past, 2 * padded);
  }

  SEQOPS_INLINE void close_block(int64_t count) {
    add<T, T>(past, block, count);
    clear(block, count);
  }
};

template <class S>
void fill(const ProbSparseFill& f, int64_t worker) {
  using T = Compute<S>;
  const int64_t group = f.H / f.Hk;
  for_each_task(f, worker, [&](int64_t b, int64_t hk, int64_t first, int64_t count, char* scratch) {
    Sums<T> sums(f, scratch);
    if (!f.causal) {
      for (int64_t t = 0; t < f.T; ++t) {
        add<T, S>(sums.block, row_of<S>(f.v, b, t, hk) + first, count);
        if ((t + 1) % BLOCK_STEPS == 0) sums.close_block(count);
      }
      sums.close_block(count);
      for (int64_t d = 0; d < count; ++d) sums.past[d] /= static_cast<T>(f.T);
    }
    for (int64_t g = 0; g < group; ++g) sums.places[g] = 0;
    for (int64_t t = 0; t < f.T; ++t) {
      if (f.causal) {
        if (t % BLOCK_STEPS == 0) sums.close_block(count);
        add<T, S>(sums.block, row_of<S>(f.v, b, t, hk) + first, count);
      }
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = hk * group + g, n = sums.places[g];
        S* out = static_cast<S*>(f.o) + ((b * f.T + t) * f.H + h) * f.D + first;
        if (n < f.N && f.index[(b * f.H + h) * f.N + n] == t) {
          copy<S>(out, row_of<S>(f.rows, b, n, h) + first, count);
          ++sums.places[g];
        } else {
          write<S, T>(out, sums.past, sums.block, count);
        }
      }
    }
  });
}

template <class S>
void fill_backward(const ProbSparseFill& f, int64_t worker) {
  using T = Compute<S>;
  const int64_t group = f.H / f.Hk;
  for_each_task(f, worker, [&](int64_t b, int64_t hk, int64_t first, int64_t count, char* scratch) {
    Sums<T> sums(f, scratch);
    for (int64_t g = 0; g < group; ++g) sums.places[g] = f.N - 1;
    const auto out = [&](int64_t t) { return static_cast<S*>(f.dv) + ((b * f.T + t) * f.Hk + hk) * f.D + first; };
    for (int64_t t = f.T - 1; t >= 0; --t) {
      if ((t + 1) % BLOCK_STEPS == 0) sums.close_block(count);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = hk * group + g, n = sums.places[g];
        const S* grad = row_of<S>(f.grad, b, t, h) + first;
        if (n >= 0 && f.index[(b * f.H + h) * f.N + n] == t) {
          copy<S>(static_cast<S*>(f.drows) + ((b * f.N + n) * f.H + h) * f.D + first, grad, count);
          --sums.places[g];
        } else {
          add<T, S>(sums.block, grad, count);
        }
      }
      if (f.causal) write<S, T>(out(t), sums.past, sums.block, count);
    }
    if (f.causal) return;
    sums.close_block(count);
    for (int64_t d = 0; d < count; ++d) sums.past[d] /= static_cast<T>(f.T);
    for (int64_t t = 0; t < f.T; ++t) write<S, T>(out(t), sums.past, sums.block, count);
  });
}

}  // namespace

extern const ProbSparseKernels prob_sparse_kernels;
const ProbSparseKernels prob_sparse_kernels = {
    {measure<float>, measure<double>, measure<bfloat16>, measure<float16>},
    {fill<float>, fill<double>, fill<bfloat16>, fill<float16>},
    {fill_backward<float>, fill_backward<double>, fill_backward<bfloat16>, fill_backward<float16>},
};

}  // namespace seqops::SEQOPS_ISA
