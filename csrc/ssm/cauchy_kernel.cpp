// y_l = sum_n v_n / (w_l - p_n) + conj(v_n) / (w_l - conj(p_n)), lanes along the nodes w.
//
// With x = re(w) - re(p), q = im(w) - im(p) and r = im(w) + im(p) a pair of terms is
//
//   (2 re(v) x - 2 im(v) im(p) + i 2 re(v) im(w)) / ((x + i q) (x + i r)),   x^2 - q r + i 2 x im(w) below
//
// one division by |below|^2, after x, q and r were scaled by the power of two that brings the largest of them to [1, 2):
// nothing overflows, and distances underflow only 1e-19 (float) of the largest apart.
#include "ssm.h"

#include "../common/vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
SEQOPS_INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

template <class T>
SEQOPS_INLINE Vector<T> size_of(Vector<T> x) {
  return larger<T>(x, -x);
}

// 2^-e where the largest of three numbers is in [2^e, 2^(e + 1)); kept within what its reciprocal can be.
template <class T>
SEQOPS_INLINE Vector<T> scale_of(Vector<T> x, Vector<T> q, Vector<T> r) {
  constexpr T LEAST = sizeof(T) == 4 ? static_cast<T>(0x1p-126) : static_cast<T>(0x1p-1022);
  constexpr T MOST = sizeof(T) == 4 ? static_cast<T>(0x1p126) : static_cast<T>(0x1p1022);
  const Vector<T> largest = larger<T>(size_of<T>(x), larger<T>(size_of<T>(q), size_of<T>(r)));
  const Vector<T> safe = at_most<T>(at_least<T>(largest, LEAST), MOST);
  const Bits<T> exponent = ((Bits<T>)safe >> Constants<T>::MANTISSA) << Constants<T>::MANTISSA;
  return (Vector<T>)(2 * (Bits<T>)constant<T>(1) - exponent);
}

template <class T>
struct Mode {
  T re, im;              // of the pole
  T twice_re, twice_im;  // 2 re(v), 2 im(v) im(p)
};

template <class T>
SEQOPS_INLINE Mode<T> mode_of(const CauchyKernel& k, int64_t i) {
  const T *v = static_cast<const T*>(k.v) + 2 * i, *w = static_cast<const T*>(k.w) + 2 * i;
  return {w[0], w[1], 2 * v[0], 2 * v[1] * w[1]};
}

template <class T>
struct Numbers {
  Vector<T> re, im;
};

template <class T>
struct Nodes {
  const T *re, *im, *finite;

  Nodes(const CauchyKernel& k, int64_t first)
      : re(static_cast<const T*>(k.nodes) + first), im(re + k.padded), finite(im + k.padded) {}
};

template <class T>
SEQOPS_INLINE Numbers<T> pair_of_terms(Numbers<T> node, const Mode<T>& mode) {
  using V = Vector<T>;
  const V x = node.re - mode.re, q = node.im - mode.im, r = node.im + mode.im;
  const V scale = scale_of<T>(x, q, r), x1 = x * scale, q1 = q * scale, r1 = r * scale, y1 = node.im * scale;
  const V below_re = x1 * x1 - q1 * r1, below_im = x1 * (y1 + y1);
  const V size = below_re * below_re + below_im * below_im;
  const V inverse = scale / size;  // infinite at a pole
  const V above_re = mode.twice_re * x1 - mode.twice_im * scale, above_im = mode.twice_re * y1;
  const V product_re = above_re * below_re + above_im * below_im,
          product_im = above_im * below_re - above_re * below_im;
  // At a pole `below` is 0: what is above it says where to.
  return {(size == static_cast<T>(0) ? above_re : product_re) * inverse,
          (size == static_cast<T>(0) ? above_im : product_im) * inverse};
}

// `count` nodes from `first` on, of VECTORS vectors.
template <class T, int VECTORS>
SEQOPS_INLINE void sum_modes(const CauchyKernel& k, int64_t head, int64_t first, int64_t count) {
  using V = Vector<T>;
  constexpr int64_t L = LANES<T>;
  const Nodes<T> nodes(k, first);
  Numbers<T> node[VECTORS], sum[VECTORS] = {};
#pragma GCC unroll 4
  for (int i = 0; i < VECTORS; ++i) {
    node[i] = {load<T>(nodes.re + i * L), load<T>(nodes.im + i * L)};
  }
  for (int64_t n = 0; n < k.N; ++n) {
    const Mode<T> mode = mode_of<T>(k, head * k.N + n);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
      const Numbers<T> terms = pair_of_terms<T>(node[i], mode);
      sum[i].re += terms.re, sum[i].im += terms.im;
    }
  }
  T* out = static_cast<T*>(k.y) + 2 * (head * k.L + first);
#pragma GCC unroll 4
  for (int i = 0; i < VECTORS; ++i) {
    const int64_t left = count - i * L, n = left < L ? left : L;
    const V finite = load<T>(nodes.finite + i * L), none = {};
    const V re = finite == static_cast<T>(0) ? none : sum[i].re, im = finite == static_cast<T>(0) ? none : sum[i].im;
    T parts[2 * L];
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) parts[2 * lane] = re[lane], parts[2 * lane + 1] = im[lane];
    __builtin_memcpy(out + 2 * i * L, parts, 2 * n * sizeof(T));
  }
}

template <class T>
void forward(const CauchyKernel& k) {
  constexpr int64_t L = LANES<T>;
  for (;;) {
    const int64_t task = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED);
    if (task >= k.H * k.stretches) return;
    const int64_t head = task / k.stretches, first = task % k.stretches * NODES;
    const int64_t count = k.L - first < NODES ? k.L - first : NODES;
    int64_t i = 0;
    for (; i + 2 * L <= count; i += 2 * L) sum_modes<T, 2>(k, head, first + i, 2 * L);
    for (; i < count; i += L) sum_modes<T, 1>(k, head, first + i, count - i < L ? count - i : L);
  }
}

// ---- backward. With G = dy, a = 1 / conj(w - p) and b = 1 / (w - conj(p)):
//
//   dv = sum_l a G + b conj(G)    dw = conj(v) sum_l a^2 G + b^2 conj(G)    dnode = -sum_hn conj(v) a^2 G + v conj(b^2 conj(G))

template <class T>
SEQOPS_INLINE Numbers<T> times(Numbers<T> a, Numbers<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

template <class T>
SEQOPS_INLINE T sum_of(Vector<T> v) {
  T sum = 0;
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES<T>; ++lane) sum += v[lane];
  return sum;
}

// One mode and all nodes of a stretch. `dy` and, where wanted, `dnodes` are [2, NODES].
template <class T, bool NODES_TOO>
SEQOPS_INLINE void gradients(const CauchyKernel& k, const Nodes<T>& nodes, int64_t i_mode, int64_t count, const T* dy,
                             T* dnodes, T* sums) {
  using V = Vector<T>;
  const T *v = static_cast<const T*>(k.v) + 2 * i_mode, *w = static_cast<const T*>(k.w) + 2 * i_mode;
  const T v_re = v[0], v_im = v[1], pole_re = w[0], pole_im = w[1];
  Numbers<T> dv = {}, dw = {};
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const V node_im = load<T>(nodes.im + i);
    const V x = load<T>(nodes.re + i) - pole_re, q = node_im - pole_im, r = node_im + pole_im;
    const V scale = scale_of<T>(x, q, r), x1 = x * scale, q1 = q * scale, r1 = r * scale;
    const V near = x1 * x1 + q1 * q1, far = x1 * x1 + r1 * r1;
    const V inverse = scale / (near * far);
    const V of_near = far * inverse, of_far = near * inverse;
    const Numbers<T> a = {x1 * of_near, q1 * of_near}, b = {x1 * of_far, -r1 * of_far};
    const Numbers<T> g = {load<T>(dy + i), load<T>(dy + NODES + i)};
    const Numbers<T> ag = times<T>(a, g), bg = times<T>(b, {g.re, -g.im});
    const Numbers<T> aag = times<T>(a, ag), bbg = times<T>(b, bg);
    dv.re += ag.re + bg.re, dv.im += ag.im + bg.im;
    dw.re += aag.re + bbg.re, dw.im += aag.im + bbg.im;
    if constexpr (NODES_TOO) {
      const V re = v_re * (aag.re + bbg.re) + v_im * (aag.im + bbg.im);
      const V im = v_re * (aag.im - bbg.im) - v_im * (aag.re - bbg.re);
      store<T>(dnodes + i, load<T>(dnodes + i) - re);
      store<T>(dnodes + NODES + i, load<T>(dnodes + NODES + i) - im);
    }
  }
  sums[0] = sum_of<T>(dv.re), sums[1] = sum_of<T>(dv.im), sums[2] = sum_of<T>(dw.re), sums[3] = sum_of<T>(dw.im);
}

// dy of a stretch as [2, NODES]: 0 at nodes that were infinite, and past the end.
template <class T>
void read_gradient(const CauchyKernel& k, const Nodes<T>& nodes, int64_t head, int64_t first, int64_t count, T* dy) {
  const T* p = static_cast<const T*>(k.dy) + 2 * (head * k.L + first);
  for (int64_t i = 0; i < count; ++i) {
    const bool finite = nodes.finite[i] != 0;
    dy[i] = finite ? p[2 * i] : 0, dy[NODES + i] = finite ? p[2 * i + 1] : 0;
  }
  for (int64_t i = count; i < NODES && i % LANES<T> != 0; ++i) dy[i] = dy[NODES + i] = 0;
}

template <class T>
void backward(const CauchyKernel& k) {
  const int64_t groups = (k.H + k.group - 1) / k.group;
  T dy[2 * NODES], dnodes[2 * NODES];
  for (;;) {
    const int64_t task = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED);
    if (task >= groups * k.stretches) return;
    const int64_t group = task / k.stretches, stretch = task % k.stretches, first = stretch * NODES;
    const int64_t count = k.L - first < NODES ? k.L - first : NODES;
    const int64_t from = group * k.group, to = from + k.group < k.H ? from + k.group : k.H;
    const Nodes<T> nodes(k, first);
    for (int64_t i = 0; i < 2 * NODES; ++i) dnodes[i] = 0;
    for (int64_t head = from; head < to; ++head) {
      read_gradient(k, nodes, head, first, count, dy);
      for (int64_t n = 0; n < k.N; ++n) {
        T* sums = static_cast<T*>(k.sums) + ((head * k.stretches + stretch) * k.N + n) * 4;
        if (k.dnodes != nullptr) {
          gradients<T, true>(k, nodes, head * k.N + n, count, dy, dnodes, sums);
        } else {
          gradients<T, false>(k, nodes, head * k.N + n, count, dy, nullptr, sums);
        }
      }
    }
    if (k.dnodes == nullptr) continue;
    T* out = static_cast<T*>(k.dnodes) + group * 2 * k.L + first;
    __builtin_memcpy(out, dnodes, count * sizeof(T));
    __builtin_memcpy(out + k.L, dnodes + NODES, count * sizeof(T));
  }
}

}  // namespace

extern const CauchyKernels cauchy_kernels;
const CauchyKernels cauchy_kernels = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace seqops::SEQOPS_ISA
