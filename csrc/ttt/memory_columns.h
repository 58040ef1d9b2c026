// Arrays with a token in each column, [channels][tokens]: what the backward of a memory does with them.
#pragma once

#include "memory_tile.h"

namespace seqops::SEQOPS_ISA {
namespace {

// The lanes from `first` to `last`, zeros for the others, whatever they hold.
template <class T>
SEQOPS_INLINE Vector<T> between(int64_t first, int64_t last, Vector<T> x) {
  constexpr int L = LANES<T>;
  const Bits<T> lanes = numbers<T>(0);
  const auto near = [&](int64_t lane) {
    return static_cast<decltype(lanes[0] + 0)>(lane < -1 ? -1 : lane > L ? L : lane);
  };
  return choose<T>((Bits<T>)(lanes >= near(first)) & (Bits<T>)(lanes <= near(last)), x, Vector<T>{});
}

template <class T>
SEQOPS_INLINE T total(Vector<T> x) {
  T sum = 0;
  for (int lane = 0; lane < LANES<T>; ++lane) sum += x[lane];
  return sum;
}

// A dense matrix of the caller's, [rows][width] or null for zeros, to rows filled up with zeros, and back.
template <class T>
void load_matrix(const T* in, int64_t rows, int64_t width, int64_t row, T* out) {
  constexpr int L = LANES<T>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < row; i += L) {
      const int64_t valid = width - i < L ? width - i : L;
      store(out + r * row + i, in == nullptr || valid <= 0 ? Vector<T>{} : load(in + r * width + i, valid));
    }
  }
}
template <class T>
void store_matrix(const T* in, int64_t rows, int64_t width, int64_t row, T* out) {
  constexpr int L = LANES<T>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; i += L) {
      store(out + r * width + i, load(in + r * row + i), width - i < L ? width - i : L);
    }
  }
}

// Rows of columns, as many as there are channels.
struct Columns {
  int64_t rows, width, row;  // [rows][row], of which `width` are in use, whole vectors

  template <class T, class Function>
  SEQOPS_INLINE void each(T* out, Function function) const {  // out = function(element number, column)
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; i += LANES<T>) store(out + r * row + i, function(r * row + i, i));
    }
  }

  // Adds to `odd` what is not 0 where a number is infinite or NaN.
  template <class T>
  void look_for_odd(const T* in, Vector<T>& odd) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; i += LANES<T>) odd += load(in + r * row + i) * T(0);
    }
  }

  // sums[column] of x * y
  template <class T>
  void dots(const T* x, const T* y, T* sums) const {
    for (int64_t i = 0; i < width; i += LANES<T>) {
      Vector<T> sum = {};
      for (int64_t r = 0; r < rows; ++r) sum += load(x + r * row + i) * load(y + r * row + i);
      store(sums + i, sum);
    }
  }
};

template <class T>
SEQOPS_INLINE bool not_zero(Vector<T> v) {  // NaN is not zero
  bool any = false;
  for (int lane = 0; lane < LANES<T>; ++lane) any = any || !(v[lane] == 0);
  return any;
}

// Sums over the tokens of one side of a triangle, for each token of the other side, added to `out` [channels][width]:
//
//   until   column t, a token `first + t`, sums a_i by[i][t] of the tokens i <= first + t among `depth`
//   from    column i, a token i, sums a_t by[t][i] of the tokens first + t >= i among `depth`
//
// Elsewhere `by` is 0. `odd`: a has NaN or Inf, which a 0 would not keep out: pairs are taken one by one.
template <class T>
struct Triangle {
  static constexpr int L = LANES<T>;
  static constexpr int64_t PANEL = 2 * L;  // columns that share where their sums end, or begin

  int64_t first;
  bool odd;

  void until(int64_t channels, int64_t width, int64_t depth, Strided<T> a, const T* by, T* out, int64_t row) const {
    if (odd) return one_by_one(channels, width, depth, a, by, row, out, true);
    for (int64_t i = 0; i < width; i += PANEL) {
      const int64_t columns = width - i < PANEL ? width - i : PANEL, end = first + i + columns;
      product<T>(channels, columns, end < depth ? end : depth, a, by + i, row, out + i, row, added<T>());
    }
  }

  void from(int64_t channels, int64_t width, int64_t depth, Strided<T> a, const T* by, T* out, int64_t row) const {
    if (odd) return one_by_one(channels, width, depth, a, by, row, out, false);
    for (int64_t i = 0; i < width; i += PANEL) {
      const int64_t columns = width - i < PANEL ? width - i : PANEL, begin = i > first ? i - first : 0;
      product<T>(channels, columns, depth - begin, {a.p + begin * a.depth, a.row, a.depth}, by + begin * row + i, row,
                 out + i, row, added<T>());
    }
  }

 private:
  void one_by_one(int64_t channels, int64_t width, int64_t depth, Strided<T> a, const T* by, int64_t row, T* out,
                  bool until) const {
    for (int64_t m = 0; m < channels; ++m) {
      for (int64_t i = 0; i < width; i += L) {
        Vector<T> sum = load(out + m * row + i);
        for (int64_t d = 0; d < depth; ++d) {
          const Vector<T> term = load(by + d * row + i) * a.p[m * a.row + d * a.depth];
          sum += until ? between<T>(d - first - i, L, term) : between<T>(0, first + d - i, term);
        }
        store(out + m * row + i, sum);
      }
    }
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
