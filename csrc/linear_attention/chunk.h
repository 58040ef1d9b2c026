// A chunk of one item in a thread's buffers: its rows of q, k, v and gradients, and what its decays multiply by.
//
// Every factor is e to a sum of decays, never a quotient and never the difference of two long sums, so that it is at most
// 1, and 0 after a reset. With t the steps of the chunk, n of them:
//
//   into_i = e^{g_0 + .. + g_i}          what is left at step i of the state before the chunk
//   out_j = e^{g_{j+1} + .. + g_{n-1}}   what is left after the chunk of what step j adds
//   whole = e^{g_0 + .. + g_{n-1}}
#pragma once

#include "../common/product.h"
#include "linear_attention.h"

namespace seqops::SEQOPS_ISA {
namespace {

constexpr int64_t C = LinearAttention::C;
constexpr int64_t PART = 16;     // steps of a part of a chunk, for decays of channels
constexpr double RESET = -1000;  // decays below are 0 in every type: counted as this, sums of them stay exact
constexpr int MOST_PARTS = C / PART;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float SMALLEST = 1.17549435e-38f;
};
template <>
struct Limits<double> {
  static constexpr double SMALLEST = 2.2250738585072014e-308;
};

template <class T>
constexpr T INFINITE = __builtin_inf();

// Memory handed out piece by piece.
template <class T>
struct Arena {
  T* next;

  T* take(int64_t count) {
    T* p = next;
    next += (count + 15) / 16 * 16;
    return p;
  }
};

// Subnormal numbers cost hundreds of cycles and say nothing here.
template <class T>
SEQOPS_INLINE Vector<T> flushed(Vector<T> factor) {
  return factor < Limits<T>::SMALLEST ? Vector<T>{} : factor;
}

template <class T>
SEQOPS_INLINE bool any_not_zero(Vector<T> v) {  // NaN is not zero
  T lanes[LANES<T>];
  store(lanes, v);
  bool any = false;
  for (int i = 0; i < LANES<T>; ++i) any = any || !(lanes[i] == 0);
  return any;
}

template <class T>
SEQOPS_INLINE bool is_reset(T g) {
  return g == -INFINITE<T>;
}

// Where one item is, and its sizes.
template <class S>
struct Item {
  using T = Compute<S>;

  const LinearAttention& k;
  int64_t item, row, head, batch, first, steps, window;
  int64_t K, V;  // in buffers
  T scale;

  Item(const LinearAttention& k, int64_t item) : k(k), item(item), row(item / k.H), head(item % k.H) {
    const Row& r = k.rows[row];
    batch = r.batch, first = r.first, steps = r.steps;
    window = k.window < steps ? k.window : 0;
    K = LinearAttention::padded(k.K), V = LinearAttention::padded(k.V);
    scale = static_cast<T>(k.scale);
  }

  int64_t chunks() const { return LinearAttention::chunks(steps); }
  int64_t size() const { return K * V; }
  bool by_channel() const { return k.decay == DecayKind::channel; }
  bool decays() const { return k.decay != DecayKind::none; }
  int64_t length(int64_t chunk) const { return steps - chunk * C < C ? steps - chunk * C : C; }

  template <class E>
  E* at(const HeadView& view, int64_t t) const {
    return static_cast<E*>(view.data) + batch * view.batch + (first + t) * view.step + head * view.head;
  }

  // Rows t .. t + n - 1, times `factor`, as [n][padded], zeros beyond `width`; zeros where the tensor is none. Adds to
  // `odd` what is not 0 where a number is infinite or NaN.
  void load_rows(const HeadView& view, int64_t t, int64_t n, int64_t width, int64_t padded, T factor, T* out,
                 Vector<T>& odd) const {
    constexpr int L = LANES<T>;
    for (int64_t i = 0; i < n; ++i, out += padded) {
      const S* in = view.data == nullptr ? nullptr : at<const S>(view, t + i);
      for (int64_t c = 0; c < padded; c += L) {
        const int64_t valid = width - c < L ? width - c : L;
        Vector<T> x = {};
        if (in != nullptr && valid > 0) x = load(in + c, valid);
        odd += x * T(0);
        store(out + c, x * factor);
      }
    }
  }

  void store_rows(const HeadView& view, int64_t t, int64_t n, int64_t width, int64_t padded, T factor,
                  const T* in) const {
    constexpr int L = LANES<T>;
    for (int64_t i = 0; i < n; ++i, in += padded) {
      S* out = at<S>(view, t + i);
      for (int64_t c = 0; c < width; c += L) store(out + c, load(in + c) * factor, width - c < L ? width - c : L);
    }
  }

  // A state [K][V] of the caller's, dense or absent, to and from buffers.
  void load_state(const void* states, T* out, bool transposed) const {
    const T* in = states == nullptr ? nullptr : static_cast<const T*>(states) + item * k.K * k.V;
    constexpr int L = LANES<T>;
    for (int64_t i = 0; i < size(); i += L) store(out + i, Vector<T>{});
    if (in == nullptr) return;
    for (int64_t i = 0; i < k.K; ++i) {
      if (transposed) {
        for (int64_t v = 0; v < k.V; ++v) out[v * K + i] = in[i * k.V + v];
      } else {
        for (int64_t v = 0; v < k.V; v += L) {
          const int64_t valid = k.V - v < L ? k.V - v : L;
          store(out + i * V + v, load(in + i * k.V + v, valid));
        }
      }
    }
  }
  void store_state(const T* in, void* states) const {
    T* out = static_cast<T*>(states) + item * k.K * k.V;
    constexpr int L = LANES<T>;
    for (int64_t i = 0; i < k.K; ++i) {
      for (int64_t v = 0; v < k.V; v += L) {
        store(out + i * k.V + v, load(in + i * V + v), k.V - v < L ? k.V - v : L);
      }
    }
  }
};

// ---- decays: one number at a time, whatever their storage type

SEQOPS_INLINE double decay_at(Storage type, const void* data, int64_t i) {
  switch (type) {
    case Storage::float32: return static_cast<const float*>(data)[i];
    case Storage::float64: return static_cast<const double*>(data)[i];
    case Storage::bfloat16: return load(static_cast<const bfloat16*>(data) + i, 1)[0];
    default: return load(static_cast<const float16*>(data) + i, 1)[0];
  }
}

template <class T>
SEQOPS_INLINE Vector<T> decays_at(Storage type, const void* data, int64_t i, int64_t n) {
  if constexpr (sizeof(T) == 8) {
    if (type == Storage::float64) return load(static_cast<const double*>(data) + i, n);
    Vector<T> result = {};
    for (int64_t lane = 0; lane < n; ++lane) result[lane] = decay_at(type, data, i + lane);
    return result;
  } else {
    if (type == Storage::bfloat16) return load(static_cast<const bfloat16*>(data) + i, n);
    if (type == Storage::float16) return load(static_cast<const float16*>(data) + i, n);
    return load(static_cast<const float*>(data) + i, n);
  }
}

template <class T>
SEQOPS_INLINE void store_decay(Storage type, void* data, int64_t i, T value) {
  const Vector<T> v = Vector<T>{} + value;
  if (type == Storage::float64) {
    static_cast<double*>(data)[i] = value;
  } else if (type == Storage::float32) {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  } else {
    const Vector<float> narrow = Vector<float>{} + static_cast<float>(v[0]);
    if (type == Storage::bfloat16)
      store(static_cast<bfloat16*>(data) + i, narrow, 1);
    else
      store(static_cast<float16*>(data) + i, narrow, 1);
  }
}

// The decays of one chunk and what follows from them.
//   one number a step: g, into, out [C]
//   one a channel:     g, a = e^g, into, out [C][K]; by parts of PART steps, e to the sums from the part's first step on,
//                      `up` [C][K], to its last one, `down` [C][K], and over all of it, `part` [parts][K]
template <class T>
struct Decays {
  T *g, *a, *into, *out, *up, *down, *part;
  T *high, *low;  // running sums of g in two parts, whose differences are exact enough
  T* whole;       // [K], also where steps have one number
  T* none;        // [K]: nothing decays
  bool odd;       // a decay that is NaN, or a reset

  Decays(Arena<T>& arena, int64_t K, bool by_channel) {
    const int64_t size = by_channel ? C * K : C;
    g = arena.take(size), a = arena.take(size), into = arena.take(size), out = arena.take(size);
    up = arena.take(size), down = arena.take(size), part = arena.take(MOST_PARTS * K);
    high = arena.take(C), low = arena.take(C), whole = arena.take(K);
  }
};

template <class S, class T = Compute<S>>
void load_step_decays(const Item<S>& item, int64_t t, int64_t n, Decays<T>& d, bool& odd) {
  constexpr int L = LANES<T>;
  double sum = 0;
  bool reset = false;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = item.batch * item.k.g.batch + (item.first + t + i) * item.k.g.step + item.head * item.k.g.head;
    double g = decay_at(item.k.decay_type, item.k.g.data, at);
    d.g[i] = static_cast<T>(g);
    odd = odd || !(g == g);
    reset = reset || is_reset(g);
    if (g > 0) g = 0;
    sum += g < RESET ? RESET : g;
    d.high[i] = static_cast<T>(sum);
    d.low[i] = static_cast<T>(sum - d.high[i]);
  }
  for (int64_t i = n; i < C; ++i) d.high[i] = d.high[n - 1], d.low[i] = d.low[n - 1];
  const T high = d.high[n - 1], low = d.low[n - 1];
  for (int64_t i = 0; i < C; i += L) {
    const Vector<T> h = load(d.high + i), l = load(d.low + i);
    store(d.into + i, exp<T>(h));
    store(d.out + i, exp<T>((high - h) + (low - l)));
  }
  T whole = d.into[n - 1];
  if (!reset && whole < Limits<T>::SMALLEST) whole = Limits<T>::SMALLEST;  // 0 is a reset's
  for (int64_t i = 0; i < item.K; ++i) d.whole[i] = whole;
}

template <class S, class T = Compute<S>>
void load_channel_decays(const Item<S>& item, int64_t t, int64_t n, Decays<T>& d, bool& odd) {
  constexpr int L = LANES<T>;
  const int64_t K = item.K, parts = (n + PART - 1) / PART;
  Vector<T> strange = {};
  for (int64_t c = 0; c < K; c += L) {
    const int64_t valid = item.k.K - c < L ? item.k.K - c : L;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = p * PART, end = begin + PART < n ? begin + PART : n;
      Vector<T> sum = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at =
            item.batch * item.k.g.batch + (item.first + t + i) * item.k.g.step + item.head * item.k.g.head + c;
        Vector<T> g = {};
        if (valid > 0) g = decays_at<T>(item.k.decay_type, item.k.g.data, at, valid);
        store(d.g + i * K + c, g);
        g = g > T(0) ? Vector<T>{} : g;
        strange += g == g ? Vector<T>{} : g;
        store(d.a + i * K + c, exp<T>(g));
        sum += g;
        store(d.up + i * K + c, exp<T>(sum));
      }
      const Vector<T> least = sum == -INFINITE<T> ? Vector<T>{} : constant<T>(Limits<T>::SMALLEST);
      const Vector<T> all = exp<T>(sum);
      store(d.part + p * K + c, all < least ? least : all);
      sum = Vector<T>{};
      for (int64_t i = end - 1; i >= begin; --i) {
        store(d.down + i * K + c, exp<T>(sum));
        const Vector<T> g = load(d.g + i * K + c);
        sum += g > T(0) ? Vector<T>{} : g;
      }
    }
    Vector<T> before = constant<T>(1), after = constant<T>(1);
    bool cut[LANES<T>] = {};
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = p * PART, end = begin + PART < n ? begin + PART : n;
      for (int64_t i = begin; i < end; ++i) store(d.into + i * K + c, flushed<T>(before * load(d.up + i * K + c)));
      before *= load(d.part + p * K + c);
    }
    for (int64_t p = parts - 1; p >= 0; --p) {
      const int64_t begin = p * PART, end = begin + PART < n ? begin + PART : n;
      for (int64_t i = begin; i < end; ++i) store(d.out + i * K + c, flushed<T>(after * load(d.down + i * K + c)));
      const Vector<T> factor = load(d.part + p * K + c);
      for (int lane = 0; lane < L; ++lane) cut[lane] = cut[lane] || factor[lane] == 0;
      after *= factor;
    }
    for (int lane = 0; lane < L; ++lane) {
      const T whole = after[lane];
      d.whole[c + lane] = cut[lane] ? T(0) : whole < Limits<T>::SMALLEST ? Limits<T>::SMALLEST : whole;
    }
  }
  odd = odd || any_not_zero<T>(strange);
}

template <class S, class T = Compute<S>>
void load_decays(const Item<S>& item, int64_t t, int64_t n, Decays<T>& d, bool& odd) {
  if (item.k.decay == DecayKind::none) {
    for (int64_t i = 0; i < item.K; ++i) d.whole[i] = 1;
  } else if (item.by_channel()) {
    load_channel_decays(item, t, n, d, odd);
  } else {
    load_step_decays(item, t, n, d, odd);
  }
}

// rows [n][width] times the factors of steps, or of steps and channels
template <class S, class T = Compute<S>>
void scale_rows(const Item<S>& item, int64_t n, int64_t width, const T* factors, T* rows) {
  constexpr int L = LANES<T>;
  if (!item.decays()) return;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < width; c += L) {
      T* p = rows + i * width + c;
      store(p, item.by_channel() ? load(p) * load(factors + i * width + c) : load(p) * factors[i]);
    }
  }
}

// [rows][columns] times a factor for each column, in place
template <class T>
void scale_columns(int64_t rows, int64_t columns, const T* factors, T* values) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < rows; ++i, values += columns) {
    for (int64_t c = 0; c < columns; c += L) store(values + c, load(values + c) * load(factors + c));
  }
}

template <class T>
void copy(const T* from, int64_t count, T* to) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < count; i += L) store(to + i, load(from + i));
}

template <class T>
void clear(int64_t count, T* values) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < count; i += L) store(values + i, Vector<T>{});
}

template <class T>
bool all_finite(const T* values, int64_t count) {
  constexpr int L = LANES<T>;
  Vector<T> odd = {};
  for (int64_t i = 0; i < count; i += L) odd += load(values + i) * T(0);
  return !any_not_zero<T>(odd);
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
