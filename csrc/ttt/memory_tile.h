// One chunk of a memory in a thread's buffers, in the dual form: no weight of a token within the chunk exists.
//
// The gradient of token i is an outer product, delta_i x_i^T, in each layer (x = k for the first, h = silu(a) for the
// second). So the weights at token t, from W and S before the chunk, meet the rows X as a *tile*
//
//   b_t (X W^T) + g_t (X S^T) - sum over i <= t of c_ti (X x_i) delta_i
//
// with coefficients that follow from gates row by row; 0 where i > t:
//
//   m_t = momentum_t m_{t-1} + lr within the window     c_t = (1 - decay_t) c_{t-1} + m_t
//   p_t = momentum_t p_{t-1}     g_t = (1 - decay_t) g_{t-1} + p_t     b_t = (1 - decay_t) b_{t-1}
//
// Buffers are row-major; rows are filled up to whole vectors, with zeros. Weights lie transposed, [in][out]. A token with
// NaN or Inf must not reach those before it: 0 times it is NaN. Pairs i > t are cut, never multiplied by 0.
#pragma once

#include "../common/product.h"
#include "memory.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
constexpr T SMALLEST = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);

template <class T>
SEQOPS_INLINE int64_t whole(int64_t width) {
  return (width + LANES<T> - 1) / LANES<T> * LANES<T>;
}

template <class T>
SEQOPS_INLINE Vector<T> choose(Bits<T> mask, Vector<T> yes, Vector<T> no) {
  return (Vector<T>)((mask & (Bits<T>)yes) | (~mask & (Bits<T>)no));
}

// Lane numbers from `first` on.
template <class T>
SEQOPS_INLINE Bits<T> numbers(int64_t first) {
  Bits<T> lanes = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES<T>; ++lane) lanes[lane] = lane;
  return lanes + static_cast<decltype(lanes[0] + 0)>(first);
}

// Subnormal numbers cost hundreds of cycles and say nothing here.
template <class T>
SEQOPS_INLINE Vector<T> flushed(Vector<T> x) {
  return choose<T>((Bits<T>)(x > -SMALLEST<T>)&(Bits<T>)(x < SMALLEST<T>), Vector<T>{}, x);
}

// Memory handed out piece by piece; without a base it is only counted.
template <class T>
struct Arena {
  T* base;
  int64_t taken = 0;

  T* take(int64_t count) {
    T* const p = base == nullptr ? nullptr : base + taken;
    taken += (count + 15) / 16 * 16;
    return p;
  }
};

// rows [n][row], as wide as whole vectors: function(value) of every vector, in place
template <class T, class Function>
SEQOPS_INLINE void for_each(int64_t n, int64_t width, T* rows, int64_t row, Function function) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < width; j += LANES<T>) store(rows + i * row + j, function(load(rows + i * row + j)));
  }
}

template <class T>
void copy(int64_t count, const T* from, T* to) {
  for (int64_t i = 0; i < count; i += LANES<T>) store(to + i, load(from + i));
}

template <class T>
void clear(int64_t count, T* values) {
  for (int64_t i = 0; i < count; i += LANES<T>) store(values + i, Vector<T>{});
}

template <class T>
bool all_finite(int64_t n, int64_t width, const T* rows, int64_t row) {
  Vector<T> odd = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < width; j += LANES<T>) odd += load(rows + i * row + j) * T(0);
  }
  for (int lane = 0; lane < LANES<T>; ++lane) {
    if (!(odd[lane] == 0)) return false;
  }
  return true;
}

template <class T>
SEQOPS_INLINE Vector<T> silu(Vector<T> x) {
  return x * sigmoid<T>(x);
}

// The product of the rows of a triangle: of row t, whose number is first + t, only a's elements up to that number count.
// `odd`: b has NaN or Inf, which rows before it must not even meet.
template <class T>
void causal_product(int64_t first, int64_t rows, int64_t columns, Strided<T> a, const T* b, int64_t b_row, T* out,
                    int64_t out_row, Keep<T> keep, bool odd) {
  if (odd) {
    for (int64_t t = 0; t < rows; ++t) {
      const Keep<T> kept = {keep.factor == nullptr ? nullptr : keep.factor + t * keep.step, keep.step};
      product<T>(1, columns, first + t + 1, {a.p + t * a.row, a.row, a.depth}, b, b_row, out + t * out_row, out_row,
                 kept);
    }
    return;
  }
  if (first > 0) {
    product<T>(rows, columns, first, a, b, b_row, out, out_row, keep);
    keep = added<T>();
  }
  product<T>(rows, columns, rows, {a.p + first * a.depth, a.row, a.depth}, b + first * b_row, b_row, out, out_row, keep,
             Band::until_row);
}

// ---- an item: where it is, and the caller's tensors in and out of buffers

template <class S>
struct MemoryItem {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;

  const Memory& k;
  int64_t item, batch, head;

  MemoryItem(const Memory& k, int64_t item) : k(k), item(item), batch(item / k.H), head(item % k.H) {}

  int64_t length(int64_t chunk) const { return k.T - chunk * k.C < k.C ? k.T - chunk * k.C : k.C; }

  S* at(const HeadView& view, int64_t t) const {
    return static_cast<S*>(view.data) + batch * view.batch + t * view.step + head * view.head;
  }
  // Of [B, T, H] in T.
  int64_t gate_at(int64_t t) const { return (batch * k.T + t) * k.H + head; }

  // Tokens t .. t + n - 1 of [B, T, H, D]; zeros where the tensor is none.
  void load_rows(const HeadView& view, int64_t t, int64_t n, T* out, int64_t row) const {
    for (int64_t i = 0; i < n; ++i) {
      const S* in = view.data == nullptr ? nullptr : at(view, t + i);
      for (int64_t j = 0; j < k.D; j += L) {
        const Vector<T> x = in == nullptr ? Vector<T>{} : load(in + j, k.D - j < L ? k.D - j : L);
        store(out + i * row + j, x);
      }
    }
  }
  void store_rows(const HeadView& view, int64_t t, int64_t n, const T* in, int64_t row) const {
    for (int64_t i = 0; i < n; ++i) {
      S* out = at(view, t + i);
      for (int64_t j = 0; j < k.D; j += L) store(out + j, load(in + i * row + j), k.D - j < L ? k.D - j : L);
    }
  }
};

// ---- a layer: its weights and momentum, transposed

template <class T>
struct Layer {
  static constexpr int L = LANES<T>;

  int64_t in, out;
  int64_t in_row, out_row;  // of rows as wide in buffers
  T *w, *s;                 // [in][out_row], whole(in) rows

  Layer(Arena<T>& arena, int64_t in, int64_t out)
      : in(in),
        out(out),
        in_row(whole<T>(in)),
        out_row(whole<T>(out)),
        w(arena.take(in_row * out_row)),
        s(arena.take(in_row * out_row)) {}

  int64_t size() const { return in_row * out_row; }

  // From and to [out][in], dense; null: zeros. `square`: size() numbers of scratch.
  void load_matrix(const T* from, T* square, T* to) const {
    if (from == nullptr) return clear(size(), to);
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; j += L) {
        store(square + i * in_row + j, load(from + i * in + j, in - j < L ? in - j : L));
      }
    }
    transpose_rows(square, in_row, out, in_row, to, out_row);
  }
  void store_matrix(const T* from, T* square, T* to) const {
    transpose_rows(from, out_row, in, out_row, square, in_row);
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; j += L) {
        store(to + i * in + j, load(square + i * in_row + j), in - j < L ? in - j : L);
      }
    }
  }
};

// The layers of an item's memory.
template <class S>
struct Layers {
  using T = Compute<S>;

  const Memory& k;
  Layer<T> layer[2];  // the second one without a size where the memory is linear
  T* square;

  Layers(const Memory& k, Arena<T>& arena)
      : k(k),
        layer{{arena, k.D, k.linear() ? k.D : k.F}, {arena, k.F, k.linear() ? 0 : k.D}},
        square(arena.take(layer[0].size())) {}

  Layer<T>& operator[](int64_t i) { return layer[i]; }
  const Layer<T>& operator[](int64_t i) const { return layer[i]; }

  // Of item `item`, from tensors [B, H, ...]; null: zeros.
  void load_state(int64_t item, const void* const (&w)[2], const void* const (&s)[2]) {
    for (int64_t i = 0; i < k.layers(); ++i) {
      layer[i].load_matrix(part(w[i], item), square, layer[i].w);
      layer[i].load_matrix(part(s[i], item), square, layer[i].s);
    }
  }
  void store_state(int64_t item, void* const (&w)[2], void* const (&s)[2]) const {
    for (int64_t i = 0; i < k.layers(); ++i) {
      layer[i].store_matrix(layer[i].w, square, part(w[i], item));
      layer[i].store_matrix(layer[i].s, square, part(s[i], item));
    }
  }

  // Before segment `segment` of item `item`.
  void load_saved(int64_t item, int64_t segment) {
    const T* from = saved(item, segment);
    for (int64_t i = 0; i < k.layers(); ++i, from += k.layer_size()) layer[i].load_matrix(from, square, layer[i].w);
    for (int64_t i = 0; i < k.layers(); ++i, from += k.layer_size()) {
      layer[i].load_matrix(k.momentum == nullptr ? nullptr : from, square, layer[i].s);
    }
  }
  void save(int64_t item, int64_t segment) const {
    T* to = saved(item, segment);
    for (int64_t i = 0; i < k.layers(); ++i, to += k.layer_size()) layer[i].store_matrix(layer[i].w, square, to);
    for (int64_t i = 0; i < k.layers() && k.momentum != nullptr; ++i, to += k.layer_size()) {
      layer[i].store_matrix(layer[i].s, square, to);
    }
  }

 private:
  const T* part(const void* all, int64_t item) const {
    return all == nullptr ? nullptr : static_cast<const T*>(all) + item * k.layer_size();
  }
  T* part(void* all, int64_t item) const { return static_cast<T*>(all) + item * k.layer_size(); }
  T* saved(int64_t item, int64_t segment) const {
    return static_cast<T*>(k.states) + (item * k.segments() + segment) * k.state_size();
  }
};

// ---- coefficients

template <class T>
struct Coefficients {
  static constexpr int L = LANES<T>;

  int64_t window;
  bool decays, carries;  // there is decay, momentum
  T *lr, *kept, *held;   // [C]: kept = 1 - decay, held = momentum
  T *p, *g, *b;          // [C]

  Coefficients(const Memory& k, Arena<T>& arena)
      : window(k.window), decays(k.decay != nullptr), carries(k.momentum != nullptr) {
    const int64_t C = whole<T>(k.C);
    lr = arena.take(C), kept = arena.take(C), held = arena.take(C);
    p = arena.take(C), g = arena.take(C), b = arena.take(C);
  }

  // Of tokens t .. t + n - 1.
  template <class S>
  void load_gates(const MemoryItem<S>& item, int64_t t, int64_t n) {
    T last_p = 1, last_g = 0, last_b = 1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = item.gate_at(t + i);
      lr[i] = static_cast<const T*>(item.k.lr)[at];
      kept[i] = decays ? 1 - static_cast<const T*>(item.k.decay)[at] : T(1);
      held[i] = carries ? static_cast<const T*>(item.k.momentum)[at] : T(0);
      p[i] = last_p = small(held[i] * last_p);
      g[i] = last_g = small(kept[i] * last_g + last_p);
      b[i] = last_b = small(kept[i] * last_b);
    }
    for (int64_t i = n; i < whole<T>(n); ++i) lr[i] = 0;
  }

  // Rows m_t and c_t, `columns` (whole vectors) wide, from those of t - 1 (zeros before the first). May be in place.
  void next(int64_t t, int64_t columns, const T* m_before, const T* c_before, T* m, T* c) const {
    for (int64_t i = 0; i < columns; i += L) {
      const Bits<T> ago = static_cast<decltype(ago[0] + 0)>(t) - numbers<T>(i);  // the token's age
      const Bits<T> past = (Bits<T>)(ago >= 0);
      const Bits<T> within = (Bits<T>)(ago < static_cast<decltype(ago[0] + 0)>(window));
      const Vector<T> x = held[t] * load(m_before + i) + choose<T>(within, load(lr + i), Vector<T>{});
      const Vector<T> m_t = flushed<T>(choose<T>(past, x, Vector<T>{}));
      const Vector<T> c_t = kept[t] * load(c_before + i) + m_t;
      store(m + i, m_t);
      store(c + i, flushed<T>(choose<T>(past, c_t, Vector<T>{})));
    }
  }

 private:
  static T small(T x) { return x > -SMALLEST<T> && x < SMALLEST<T> ? T(0) : x; }
};

// ---- a chunk

// What of a chunk belongs to a layer: its inputs x and the gradients delta at its outputs.
template <class T>
struct Pairs {
  T* x;          // [C][in_row]
  T* x_columns;  // [in][column_row]
  T* delta;      // [C][out_row]

  Pairs(Arena<T>& arena, const Layer<T>& layer, int64_t C)
      : x(arena.take(C * layer.in_row)),
        x_columns(arena.take(layer.in_row * C)),
        delta(arena.take(C * layer.out_row)) {}
};

template <class S>
struct Chunk {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;

  const Memory& k;
  const Layers<S>& layers;
  int64_t column_row;  // C filled up: of rows with a number for each token
  Coefficients<T> coefficients;
  Pairs<T> pairs[2];
  T* a;              // [C][F']: W1 k of an MLP
  T* below;          // [C][F']: delta of the second layer times W2; where it is not kept, the first layer's delta
  T* delta_columns;  // [D][column_row]
  T* below_columns;  // [F][column_row]
  T* scaled;         // [ROWS][D' or F'], and as delta at the end
  T* scores;         // [ROWS][column_row]
  int64_t start = 0, n = 0;
  bool odd = false;  // NaN or Inf among x and delta

  Chunk(const Memory& k, const Layers<S>& layers, Arena<T>& arena, bool keep_below)
      : k(k),
        layers(layers),
        column_row(whole<T>(k.C)),
        coefficients(k, arena),
        pairs{{arena, layers[0], column_row}, {arena, layers[1], column_row}} {
    const int64_t F = layers[1].in_row, D = whole<T>(k.D), rows = column_row > Memory::ROWS ? column_row : Memory::ROWS;
    a = arena.take(column_row * F);
    below = keep_below ? arena.take(column_row * F) : pairs[0].delta;
    delta_columns = arena.take(k.linear() ? 0 : D * column_row), below_columns = arena.take(F * column_row);
    scaled = arena.take(rows * (F > D ? F : D));
    scores = arena.take(Memory::ROWS * column_row);
  }

  // Chunk `number`: its keys, values and gates; then the gradients at the layers' present weights.
  void load_chunk(const MemoryItem<S>& item, int64_t number) {
    start = number * k.C, n = item.length(number);
    const Layer<T>& outer = layers[k.layers() - 1];
    item.load_rows(item.k.k, start, n, pairs[0].x, layers[0].in_row);
    item.load_rows(item.k.v, start, n, pairs[k.layers() - 1].delta, outer.out_row);
    transpose_rows(pairs[0].x, layers[0].in_row, n, layers[0].in_row, pairs[0].x_columns, column_row);
    coefficients.load_gates(item, start, n);
    if (k.linear()) {
      learn_linear();
    } else {
      learn_mlp();
    }
    odd = false;
    for (int64_t i = 0; i < k.layers(); ++i) {
      odd = odd || !all_finite(n, layers[i].in_row, pairs[i].x, layers[i].in_row) ||
            !all_finite(n, layers[i].out_row, pairs[i].delta, layers[i].out_row);
    }
  }

  // out [rows][out_row] = the tile of tokens first .. first + rows - 1 (at most ROWS) for their rows x [rows][in_row];
  // `add`: is added to out. c [rows][column_row]: their coefficients.
  void tile(int64_t i, int64_t first, int64_t rows, const T* x, const T* c, T* out, bool add) {
    const Layer<T>& layer = layers[i];
    const int64_t in = layer.in_row, width = layer.out_row;
    const T* own = x;
    if (coefficients.decays) {
      scale_rows(rows, in, coefficients.b + first, x, scaled);
      own = scaled;
    }
    product<T>(rows, width, layer.in, {own, in, 1}, layer.w, width, out, width, add ? added<T>() : Keep<T>::nothing());
    if (coefficients.carries) {
      scale_rows(rows, in, coefficients.g + first, x, scaled);
      product<T>(rows, width, layer.in, {scaled, in, 1}, layer.s, width, out, width, added<T>());
    }
    score(i, first, rows, x, scores);
    for (int64_t t = 0; t < rows; ++t) {
      T* const row = scores + t * column_row;
      for (int64_t j = 0; j <= first + t; j += L) {
        const Bits<T> past = (Bits<T>)(numbers<T>(j) <= static_cast<decltype(past[0] + 0)>(first + t));
        store(row + j, choose<T>(past, -(load(row + j) * load(c + t * column_row + j)), Vector<T>{}));
      }
      for (int64_t j = whole<T>(first + t + 1); j < whole<T>(first + rows); j += L) store(row + j, Vector<T>{});
    }
    causal_product<T>(first, rows, width, {scores, column_row, 1}, pairs[i].delta, width, out, width, added<T>(), odd);
  }

  // out [rows][column_row] = X x^T, of pairs i <= t (what stands elsewhere is no number to read).
  void score(int64_t i, int64_t first, int64_t rows, const T* x, T* out) const {
    const int64_t in = layers[i].in, in_row = layers[i].in_row;
    if (first > 0) {
      product<T>(rows, first, in, {x, in_row, 1}, pairs[i].x_columns, column_row, out, column_row, Keep<T>::nothing());
    }
    product<T>(rows, whole<T>(rows), in, {x, in_row, 1}, pairs[i].x_columns + first, column_row, out + first,
               column_row, Keep<T>::nothing(), Band::columns_until_row);
  }

  // The layers' weights and momentum after the chunk, from the last rows of m and c.
  void update(Layers<S>& now, const T* m, const T* c, bool momentum_wanted) {
    const int64_t end = n - 1;
    for (int64_t i = 0; i < k.layers(); ++i) {
      Layer<T>& layer = now[i];
      const int64_t width = layer.out_row;
      if (coefficients.carries) {  // w <- w b + s g, by its terms
        const T g = coefficients.g[end], b = coefficients.b[end];
        for (int64_t j = 0; j < layer.size(); j += L) {
          const Vector<T> kept = b == 0 ? Vector<T>{} : load(layer.w + j) * b;
          store(layer.w + j, g == 0 ? kept : kept + load(layer.s + j) * g);
        }
      }
      negate_scaled(i, c);
      const Keep<T> of_w = {coefficients.carries ? &KEEP_ALL<T> : coefficients.b + end, 0};
      product<T>(layer.in, width, n, {pairs[i].x, 1, layer.in_row}, scaled, width, layer.w, width, of_w);
      if (!coefficients.carries && !momentum_wanted) continue;
      negate_scaled(i, m);
      const Keep<T> of_s = {coefficients.p + end, 0};
      product<T>(layer.in, width, n, {pairs[i].x, 1, layer.in_row}, scaled, width, layer.s, width, of_s);
    }
  }

 private:
  static void scale_rows(int64_t rows, int64_t width, const T* factors, const T* x, T* out) {
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t j = 0; j < width; j += L) store(out + t * width + j, load(x + t * width + j) * factors[t]);
    }
  }

  // scaled = -(factors * delta)
  void negate_scaled(int64_t i, const T* factors) {
    const int64_t width = layers[i].out_row;
    for (int64_t t = 0; t < n; ++t) {
      const T factor = -factors[t];
      for (int64_t j = 0; j < width; j += L) {
        store(scaled + t * width + j, load(pairs[i].delta + t * width + j) * factor);
      }
    }
  }

  void learn_linear() {
    const Layer<T>& layer = layers[0];
    T* const delta = pairs[0].delta;
    for_each(n, layer.out_row, delta, layer.out_row, [](Vector<T> v) { return -v; });
    if (!k.l2) return;
    product<T>(n, layer.out_row, layer.in, {pairs[0].x, layer.in_row, 1}, layer.w, layer.out_row, delta, layer.out_row,
               added<T>());
  }

  void learn_mlp() {
    const Layer<T>&first = layers[0], &second = layers[1];
    const int64_t D = second.out_row, F = first.out_row;
    product<T>(n, F, first.in, {pairs[0].x, D, 1}, first.w, F, a, F, Keep<T>::nothing());
    T *const h = pairs[1].x, *const delta = pairs[1].delta, *const slope = scaled;
    for (int64_t j = 0; j < n * F; j += L) {
      const Vector<T> x = load(a + j), gate = sigmoid<T>(x), value = x * gate;
      store(h + j, value);
      store(slope + j, gate + value * (T(1) - gate));
    }
    transpose_rows(h, F, n, F, pairs[1].x_columns, column_row);
    for (int64_t j = 0; j < n * D; j += L) {
      const Vector<T> v = load(delta + j);
      store(delta + j, k.l2 ? load(pairs[0].x + j) - v : -v);
    }
    if (k.l2) product<T>(n, D, second.in, {h, F, 1}, second.w, D, delta, D, added<T>());
    if (2 * n < L) {
      send_below_by_rows(second, delta);
    } else {
      send_below(second, delta);
    }
    for (int64_t j = 0; j < n * F; j += L) store(pairs[0].delta + j, load(below + j) * load(slope + j));
  }

  // below = delta W2, which is here by its transpose: with tokens in the lanes,
  void send_below(const Layer<T>& second, const T* delta) {
    const int64_t D = second.out_row;
    transpose_rows(delta, D, n, D, delta_columns, column_row);
    product<T>(second.in, whole<T>(n), second.out, {second.w, D, 1}, delta_columns, column_row, below_columns,
               column_row, Keep<T>::nothing());
    transpose_rows(below_columns, column_row, second.in, whole<T>(n), below, second.in_row);
  }

  // or, where there are few, as sums along rows.
  void send_below_by_rows(const Layer<T>& second, const T* delta) {
    const int64_t D = second.out_row, F = second.in_row;
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t f = 0; f < F; f += L) {
        Vector<T> sums[L] = {};
        for (int64_t d = 0; d < D; d += L) {
          const Vector<T> y = load(delta + t * D + d);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) sums[i] += y * load(second.w + (f + i) * D + d);
        }
        transpose<T>(sums);
#pragma GCC unroll 16
        for (int i = 1; i < L; ++i) sums[0] += sums[i];
        store(below + t * F + f, sums[0]);
      }
    }
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
