// Products of small matrices that lie in the caches: a tile of sums in registers, one operand read a vector at a time
// along its rows, the other a number at a time with any two strides, so that it may be a transpose.
//
//   out[m][n] = keep[m] out[m][n] + sum_d a[m][d] b[d][n]
//
// Sums run over d in order, whatever the tile. n covers whole vectors.
#pragma once

#include "vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

// Rows of a register tile by vectors a row: sums, a row of b and one broadcast fit 32 registers (AVX-512, NEON), or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PRODUCT_ROWS[] = {0, 12, 12, 8, 6};
constexpr int PRODUCT_VECTORS = 4;
#else
constexpr int PRODUCT_ROWS[] = {0, 12, 6};
constexpr int PRODUCT_VECTORS = 2;
#endif

template <class T>
struct Strided {  // element (m, d) at p[m * row + d * depth]
  const T* p;
  int64_t row, depth;
};

// What becomes of the sums. A kept factor of 0 cuts: what was there is not read as a number, which might be NaN.
template <class T>
struct Keep {
  const T* factor;  // null: the sums replace what was there
  int64_t step;     // 1: a factor for each row; 0: one for all

  static Keep nothing() { return {nullptr, 0}; }
};

template <class T>
constexpr T KEEP_ALL = 1;
template <class T>
SEQOPS_INLINE Keep<T> added() {
  return {&KEEP_ALL<T>, 0};
}

// Which sums there are to a row m: all d, d <= m, or d >= m. Or which columns are wanted: n <= m.
enum class Band { all, until_row, from_row, columns_until_row };

template <class T, int ROWS, int VECTORS>
void product_tile(Strided<T> a, const T* b, int64_t b_row, int64_t depth, T* out, int64_t out_row, Keep<T> keep) {
  constexpr int L = LANES<T>;
  Vector<T> sum[ROWS][VECTORS] = {};
  // Three rows to a pointer, one or two strides away: with a pointer for each of 12 rows, most would lie in memory.
  constexpr int POINTERS = (ROWS + 2) / 3;
  const T* p[POINTERS];
#pragma GCC unroll 16
  for (int i = 0; i < POINTERS; ++i) {
    p[i] = a.p + 3 * i * a.row;
    asm("" : "+r"(p[i]));  // or the compiler goes back to one pointer and twelve offsets
  }
  for (int64_t d = 0; d < depth; ++d, b += b_row) {
    Vector<T> line[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) line[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const Vector<T> x =
          p[m / 3][m % 3 * a.row] - Vector<T>{};  // one broadcast: unlike 0 + x this is x, whatever its sign
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) sum[m][v] += x * line[v];
    }
#pragma GCC unroll 16
    for (int i = 0; i < POINTERS; ++i) p[i] += a.depth;
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    const T factor = keep.factor == nullptr ? T(0) : keep.factor[m * keep.step];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      T* p = out + m * out_row + v * L;
      store(p, factor == 0 ? sum[m][v] : load(p) * factor + sum[m][v]);
    }
  }
}

template <class T, int VECTORS, int ROWS = PRODUCT_ROWS[VECTORS]>
SEQOPS_INLINE void product_rows(int64_t rows, Strided<T> a, const T* b, int64_t b_row, int64_t depth, T* out,
                                int64_t out_row, Keep<T> keep) {
  if (rows == ROWS) return product_tile<T, ROWS, VECTORS>(a, b, b_row, depth, out, out_row, keep);
  if constexpr (ROWS > 1) product_rows<T, VECTORS, ROWS - 1>(rows, a, b, b_row, depth, out, out_row, keep);
}

template <class T, int VECTORS>
void product_panel(int64_t rows, int64_t column, int64_t depth, Strided<T> a, const T* b, int64_t b_row, T* out,
                   int64_t out_row, Keep<T> keep, Band band) {
  const int64_t tiles = (rows + PRODUCT_ROWS[VECTORS] - 1) / PRODUCT_ROWS[VECTORS];
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = rows * i / tiles, last = rows * (i + 1) / tiles;
    if (band == Band::columns_until_row && column >= last) continue;
    const int64_t from = band == Band::from_row ? first : 0;
    const int64_t to = band == Band::until_row && last < depth ? last : depth;
    const Strided<T> part = {a.p + first * a.row + from * a.depth, a.row, a.depth};
    const Keep<T> kept = {keep.factor == nullptr ? nullptr : keep.factor + first * keep.step, keep.step};
    product_rows<T, VECTORS>(last - first, part, b + from * b_row + column, b_row, to - from,
                             out + first * out_row + column, out_row, kept);
  }
}

template <class T>
void product(int64_t rows, int64_t columns, int64_t depth, Strided<T> a, const T* b, int64_t b_row, T* out,
             int64_t out_row, Keep<T> keep, Band band = Band::all) {
  constexpr int L = LANES<T>;
  int64_t column = 0;
  if (band == Band::columns_until_row) {  // narrower panels follow the triangle closer
    for (; column + 2 * L <= columns; column += 2 * L) {
      product_panel<T, 2>(rows, column, depth, a, b, b_row, out, out_row, keep, band);
    }
  }
  for (; column + PRODUCT_VECTORS * L <= columns; column += PRODUCT_VECTORS * L) {
    product_panel<T, PRODUCT_VECTORS>(rows, column, depth, a, b, b_row, out, out_row, keep, band);
  }
  const int64_t left = (columns - column) / L;
  if constexpr (PRODUCT_VECTORS > 2) {
    if (left == 3) return product_panel<T, 3>(rows, column, depth, a, b, b_row, out, out_row, keep, band);
    if (left == 2) return product_panel<T, 2>(rows, column, depth, a, b, b_row, out, out_row, keep, band);
  }
  if (left == 1) product_panel<T, 1>(rows, column, depth, a, b, b_row, out, out_row, keep, band);
}

// out [width][out_row] = the transpose of in [rows][in_row]; both filled up to whole vectors, with zeros beyond `rows`.
template <class T>
void transpose_rows(const T* in, int64_t in_row, int64_t rows, int64_t width, T* out, int64_t out_row) {
  constexpr int L = LANES<T>;
  for (int64_t row = 0; row < rows; row += L) {
    for (int64_t column = 0; column < width; column += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = row + i < rows ? load(in + (row + i) * in_row + column) : Vector<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (column + i) * out_row + row, square[i]);
    }
  }
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
