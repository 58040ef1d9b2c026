// Newton-Schulz iterations on the CPU: see newton_schulz.h for the notation.
//
// Every product is computed in panels of columns, packed one after the other so that they stream through the caches:
//
//   out[i][j .. j + W) = alpha sum_d a[i][d] panel[d][0 .. W) + beta base[i][j .. j + W)
#include "newton_schulz.h"

#include "../common/product.h"

namespace seqops::SEQOPS_ISA {
namespace {

using K = NewtonSchulz;
using Pass = NewtonSchulzPass;

constexpr int64_t DEPTH = 512;  // of a packed panel that is used before the next part of it

// ---- a register tile

template <class T>
struct Rows {  // of one panel of columns; `base` null: nothing is added
  const T* a;
  int64_t a_row;
  const T* panel;
  int64_t depth;
  T* out;
  const T* base;
  int64_t out_row;
  T alpha, beta;
};

template <class T, int ROWS, int VECTORS>
void tile(Rows<T> r, int64_t first) {
  constexpr int L = LANES<T>;
  Vector<T> sum[ROWS][VECTORS] = {};
  const T *a = r.a + first * r.a_row, *panel = r.panel;
  for (int64_t d = 0; d < r.depth; ++d, panel += VECTORS * L) {
    Vector<T> line[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) line[v] = load(panel + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vector<T> x = a[i * r.a_row + d] - Vector<T>{};
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += x * line[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = (first + i) * r.out_row + v * L;
      const Vector<T> scaled = sum[i][v] * r.alpha;
      store(r.out + at, r.base == nullptr ? scaled : load(r.base + at) * r.beta + scaled);
    }
  }
}

constexpr int TILE_VECTORS = 2, TILE_ROWS = PRODUCT_ROWS[TILE_VECTORS];
template <class T>
constexpr int64_t WIDTH = TILE_VECTORS * LANES<T>;  // columns of a packed panel, the last of a matrix may be half of it
static_assert(K::PANEL % WIDTH<float> == 0);

template <class T, int VECTORS, int ROWS = TILE_ROWS>
SEQOPS_INLINE void tile_of(const Rows<T>& r, int64_t first, int64_t rows) {
  if (rows == ROWS) return tile<T, ROWS, VECTORS>(r, first);
  if constexpr (ROWS > 1) tile_of<T, VECTORS, ROWS - 1>(r, first, rows);
}

template <class T, int VECTORS>
void tiles(Rows<T> r, int64_t rows) {
  const int64_t depth = r.depth, count = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t d = 0; d < depth; d += DEPTH) {
    r.depth = depth - d < DEPTH ? depth - d : DEPTH;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = rows * i / count, last = rows * (i + 1) / count;
      tile_of<T, VECTORS>(r, first, last - first);
    }
    r.a += r.depth, r.panel += r.depth * VECTORS * LANES<T>;
    r.base = r.out, r.beta = 1;
  }
}

template <class T>
void multiply(const Rows<T>& r, int64_t rows, int64_t vectors) {
  vectors == TILE_VECTORS ? tiles<T, TILE_VECTORS>(r, rows) : tiles<T, 1>(r, rows);
}

// ---- packing

// panel[d][0 .. width) = in[d][0 .. width)
template <class T>
void pack(const T* in, int64_t in_row, int64_t depth, int64_t vectors, T* panel) {
  constexpr int64_t L = LANES<T>;
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t v = 0; v < vectors; ++v) store(panel + (d * vectors + v) * L, load(in + d * in_row + v * L));
  }
}

// panel[d][c] = in[c][d] for c < rows, else 0; with `more` also more[d][c].
template <class T>
void pack_transpose(const T* in, int64_t in_row, int64_t rows, int64_t depth, int64_t vectors, T* panel,
                    const T* more = nullptr) {
  constexpr int64_t L = LANES<T>;
  for (int64_t d = 0; d < depth; d += L) {
    const int64_t lines = depth - d < L ? depth - d : L;
    for (int64_t v = 0; v < vectors; ++v) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        square[i] = v * L + i < rows ? load(in + (v * L + i) * in_row + d) : Vector<T>{};
      }
      transpose<T>(square);
      for (int64_t i = 0; i < lines; ++i) {
        const int64_t at = ((d + i) * vectors + v) * L;
        store(panel + at, more == nullptr ? square[i] : square[i] + load(more + (d + i) * in_row + v * L));
      }
    }
  }
}

// ---- what is kept of a matrix

template <class T>
struct Numbers {
  T largest, relative,
      divisor;  // X_0 = x / largest / divisor; relative = |x| / largest, divisor = relative + eps / largest
  T inner;      // <X_0, Y>
};

template <class T>
struct Matrices {
  Numbers<T>* numbers;
  T *x, *a, *p;  // of this step
  T* next;       // X of the next step
  T *y, *t, *q;  // for a gradient; V lies where Q will be

  Matrices(const K& k, int64_t step, void* own) {
    T* data = static_cast<T*>(own);
    const int64_t kept = k.keep && k.steps > 1 ? k.steps : 1, at = k.keep ? step : 0;
    numbers = static_cast<Numbers<T>*>(own);
    data += k.numbers_size;
    x = data + at * k.x_size, next = data + (k.keep ? at + 1 : 0) * k.x_size;
    data += kept * k.x_size;
    a = data + at * k.a_size, data += kept * k.a_size;
    p = data + at * k.a_size, data += kept * k.a_size;
    y = data, t = y + k.x_size, q = t + k.a_size;
  }
};

// `run(column, vectors)` for the panels of a task's columns, of which there are `columns` in all.
template <class T, class Run>
SEQOPS_INLINE void for_each_panel(int64_t task, int64_t columns, Run run) {
  constexpr int64_t L = LANES<T>;
  const int64_t begin = task * K::PANEL, end = columns - begin < K::PANEL ? columns : begin + K::PANEL;
  for (int64_t column = begin; column < end; column += WIDTH<T>) {
    run(column, end - column > L ? int64_t{TILE_VECTORS} : int64_t{1});
  }
}

// ---- the norm

template <class T>
struct Size {
  T largest;  // infinite or NaN where an element is
  double sum;
};

// Of the elements, each divided by `unit`: the largest magnitude and the sum of squares.
template <class T, class S>
Size<T> size_of(const S* x, int64_t count, T unit) {
  constexpr int64_t L = LANES<T>, BLOCK = 2048;  // summed in T, then in double
  Vector<T> largest = {}, strange = {};
  double sum = 0;
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t end = count - first < BLOCK ? count : first + BLOCK;
    Vector<T> squares[2] = {};
    for (int64_t i = first; i < end; i += L) {
      const Vector<T> value = load(x + i, end - i < L ? end - i : L) / unit;
      const Vector<T> positive = value < T(0) ? -value : value;
      largest = positive > largest ? positive : largest;
      strange += value - value;  // NaN where the value is infinite or NaN
      squares[i / L % 2] += value * value;
    }
    const Vector<T> both = squares[0] + squares[1];
    for (int64_t lane = 0; lane < L; ++lane) sum += static_cast<double>(both[lane]);
  }
  T most = 0;
  for (int64_t lane = 0; lane < L; ++lane) {
    most = largest[lane] > most ? largest[lane] : most;
    if (strange[lane] != 0) most = __builtin_inf();
  }
  return {most, sum};
}

template <class T, class S>
void measure(const K& k, const S* x, Numbers<T>& numbers) {
  const int64_t count = k.M * k.N;
  const T largest = size_of<T>(x, count, T(1)).largest;
  if (largest == 0) {
    numbers = {0, 0, 1, 0};
  } else if (largest == static_cast<T>(__builtin_inf())) {
    bool nan = false;
    for (int64_t i = 0; i < count; ++i) nan |= (load(x + i, 1)[0] != load(x + i, 1)[0]);
    const T size = nan ? __builtin_nan("") : __builtin_inf();
    numbers = {1, size, size, 0};
  } else {
    const double relative = __builtin_sqrt(size_of<T>(x, count, largest).sum);
    const double divisor = relative + k.eps / static_cast<double>(largest);
    numbers = {largest, static_cast<T>(relative), static_cast<T>(divisor), 0};
  }
}

// ---- between storage and buffers, `rows` rows of X from `first` on

template <class T, class S, class Change>
SEQOPS_INLINE void read_rows(const K& k, const S* in, int64_t first, int64_t rows, T* out, Change change) {
  constexpr int64_t L = LANES<T>;
  if (k.M <= k.N) {
    for (int64_t i = first; i < first + rows; ++i) {
      for (int64_t c = 0; c < k.n; c += L) {
        store(out + i * k.x_row + c, change(load(in + i * k.n + c, k.n - c < L ? k.n - c : L)));
      }
    }
    return;
  }
  for (int64_t i = first; i < first + rows; i += L) {
    const int64_t lanes = first + rows - i < L ? first + rows - i : L;
    for (int64_t c = 0; c < k.n; c += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int64_t d = 0; d < L; ++d) square[d] = c + d < k.n ? load(in + (c + d) * k.m + i, lanes) : Vector<T>{};
      transpose<T>(square);
      for (int64_t d = 0; d < lanes; ++d) store(out + (i + d) * k.x_row + c, change(square[d]));
    }
  }
}

// `value(i, c)`: the vector of row i from column c on.
template <class T, class S, class Value>
SEQOPS_INLINE void write_rows(const K& k, int64_t first, int64_t rows, S* out, Value value) {
  constexpr int64_t L = LANES<T>;
  if (k.M <= k.N) {
    for (int64_t i = first; i < first + rows; ++i) {
      for (int64_t c = 0; c < k.n; c += L) store(out + i * k.n + c, value(i, c), k.n - c < L ? k.n - c : L);
    }
    return;
  }
  for (int64_t i = first; i < first + rows; i += L) {
    const int64_t lanes = first + rows - i < L ? first + rows - i : L;
    for (int64_t c = 0; c < k.n; c += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int64_t d = 0; d < L; ++d) square[d] = d < lanes ? value(i + d, c) : Vector<T>{};
      transpose<T>(square);
      for (int64_t d = 0; d < L && c + d < k.n; ++d) store(out + (c + d) * k.m + i, square[d], lanes);
    }
  }
}

// ---- passes of products

// Columns of out = alpha a b + beta base where that is symmetric; `pack(column, vectors)` packs b.
template <class T, class Pack>
SEQOPS_INLINE void symmetric(const K& k, int64_t task, const T* a, int64_t a_row, int64_t depth, T alpha, T* out,
                             const T* base, T beta, T* panel, Pack pack_columns) {
  for_each_panel<T>(task, k.m, [&](int64_t column, int64_t vectors) {
    pack_columns(column, vectors);
    T* const top = out + column * k.a_row + column;
    const T* const added = base == nullptr ? nullptr : base + column * k.a_row + column;
    const Rows<T> rows = {a + column * a_row, a_row, panel, depth, top, added, k.a_row, alpha, beta};
    multiply(rows, k.m - column, vectors);
    const int64_t width = vectors * LANES<T>;
    if (k.m - column > width) {
      transpose_rows(top + width * k.a_row, k.a_row, k.m - column - width, width, top + width, k.a_row);
    }
  });
}

template <class T>
void gram(const K& k, const Matrices<T>& own, int64_t task, T* panel) {
  symmetric(k, task, own.x, k.x_row, k.n, T(1), own.a, static_cast<const T*>(nullptr), T(0), panel,
            [&](int64_t column, int64_t vectors) {
              pack_transpose(own.x + column * k.x_row, k.x_row, k.m - column, k.n, vectors, panel);
            });
}

template <class T>
void polynomial(const K& k, const Matrices<T>& own, T b, T c, int64_t task, T* panel) {
  symmetric(k, task, own.a, k.a_row, k.m, c, own.p, static_cast<const T*>(own.a), b, panel,
            [&](int64_t column, int64_t vectors) { pack(own.a + column, k.a_row, k.m, vectors, panel); });
}

// next = a X + P X; in place too, since the columns of X that a panel reads are packed before they are written.
template <class T>
void advance(const K& k, const Matrices<T>& own, T a, int64_t task, T* panel) {
  for_each_panel<T>(task, k.n, [&](int64_t column, int64_t vectors) {
    const T* const x = own.x + column;
    pack(x, k.x_row, k.m, vectors, panel);
    multiply(Rows<T>{own.p, k.a_row, panel, k.m, own.next + column, x, k.x_row, T(1), a}, k.m, vectors);
  });
}

template <class T>
void cross(const K& k, const Matrices<T>& own, int64_t task, T* panel) {
  for_each_panel<T>(task, k.m, [&](int64_t column, int64_t vectors) {
    pack_transpose(own.x + column * k.x_row, k.x_row, k.m - column, k.n, vectors, panel);
    multiply(Rows<T>{own.y, k.x_row, panel, k.n, own.t + column, nullptr, k.a_row, T(1), T(0)}, k.m, vectors);
  });
}

template <class T>
void slope(const K& k, const Matrices<T>& own, T b, T c, int64_t task, T* panel) {
  for_each_panel<T>(task, k.m, [&](int64_t column, int64_t vectors) {
    pack_transpose(own.t + column * k.a_row, k.a_row, k.m - column, k.m, vectors, panel, own.t + column);
    multiply(Rows<T>{own.a, k.a_row, panel, k.m, own.q + column, own.t + column, k.a_row, c, b}, k.m, vectors);
  });
}

// out + out^T, in place
template <class T>
void mirror(const K& k, T* out, int64_t task) {
  constexpr int64_t L = LANES<T>;
  const int64_t begin = task * K::PANEL, end = k.m - begin < K::PANEL ? k.m : begin + K::PANEL;
  for (int64_t column = begin; column < end; column += L) {
    for (int64_t row = column; row < k.m; row += L) {
      Vector<T> lower[L], upper[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        lower[i] = row + i < k.m ? load(out + (row + i) * k.a_row + column) : Vector<T>{};
        upper[i] = column + i < k.m ? load(out + (column + i) * k.a_row + row) : Vector<T>{};
      }
      transpose<T>(upper);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        lower[i] += upper[i];
        if (row + i < k.m) store(out + (row + i) * k.a_row + column, lower[i]);
      }
      transpose<T>(lower);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        if (column + i < k.m) store(out + (column + i) * k.a_row + row, lower[i]);
      }
    }
  }
}

// Y = a Y + P Y + Q X, in place: the columns that a panel reads are packed before they are written.
template <class T>
void retreat(const K& k, const Matrices<T>& own, T a, int64_t task, T* panel) {
  for_each_panel<T>(task, k.n, [&](int64_t column, int64_t vectors) {
    T* const y = own.y + column;
    pack(y, k.x_row, k.m, vectors, panel);
    multiply(Rows<T>{own.p, k.a_row, panel, k.m, y, y, k.x_row, T(1), a}, k.m, vectors);
    pack(own.x + column, k.x_row, k.m, vectors, panel);
    multiply(Rows<T>{own.q, k.a_row, panel, k.m, y, y, k.x_row, T(1), T(1)}, k.m, vectors);
  });
}

template <class T>
T inner(const K& k, const T* x, const T* y) {
  constexpr int64_t L = LANES<T>;
  double sum = 0;
  for (int64_t i = 0; i < k.m; ++i) {
    Vector<T> part = {};
    for (int64_t c = 0; c < k.n; c += L) {
      const int64_t lanes = k.n - c < L ? k.n - c : L;
      part += load(x + i * k.x_row + c, lanes) * load(y + i * k.x_row + c, lanes);
    }
    for (int64_t lane = 0; lane < L; ++lane) sum += static_cast<double>(part[lane]);
  }
  return static_cast<T>(sum);
}

// ---- a task

template <class S>
void run(const K& k, int64_t item, Pass pass, int64_t step, int64_t task, void* own_, void* panel_) {
  using T = Compute<S>;
  const Matrices<T> own(k, step, own_);
  T* const panel = static_cast<T*>(panel_);
  Numbers<T>& numbers = *own.numbers;
  const int64_t at = item * k.M * k.N, first = task * K::PANEL;
  const int64_t rows = k.m - first < K::PANEL ? k.m - first : K::PANEL;
  const S* const x = static_cast<const S*>(k.x) + at;
  S* const out = static_cast<S*>(k.out) + at;
  const double* triple = k.coefficients + 3 * step;
  const auto coefficient = [&](int i) { return static_cast<T>(triple[i]); };
  switch (pass) {
    case Pass::norm: return measure<T>(k, x, numbers);
    case Pass::load: {
      const T unit = numbers.largest == 0 ? T(1) : numbers.largest, divisor = numbers.divisor;
      return read_rows(k, x, first, rows, own.x, [&](Vector<T> value) { return value / unit / divisor; });
    }
    case Pass::gram: return gram(k, own, task, panel);
    case Pass::polynomial: return polynomial(k, own, coefficient(1), coefficient(2), task, panel);
    case Pass::advance: return advance(k, own, coefficient(0), task, panel);
    case Pass::store:
      return write_rows<T>(k, first, rows, out, [&](int64_t i, int64_t c) { return load(own.x + i * k.x_row + c); });
    case Pass::load_gradient:
      return read_rows(k, static_cast<const S*>(k.grad) + at, first, rows, own.y,
                       [](Vector<T> value) { return value; });
    case Pass::cross: return cross(k, own, task, panel);
    case Pass::slope: return slope(k, own, coefficient(1), coefficient(2), task, panel);
    case Pass::mirror: return mirror(k, own.q, task);
    case Pass::retreat: return retreat(k, own, coefficient(0), task, panel);
    case Pass::inner: numbers.inner = inner(k, own.x, own.y); return;
    case Pass::finish: {
      const bool zero = numbers.largest == 0;
      const T unit = zero ? T(1) : numbers.largest, divisor = numbers.divisor;
      const T along = zero ? T(0) : numbers.inner * (divisor / numbers.relative);
      return write_rows<T>(k, first, rows, out, [&](int64_t i, int64_t c) {
        const int64_t place = i * k.x_row + c;
        const Vector<T> value = (load(own.y + place) - load(own.x + place) * along) / divisor / unit;
        return zero ? Vector<T>{} : value;
      });
    }
  }
}

}  // namespace

extern const NewtonSchulzKernels newton_schulz_kernels = {{run<float>, run<double>, run<bfloat16>, run<float16>}};

}  // namespace seqops::SEQOPS_ISA
