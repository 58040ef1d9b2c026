// The recurrent product on the CPU: packed weights, a tile of sums in registers, and dot products for very few rows.
//
//   sums[row][vector][lane] = sum_k input[row][k] * weights[k][vector][lane]
//
// A row's sums run over k in order, whatever the batch, the tile or the number of threads.
#pragma once

#include "../common/vector.h"
#include "rnn.h"

namespace seqops::SEQOPS_ISA {
namespace {

// Rows of a register tile by vectors a row: sums, weights and one broadcast fit 32 registers (AVX-512, NEON), or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS_OF[] = {0, 12, 12, 8, 6};
#else
constexpr int ROWS_OF[] = {0, 12, 6, 4, 3};
#endif
constexpr int MOST_SUMS = 24;  // vectors of sums in the largest tile

// Whether products of storage type S take k two at a time: one instruction multiplies two pairs of bfloat16 and adds
// both products to a float, twice the rate of float. Input and weights are then bfloat16, else Real.
template <class S>
struct PairsOf {
  static constexpr bool value = false;
  using input = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct PairsOf<bfloat16> {
  static constexpr bool value = true;
  using input = bfloat16;
};
#endif
template <class S>
constexpr bool PAIRS = PairsOf<S>::value;
template <class S>
using Input = typename PairsOf<S>::input;

// What one step along k multiplies: a vector of weights with an input that is the same in every lane.
template <class X, class W>
struct Step {
  static constexpr int K = 1;
  using Operand = Vector<X>;
  static SEQOPS_INLINE Operand weights(const W* p) { return load(p); }
  static SEQOPS_INLINE Operand everywhere(const X* p) { return Operand{} + *p; }
  static SEQOPS_INLINE Vector<X> add(Vector<X> sum, Operand x, Operand w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bfloat16, bfloat16> {
  static constexpr int K = 2;
  using Operand = Words;
  static SEQOPS_INLINE Operand weights(const bfloat16* p) { return load_raw<Words>(p, 2 * LANES<float>); }
  static SEQOPS_INLINE Operand everywhere(const bfloat16* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return Words{} + pair;
  }
  static SEQOPS_INLINE Vector<float> add(Vector<float> sum, Operand x, Operand w) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

template <class X, class W, int VECTORS, int ROWS>
void product_tile(const W* weights, const X* input, int64_t stride, int64_t depth, Compute<X>* sums) {
  using Step = Step<X, W>;
  using Operand = typename Step::Operand;
  constexpr int L = LANES<Compute<X>>;
  Vector<Compute<X>> sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; k += Step::K, weights += VECTORS * L * Step::K) {
    if constexpr (ROWS < VECTORS) {  // hold whichever is fewer: the inputs or the weights
      Operand x[ROWS];
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) x[row] = Step::everywhere(input + row * stride + k);
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) {
        const Operand w = Step::weights(weights + v * L * Step::K);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) sum[row][v] = Step::add(sum[row][v], x[row], w);
      }
    } else {
      Operand w[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) w[v] = Step::weights(weights + v * L * Step::K);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const Operand x = Step::everywhere(input + row * stride + k);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) sum[row][v] = Step::add(sum[row][v], x, w[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) store(sums + (row * VECTORS + v) * L, sum[row][v]);
  }
}

template <class X, class W, int VECTORS, int ROWS = ROWS_OF[VECTORS]>
void product(int64_t rows, const W* weights, const X* input, int64_t stride, int64_t depth, Compute<X>* sums) {
  if (rows == ROWS) return product_tile<X, W, VECTORS, ROWS>(weights, input, stride, depth, sums);
  if constexpr (ROWS > 1) product<X, W, VECTORS, ROWS - 1>(rows, weights, input, stride, depth, sums);
}

// Packed weights have the input's type or, with few rows, where bandwidth is what counts, stay in 16-bit storage.
template <class S>
struct Packed {
  const void* weights;
  bool narrow;

  int64_t most_rows(int64_t vectors) const { return narrow ? ROWS_OF[4] : ROWS_OF[vectors]; }

  template <int VECTORS>
  void multiply(int64_t offset, int64_t rows, const Input<S>* input, int64_t stride, int64_t depth,
                Compute<S>* sums) const {
    if constexpr (sizeof(S) == 2 && !PAIRS<S>) {
      constexpr int ROWS = ROWS_OF[4] < ROWS_OF[VECTORS] ? ROWS_OF[4] : ROWS_OF[VECTORS];
      if (narrow) {
        const S* w = static_cast<const S*>(weights) + offset;
        return product<Input<S>, S, VECTORS, ROWS>(rows, w, input, stride, depth, sums);
      }
    }
    const Input<S>* w = static_cast<const Input<S>*>(weights) + offset;
    product<Input<S>, Input<S>, VECTORS>(rows, w, input, stride, depth, sums);
  }
};

// Cuts rows [first, last) into tiles of at most `most`, of nearly equal size.
template <class F>
SEQOPS_INLINE void for_each_tile(int64_t first, int64_t last, int64_t most, const F& f) {
  if (first == last) return;
  const int64_t tiles = (last - first + most - 1) / most;
  for (int64_t i = 0; i < tiles; ++i) {
    f(first + (last - first) * i / tiles, first + (last - first) * (i + 1) / tiles);
  }
}

// ---- packing: r[gate, head, unit, k] forward, r[gate, head, k, unit] backward -> [head][panel][k][gate][vector][lane]

// Weights of one k (of k and k + 1, where they go in pairs) for vector `v` of a panel.
template <class S, class W>
SEQOPS_INLINE void store_weights(W* panel, int64_t k, int64_t v, int64_t vectors, Vector<Compute<S>> at_k,
                                 Vector<Compute<S>> after_k) {
  constexpr int L = LANES<Compute<S>>;
  if constexpr (PAIRS<S>) {
    const Words low = __builtin_convertvector(narrow(S{}, at_k), Words);
    const Words high = __builtin_convertvector(narrow(S{}, after_k), Words);
    store_raw(panel + (k * vectors + 2 * v) * L, low | (high << 16), 2 * L);
  } else {
    store(panel + (k * vectors + v) * L, at_k);
  }
}

// A panel of weights that lie [gate][unit][k], k dense.
template <class S, class W>
void pack_rows(const S* r, int64_t stride_gate, int64_t stride_unit, int64_t units, int64_t depth, const Panels& panels,
               int64_t panel, W* out) {
  using Real = Compute<S>;
  constexpr int L = LANES<Real>, STEP = PAIRS<S> ? 2 : 1;
  const int64_t width = panels.width_of(panel), vectors = panels.gates * width;
  for (int64_t k0 = 0; k0 < depth; k0 += L) {
    const int64_t n = depth - k0 < L ? depth - k0 : L;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t gate = v / width, unit0 = (panel * panels.width + v % width) * L;
      Vector<Real> square[L];  // units x k, then k x units
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < L; ++lane) {
        const S* row = r + gate * stride_gate + (unit0 + lane) * stride_unit + k0;
        square[lane] = unit0 + lane < units ? load(row, n) : Vector<Real>{};
      }
      transpose<Real>(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; k += STEP) {
        if (k < n) store_weights<S>(out, k0 + k, v, vectors, square[k], square[k + STEP - 1]);
      }
    }
  }
}

// A panel of weights that lie [gate][k][unit], units dense; sums run over all gates' k.
template <class S, class W>
void pack_columns(const S* r, int64_t stride_gate, int64_t stride_k, int64_t gates, int64_t depth, int64_t units,
                  const Panels& panels, int64_t panel, W* out) {
  using Real = Compute<S>;
  constexpr int L = LANES<Real>, STEP = PAIRS<S> ? 2 : 1;
  const int64_t width = panels.width_of(panel);
  const auto weights = [&](int64_t k, int64_t column) {
    const int64_t n = units - column < L ? units - column : L;
    if (k >= gates * depth || n <= 0) return Vector<Real>{};
    return load(r + (k / depth) * stride_gate + (k % depth) * stride_k + column, n);
  };
  for (int64_t k = 0; k < gates * depth; k += STEP) {
    for (int64_t w = 0; w < width; ++w) {
      const int64_t column = (panel * panels.width + w) * L;
      const Vector<Real> at_k = weights(k, column);
      store_weights<S>(out, k, w, width, at_k, STEP == 2 ? weights(k + 1, column) : at_k);
    }
  }
}

template <class S, class W, int GATES, bool BACKWARD>
void pack_panels(const Recurrence& a, const Panels& panels, int64_t from, int64_t to) {
  for (int64_t item = from; item < to; ++item) {
    const int64_t head = item / panels.count(), panel = item % panels.count();
    const S* r = static_cast<const S*>(a.r) + head * a.stride_r[1];
    W* out = static_cast<W*>(a.packed) + head * panels.head_size() + panels.offset(panel);
    if constexpr (BACKWARD) {
      pack_columns<S>(r, a.stride_r[0], a.stride_r[2], GATES, a.D, a.D, panels, panel, out);
    } else {
      pack_rows<S>(r, a.stride_r[0], a.stride_r[2], a.D, a.D, panels, panel, out);
    }
  }
}

// Workers [begin, end) pack their share of all heads' panels.
template <class S, int GATES, bool BACKWARD>
void pack(const Recurrence& a, const Panels& panels, int64_t begin, int64_t end) {
  const int64_t items = a.H * panels.count();
  const int64_t from = items * begin / a.plan.workers, to = items * end / a.plan.workers;
  if constexpr (sizeof(S) == 2 && !PAIRS<S>) {
    if (a.plan.narrow_weights) return pack_panels<S, S, GATES, BACKWARD>(a, panels, from, to);
  }
  pack_panels<S, Input<S>, GATES, BACKWARD>(a, panels, from, to);
}

// Panels as the product of this storage type reads them.
template <class S>
SEQOPS_INLINE Panels panels_of(const Recurrence& a, int64_t gates, int64_t depth) {
  return {a.D, LANES<Compute<S>>, a.plan.panel_width, gates, packed_depth(depth, PAIRS<S>)};
}

// With an odd depth a pair reaches one past the end of a row's input: make that 0, in both buffers.
template <class S>
void clear_odd_end(Input<S>* buffers, int64_t rows, int64_t stride, int64_t depth) {
  if constexpr (PAIRS<S>) {
    if (depth % 2 == 0) return;
    for (int64_t row = 0; row < rows; ++row) buffers[row * stride + depth] = {0};
  }
}

// ---- very few rows: dot products with r as it lies, four rows of r at a time

template <class Real>
SEQOPS_INLINE Real horizontal_sum(Vector<Real> value) {
  Real lanes[LANES<Real>];
  store(lanes, value);
#pragma GCC unroll 8
  for (int half = LANES<Real> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class S, int GATES>
void dot_products(const Recurrence& a, int64_t head, int64_t unit0, int64_t vectors, int64_t rows,
                  const Input<S>* input, int64_t stride, Compute<S>* sums) {
  using Real = Compute<S>;
  constexpr int L = LANES<Real>, AT_ONCE = 4;
  const int64_t n = a.D - unit0 < vectors * L ? a.D - unit0 : vectors * L;
  for (int64_t gate = 0; gate < GATES; ++gate) {
    const S* r = static_cast<const S*>(a.r) + gate * a.stride_r[0] + head * a.stride_r[1] + unit0 * a.stride_r[2];
    for (int64_t unit = 0; unit < n; unit += AT_ONCE) {
      const S* weights[AT_ONCE];
      for (int i = 0; i < AT_ONCE; ++i) weights[i] = r + (unit + i < n ? unit + i : n - 1) * a.stride_r[2];
      for (int64_t row = 0; row < rows; ++row) {
        const Input<S>* x = input + row * stride;
        Vector<Real> sum[AT_ONCE] = {};
        int64_t k = 0;
        for (; k + L <= a.D; k += L) {
#pragma GCC unroll 4
          for (int i = 0; i < AT_ONCE; ++i) sum[i] += load(x + k) * load(weights[i] + k);
        }
        if (k < a.D) {
          for (int i = 0; i < AT_ONCE; ++i) sum[i] += load(x + k, a.D - k) * load(weights[i] + k, a.D - k);
        }
        for (int i = 0; i < AT_ONCE && unit + i < n; ++i) {
          sums[(row * GATES + gate) * vectors * L + unit + i] = horizontal_sum<Real>(sum[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
