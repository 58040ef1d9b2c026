// K_l = 2 Re sum_n c_n e^{l z_n}: with l = first + C j + i, a product of two tables,
//
//   K_l = sum_n a_nj t_ni,   a_nj = 2 c_n e^{(first + C j) z_n},   t_ni = e^{i z_n}   (real parts minus imaginary ones)
//
// that is a real matrix product [C, 2 N] x [2 N, C] for every segment. Tables are geometric series in double: e^{C z} and
// e^{first z} have their phase reduced in double (C is a power of two: C z is exact), so the error does not grow with l.
//
// backward: G_nj = sum_i t_ni dK_l and G'_nj = sum_i t_ni i dK_l, one product [2 N, C] x [C, 2 C], then sums over j.
#include "ssm.h"

#include "../common/vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Complex {
  double re, im;
};

SEQOPS_INLINE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }

// Beyond it a growing series stays where it is: infinite once stored, but never infinity times zero on its way.
constexpr double MOST = 1e300;

SEQOPS_INLINE double clamped(double x) { return x > MOST ? MOST : (x < -MOST ? -MOST : x); }

// e^{l z}, with 1 for l = 0 whatever z is. The phase l * im(z) is rounded, and what the rounding lost is put back.
Complex power(double l, Complex z) {
  if (l == 0) return {1, 0};
  if (z.re == -__builtin_inf()) return {0, 0};
  const double size = clamped(__builtin_exp(l * z.re)), phase = l * z.im;
  const double lost = __builtin_fma(l, z.im, -phase);
  const double sine = __builtin_sin(phase), cosine = __builtin_cos(phase);
  return {size * (cosine - lost * sine), size * (sine + lost * cosine)};
}

typedef float Singles __attribute__((vector_size(SEQOPS_VECTOR_BYTES / 2)));

template <class T>
constexpr double LEAST = sizeof(T) == 4 ? 1.2e-38 : 1e-300;  // smaller numbers are slow, and do not count

template <class T>
SEQOPS_INLINE void store_part(T* p, Vector<double> x, bool growing) {
  const Vector<double> size = x < 0.0 ? -x : x;
  x = size < LEAST<T> ? Vector<double>{} : x;
  if (growing) x = size >= MOST ? x * 1e300 : x;
  if constexpr (sizeof(T) == 4) {
    const Singles narrow = __builtin_convertvector(x, Singles);
    __builtin_memcpy(p, &narrow, sizeof(narrow));
  } else {
    __builtin_memcpy(p, &x, sizeof(x));
  }
}

// first * ratio^i for i < count, a multiple of 8; parts apart.
template <class T>
void series(Complex first, Complex ratio, int64_t count, T* re, T* im) {
  using V = Vector<double>;
  constexpr int64_t D = LANES<double>;
  const bool growing = !(ratio.re * ratio.re + ratio.im * ratio.im <= 1);
  V x = {}, y = {};
  Complex value = first, step = {1, 0};
#pragma GCC unroll 8
  for (int lane = 0; lane < D; ++lane) {
    x[lane] = value.re, y[lane] = value.im;
    value = value * ratio, step = step * ratio;
    if (growing) {
      value = {clamped(value.re), clamped(value.im)};
      step = {clamped(step.re), clamped(step.im)};
    }
  }
  for (int64_t i = 0; i < count; i += D) {
    store_part(re + i, x, growing);
    store_part(im + i, y, growing);
    const V real = x * step.re - y * step.im;
    y = x * step.im + y * step.re;
    x = real;
    if (growing) x = clamp<double>(x, MOST), y = clamp<double>(y, MOST);
  }
}

// ---- products

// out[r, :] (+)= sum_k a[k * a_k + r * a_row] b[k * ldb + :] for ROWS rows and VECTORS vectors; of row r only
// valid - r * ldo elements exist.
template <class T, int ROWS, int VECTORS>
SEQOPS_INLINE void multiply_tile(const T* a, int64_t a_k, int64_t a_row, const T* b, int64_t ldb, int64_t depth, T* out,
                                 int64_t ldo, int64_t valid, bool add) {
  constexpr int64_t L = LANES<T>;
  Vector<T> sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) column[v] = load<T>(b + k * ldb + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[k * a_k + r * a_row];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t left = valid - r * ldo - v * L, n = left < L ? left : L;
      T* p = out + r * ldo + v * L;
      if (n > 0) store<T>(p, add ? load<T>(p, n) + sum[r][v] : sum[r][v], n);
    }
  }
}

template <class T, int VECTORS>
void multiply_columns(const T* a, int64_t a_k, int64_t a_row, const T* b, int64_t ldb, int64_t rows, int64_t depth,
                      T* out, int64_t ldo, int64_t valid, bool add) {
  int64_t r = 0;
  const auto at = [&](int64_t row) { return out + row * ldo; };
  for (; r + 6 <= rows; r += 6) {
    multiply_tile<T, 6, VECTORS>(a + r * a_row, a_k, a_row, b, ldb, depth, at(r), ldo, valid - r * ldo, add);
  }
  for (; r + 2 <= rows; r += 2) {
    multiply_tile<T, 2, VECTORS>(a + r * a_row, a_k, a_row, b, ldb, depth, at(r), ldo, valid - r * ldo, add);
  }
  for (; r < rows; ++r) {
    multiply_tile<T, 1, VECTORS>(a + r * a_row, a_k, a_row, b, ldb, depth, at(r), ldo, valid - r * ldo, add);
  }
}

// Six rows of sums, a vector of each column and a factor fill the registers.
template <class T>
constexpr int64_t VECTORS = SEQOPS_VECTOR_BYTES == 64 ? 4 : 2;

template <class T>
void multiply(const T* a, int64_t a_k, int64_t a_row, const T* b, int64_t ldb, int64_t rows, int64_t columns,
              int64_t depth, T* out, int64_t ldo, int64_t valid, bool add) {
  constexpr int64_t L = LANES<T>, WIDE = VECTORS<T> * L;
  int64_t i = 0;
  for (; i + WIDE <= columns; i += WIDE) {
    multiply_columns<T, VECTORS<T>>(a, a_k, a_row, b + i, ldb, rows, depth, out + i, ldo, valid - i, add);
  }
  for (; i < columns; i += L) {
    multiply_columns<T, 1>(a, a_k, a_row, b + i, ldb, rows, depth, out + i, ldo, valid - i, add);
  }
}

// ---- tasks

template <class T>
struct Segment {
  int64_t head, index, first, length, rows;

  Segment(const SsmKernel& k, int64_t task) {
    head = task / k.segments, index = task % k.segments;
    first = index * k.C * k.C;
    length = k.L - first < k.C * k.C ? k.L - first : k.C * k.C;
    rows = (length + k.C - 1) / k.C;
  }
};

template <class T>
Complex number(const void* data, int64_t i) {
  const T* p = static_cast<const T*>(data) + 2 * i;
  return {static_cast<double>(p[0]), static_cast<double>(p[1])};
}

template <class T, class Run>
SEQOPS_INLINE void for_each_segment(const SsmKernel& k, Run run) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED);
    if (task >= k.H * k.segments) return;
    run(Segment<T>(k, task));
  }
}

template <class T>
void forward(const SsmKernel& k, int64_t worker) {
  const int64_t C = k.C;
  T* const t = reinterpret_cast<T*>(static_cast<char*>(k.scratch) + worker * k.scratch_bytes);  // [MODES, 2, C]
  T* const anchors = t + MODES * 2 * C;                                                         // [MODES, 2, C]
  for_each_segment<T>(k, [&](const Segment<T>& s) {
    T* out = static_cast<T*>(k.k) + s.head * k.L + s.first;
    const int64_t rows_made = (s.rows + 7) / 8 * 8;
    for (int64_t n = 0; n < k.N; n += MODES) {
      const int64_t modes = k.N - n < MODES ? k.N - n : MODES;
      for (int64_t m = 0; m < modes; ++m) {
        const Complex z = number<T>(k.z, s.head * k.N + n + m), c = number<T>(k.c, s.head * k.N + n + m);
        const Complex start = c * power(static_cast<double>(s.first), z);
        const Complex step = power(static_cast<double>(C), z);
        series<T>({1, 0}, power(1, z), C, t + m * 2 * C, t + m * 2 * C + C);
        // Conjugate: then the product is a sum.
        series<T>({2 * start.re, -2 * start.im}, {step.re, -step.im}, rows_made, anchors + m * 2 * C,
                  anchors + m * 2 * C + C);
      }
      multiply<T>(anchors, C, 1, t, C, s.rows, C, 2 * modes, out, C, s.length, n > 0);
    }
  });
}

// dk of a segment, [C columns, 2, C rows]: as it is, and times the column.
template <class T>
void read_columns(const SsmKernel& k, const Segment<T>& s, T* columns) {
  constexpr int64_t L = LANES<T>;
  const T* dk = static_cast<const T*>(k.dk) + s.head * k.L + s.first;
  for (int64_t j = 0; j < k.C; j += L) {
    for (int64_t i = 0; i < k.C; i += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int64_t row = 0; row < L; ++row) {
        const int64_t at = (j + row) * k.C + i, left = s.length - at;
        square[row] = left > 0 ? load<T>(dk + at, left < L ? left : L) : Vector<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t column = 0; column < L; ++column) {
        T* p = columns + (i + column) * 2 * k.C + j;
        store<T>(p, square[column]);
        store<T>(p + k.C, square[column] * static_cast<T>(i + column));
      }
    }
  }
}

template <class T>
SEQOPS_INLINE double sum_of(Vector<T> v) {
  double sum = 0;
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES<T>; ++lane) sum += static_cast<double>(v[lane]);
  return sum;
}

template <class T>
void backward(const SsmKernel& k, int64_t worker) {
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  const int64_t C = k.C;
  T* const t = reinterpret_cast<T*>(static_cast<char*>(k.scratch) + worker * k.scratch_bytes);  // [MODES, 2, C]
  T* const anchors = t + MODES * 2 * C;                                                         // [2, C], of one mode
  T* const columns = anchors + 2 * C;                                                           // [C, 2, C]
  T* const products = columns + 2 * C * C;                                                      // [MODES, 2, 2, C]
  V offsets[MOST_COLUMNS / LANES<T> + 1];                                                       // C j
  for (int64_t j = 0; j < C; ++j) offsets[j / L][j % L] = static_cast<T>(C * j);

  for_each_segment<T>(k, [&](const Segment<T>& s) {
    read_columns(k, s, columns);
    const int64_t rows_made = (s.rows + L - 1) / L * L;
    for (int64_t n = 0; n < k.N; n += MODES) {
      const int64_t modes = k.N - n < MODES ? k.N - n : MODES;
      for (int64_t m = 0; m < modes; ++m) {
        const Complex z = number<T>(k.z, s.head * k.N + n + m);
        series<T>({1, 0}, power(1, z), C, t + m * 2 * C, t + m * 2 * C + C);
      }
      multiply<T>(t, 1, C, columns, 2 * C, 2 * modes, 2 * C, C, products, 2 * C, modes * 4 * C, false);
      for (int64_t m = 0; m < modes; ++m) {
        const Complex z = number<T>(k.z, s.head * k.N + n + m);
        series<T>({1, 0}, power(static_cast<double>(C), z), (rows_made + 7) / 8 * 8, anchors, anchors + C);
        for (int64_t j = s.rows; j < rows_made; ++j) anchors[j] = anchors[C + j] = 0;
        const T* of_mode = products + m * 4 * C;
        V plain_re = {}, plain_im = {}, timed_re = {}, timed_im = {};
        for (int64_t j = 0; j < rows_made; j += L) {
          const V a_re = load<T>(anchors + j), a_im = load<T>(anchors + C + j), offset = offsets[j / L];
          const V g_re = load<T>(of_mode + j), g_im = load<T>(of_mode + 2 * C + j);
          const V u_re = load<T>(of_mode + C + j) + offset * g_re, u_im = load<T>(of_mode + 3 * C + j) + offset * g_im;
          plain_re += a_re * g_re - a_im * g_im;
          plain_im += a_re * g_im + a_im * g_re;
          timed_re += a_re * u_re - a_im * u_im;
          timed_im += a_re * u_im + a_im * u_re;
        }
        const double first = static_cast<double>(s.first);
        const Complex factor = power(first, z);
        const Complex plain = factor * Complex{sum_of<T>(plain_re), sum_of<T>(plain_im)};
        const Complex timed = factor * Complex{sum_of<T>(timed_re), sum_of<T>(timed_im)};
        double* sums = k.sums + ((s.head * k.segments + s.index) * k.N + n + m) * 4;
        sums[0] = plain.re, sums[1] = plain.im;
        sums[2] = timed.re + first * plain.re, sums[3] = timed.im + first * plain.im;
      }
    }
  });
}

}  // namespace

extern const SsmKernels ssm_kernels;
const SsmKernels ssm_kernels = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace seqops::SEQOPS_ISA
