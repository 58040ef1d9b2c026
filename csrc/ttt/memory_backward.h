// The backward of a memory: chunks from the last to the first, each in the dual form, carrying dW and dS.
//
// With x_i the inputs of a layer, delta_i its gradients (u_i = delta_i x_i^T), c, m, p, g, b the chunk's coefficients, a
// layer gives   y_t = b_t W x_t + g_t S x_t - sum_{i <= t} c_ti (x_t . x_i) delta_i   and at the chunk's end
// W' = b_n W + g_n S - sum_i c_ni delta_i x_i^T   S' = p_n S - sum_i m_ni delta_i x_i^T.
//
//   1. forwards over a segment, from its saved state: the state before every chunk, and of its tokens h, delta1, delta2
//      and what the gradients of the inner step need: slope = silu'(a), bend = (W2^T delta2) silu''(a)
//   2. of a chunk: the end, then its tokens ROWS at a time from the last ones on (second layer, first layer, gates: a
//      row's gradients reach delta_i, x_i of all tokens i before), then the inner step
//
// Tokens are columns: arrays are [channels][tokens], so that a weight matrix enters every product a number at a time, as
// it is or transposed. Where tokens are summed over, one factor is [tokens][channels].
//
// Past a row's own token every pair has the weight 0. NaN times 0 would be NaN: where a number of the chunk is not finite,
// such pairs are left out one by one.
#pragma once

#include "memory_columns.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class S>
class MemoryBackward {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;
  static constexpr int64_t ROWS = Memory::ROWS;
  static constexpr int64_t KEPT = 128;  // tokens of the longest chunks of which h, delta .. are kept, not made again

 public:
  static int64_t buffers_size(const Memory& k) { return MemoryBackward(k, 0, nullptr).arena.taken * sizeof(T); }

  static void run(const Memory& k, int64_t number, void* buffers) { MemoryBackward(k, number, buffers).march(); }

 private:
  // ---- buffers

  const Memory& k;
  const MemoryItem<S> item;
  Arena<T> arena;
  Coefficients<T> gates;
  const int64_t inside;                      // rows of W1
  const int64_t D_row, I_row, C_row, R_row;  // D, `inside`, C and ROWS (at most C) in whole vectors
  int64_t entry_size, inner_size;
  T *entries, *inners;  // of a segment's chunks: the states before them, what their tokens teach
  T* carry;             // dW1 | dW2 | dS1 | dS2 after the chunk, then before it

  // of a chunk
  int64_t start, n, columns;                          // its first token, its tokens, in whole vectors
  T *k_rows, *h_rows;                                 // [C][D_row], [C][I_row]
  T *k_columns, *delta2, *delta1, *h, *slope, *bend;  // [D or F][C_row]
  T *ddelta[2], *dx[2], *scaled, *through;            // [D or F][C_row]
  T* scratch_rows;                                    // [C][D_row or I_row]
  T *last_c, *last_m, *dlast_c, *dlast_m, *cb, *mb;   // [C_row]
  T *dlr, *ddecay, *dmomentum;                        // [C_row]
  T dlast_p, dlast_g, dlast_b, gb, pb, bb;
  T* marks;       // the rows of m and c before every ROWS tokens
  Vector<T> odd;  // not 0 where a number of the chunk is infinite or NaN

  // of ROWS of its tokens
  T *c, *m;                                           // [1 + ROWS][C_row]: the row before, then theirs
  T *dc, *weights[2], *pairs, *grad_pairs;            // [ROWS][C_row]
  T* turned;                                          // [C][R_row]
  T *dg, *db;                                         // [R_row]
  T *q_rows, *H_rows, *scaled_rows;                   // [ROWS][D_row or I_row]
  T *q, *grad, *dq, *H, *H_slope, *dH, *by_w, *by_s;  // [D or F][R_row]

  struct LayerOfChunk {
    int64_t out, in, row;  // W [out][row]
    const T *w, *s;        // before the chunk; s null: none is carried
    T *dw, *ds;
    T *delta, *x, *ddelta, *dx;  // [out or in][C_row]
  } layers[2];

  struct Part {  // of a chunk: `rows` of its tokens from `first` on
    int64_t first, rows;

    int64_t end() const { return first + rows; }
    int64_t width() const { return whole<T>(rows); }
    int64_t reach() const { return whole<T>(end()); }
  };

  MemoryBackward(const Memory& k, int64_t number, void* buffers)
      : k(k),
        item(k, number),
        arena{static_cast<T*>(buffers)},
        gates(k, arena),
        inside(k.linear() ? k.D : k.F),
        D_row(whole<T>(k.D)),
        I_row(whole<T>(inside)),
        C_row(whole<T>(k.C)),
        R_row(whole<T>(ROWS < k.C ? ROWS : k.C)) {
    const int64_t most = I_row > D_row ? I_row : D_row, segment = k.segment < k.chunks() ? k.segment : k.chunks();
    entry_size = matrix_size() * matrices();
    inner_size = take_inner(nullptr);
    entries = arena.take(entry_size * segment);
    inners = arena.take(inner_size * (keeps_inner() ? segment : 1));
    carry = arena.take(matrix_size() * k.layers() * 2);
    take(C_row * most, {&scratch_rows, &scaled, &through, &ddelta[0], &dx[0], &ddelta[1], &dx[1]});
    take(C_row, {&last_c, &last_m, &dlast_c, &dlast_m, &cb, &mb, &dlr, &ddecay, &dmomentum});
    marks = arena.take((k.C + ROWS - 1) / ROWS * 2 * C_row);
    take((R_row + 1) * C_row, {&c, &m});
    take(R_row * C_row, {&dc, &weights[0], &weights[1], &pairs, &grad_pairs, &turned});
    take(R_row, {&dg, &db});
    take(R_row * D_row, {&q, &q_rows, &grad, &dq});
    take(k.linear() ? 0 : R_row * I_row, {&H, &H_rows, &H_slope, &dH});
    take(R_row * most, {&scaled_rows, &by_w, &by_s});
  }

  template <int COUNT>
  void take(int64_t size, T** const (&arrays)[COUNT]) {
    for (T** array : arrays) *array = arena.take(size);
  }

  bool carries() const { return k.momentum != nullptr; }
  bool keeps_inner() const { return k.C <= KEPT; }
  int64_t matrix_size() const { return D_row * I_row; }
  int64_t matrices() const { return k.layers() * (carries() ? 2 : 1); }
  Columns of_chunk(int64_t rows) const { return {rows, columns, C_row}; }
  Columns of_part(int64_t rows, const Part& part) const { return {rows, part.width(), R_row}; }
  Part part_of(int64_t first) const { return {first, n - first < ROWS ? n - first : ROWS}; }

  void march() {
    each_matrix(2 * k.layers(), [&](int64_t i, int64_t rows, int64_t width, int64_t row) {
      const void* from = i < k.layers() ? k.grad_w[i] : k.grad_s[i - k.layers()];
      load_matrix(matrix_of(static_cast<const T*>(from)), rows, width, row, carry + i * matrix_size());
    });
    for (int64_t segment = k.segments() - 1; segment >= 0; --segment) {
      const int64_t first = segment * k.segment;
      const int64_t end = first + k.segment < k.chunks() ? first + k.segment : k.chunks();
      load_entry(segment);
      for (int64_t chunk = first; chunk < end; ++chunk) {
        enter(chunk, chunk - first);
        if (keeps_inner() || chunk + 1 < end) find_inner();
        if (chunk + 1 < end) advance();
      }
      for (int64_t chunk = end - 1; chunk >= first; --chunk) {
        enter(chunk, chunk - first);
        if (!keeps_inner()) find_inner();
        chunk_gradients();
      }
    }
    if (!carries()) clear(k.layers() * matrix_size(), carry + k.layers() * matrix_size());
    each_matrix(2 * k.layers(), [&](int64_t i, int64_t rows, int64_t width, int64_t row) {
      void* to = i < k.layers() ? k.dw[i] : k.ds[i - k.layers()];
      if (to != nullptr) store_matrix(carry + i * matrix_size(), rows, width, row, matrix_of(static_cast<T*>(to)));
    });
  }

  // ---- loads and stores

  template <class E>
  E* matrix_of(E* all) const {  // of [B, H, ...]
    return all == nullptr ? nullptr : all + item.item * k.layer_size();
  }

  // function(i, rows, width, row in buffers) of matrices in the order W1, W2, S1, S2
  template <class Function>
  void each_matrix(int64_t count, Function function) const {
    for (int64_t i = 0; i < count; ++i) {
      const bool first = i % k.layers() == 0;
      function(i, first ? inside : k.D, first ? k.D : k.F, first ? D_row : I_row);
    }
  }

  void load_entry(int64_t segment) {
    const T* from = static_cast<const T*>(k.states) + (item.item * k.segments() + segment) * k.state_size();
    each_matrix(matrices(), [&](int64_t i, int64_t rows, int64_t width, int64_t row) {
      load_matrix(from + i * k.layer_size(), rows, width, row, entries + i * matrix_size());
    });
  }

  // Tokens of a tensor, in rows and then in columns.
  void load_tokens(const HeadView& view, const Part& part, T* rows, T* out, int64_t out_row) const {
    item.load_rows(view, start + part.first, part.rows, rows, D_row);
    transpose_rows(rows, D_row, part.rows, D_row, out, out_row);
  }
  void store_tokens(const T* in, int64_t in_row, const Part& part, const HeadView& view) const {
    transpose_rows(in, in_row, k.D, part.width(), scratch_rows, D_row);
    item.store_rows(view, start + part.first, part.rows, scratch_rows, D_row);
  }

  // What a chunk's tokens teach, from `base` on; returns how many numbers that is.
  int64_t take_inner(T* base) {
    Arena<T> inner = {base};
    const int64_t by_channel = C_row * D_row, hidden = C_row * I_row;
    k_rows = inner.take(by_channel), k_columns = inner.take(by_channel), delta2 = inner.take(by_channel);
    delta1 = delta2;  // of a linear memory
    if (!k.linear()) {
      delta1 = inner.take(hidden), h = inner.take(hidden), h_rows = inner.take(hidden);
      slope = inner.take(hidden), bend = inner.take(hidden);
    }
    return inner.taken;
  }

  void enter(int64_t chunk, int64_t of_segment) {
    start = chunk * k.C, n = item.length(chunk), columns = whole<T>(n);
    take_inner(inners + (keeps_inner() ? of_segment * inner_size : 0));
    for (int64_t i = 0; i < k.layers(); ++i) {
      const T *const w = entries + of_segment * entry_size + i * matrix_size(), *s = w + k.layers() * matrix_size();
      LayerOfChunk& layer = layers[i];
      layer.out = i == 0 ? inside : k.D, layer.in = i == 0 ? k.D : k.F, layer.row = i == 0 ? D_row : I_row;
      layer.w = w, layer.s = carries() ? s : nullptr;
      layer.dw = carry + i * matrix_size(), layer.ds = layer.dw + k.layers() * matrix_size();
      layer.delta = i == 0 ? delta1 : delta2, layer.x = i == 0 ? k_columns : h;
      layer.ddelta = ddelta[i], layer.dx = dx[i];
    }
    load_gates();
  }

  void load_gates() {
    odd = Vector<T>{};
    gates.load_gates(item, start, n);
    for (int64_t i = n; i < columns; ++i) gates.p[i] = gates.g[i] = gates.b[i] = 0;
    clear(columns, c), clear(columns, m);
    for (int64_t first = 0; first < n; first += ROWS) {
      if (first > 0) copy(columns, c + ROWS * C_row, c), copy(columns, m + ROWS * C_row, m);
      T* mark = marks + first / ROWS * 2 * C_row;
      copy(columns, m, mark), copy(columns, c, mark + C_row);
      coefficients(part_of(first));
    }
    const int64_t last = (n - 1) % ROWS + 1;
    copy(columns, c + last * C_row, last_c), copy(columns, m + last * C_row, last_m);
  }

  // The rows of c and m after the first one.
  void coefficients(const Part& part) {
    for (int64_t r = 0; r < part.rows; ++r) {
      T *const m_before = m + r * C_row, *const c_before = c + r * C_row;
      gates.next(part.first + r, columns, m_before, c_before, m_before + C_row, c_before + C_row);
    }
  }

  // ---- what a chunk's tokens teach, and the state after them

  void find_inner() {
    const LayerOfChunk& first = layers[0];
    T* learnt = through;  // f(k), but for an MLP's own k
    load_tokens(k.k, {0, n}, k_rows, k_columns, C_row);
    load_tokens(k.v, {0, n}, scratch_rows, delta2, C_row);
    if (k.linear()) {
      if (k.l2) multiply(k.D, k.D, {first.w, D_row, 1}, k_columns, learnt);
    } else {
      multiply(k.F, k.D, {first.w, D_row, 1}, k_columns, slope);
      of_chunk(k.F).each(h, [&](int64_t j, int64_t) {
        const Vector<T> a = load(slope + j), gate = sigmoid<T>(a), rest = T(1) - gate;
        store(slope + j, gate * (T(1) + a * rest));
        store(bend + j, gate * rest * (T(2) + a * (rest - gate)));
        return a * gate;
      });
      transpose_rows(h, C_row, k.F, columns, h_rows, I_row);
      if (k.l2) multiply(k.D, k.F, {layers[1].w, I_row, 1}, h, learnt);
    }
    of_chunk(k.D).each(delta2, [&](int64_t j, int64_t) {
      const Vector<T> v = load(delta2 + j);
      if (!k.l2) return -v;
      return k.linear() ? load(learnt + j) - v : load(k_columns + j) - v + load(learnt + j);
    });
    if (k.linear()) return;
    multiply(k.F, k.D, {layers[1].w, 1, I_row}, delta2, delta1);
    of_chunk(k.F).each(delta1, [&](int64_t j, int64_t) {
      const Vector<T> below = load(delta1 + j);
      store(bend + j, below * load(bend + j));
      return below * load(slope + j);
    });
  }

  // out = a times x [depth][out.row]; `added`: is added to out. Of few tokens a vector of columns would be mostly empty:
  // a transposed matrix then meets them as rows, its own rows are the vectors.
  void multiply(const Columns& out, int64_t tokens, int64_t depth, Strided<T> a, const T* x, T* to, bool add) const {
    const Keep<T> keep = add ? added<T>() : Keep<T>::nothing();
    if (tokens > L / 2 || a.row != 1) return product<T>(out.rows, out.width, depth, a, x, out.row, to, out.row, keep);
    const int64_t width = whole<T>(out.rows);
    product<T>(tokens, width, depth, {x, 1, out.row}, a.p, a.depth, scratch_rows, width, Keep<T>::nothing());
    transpose_rows(scratch_rows, width, tokens, width, add ? scaled : to, out.row);
    if (add) out.each(to, [&](int64_t j, int64_t) { return load(to + j) + load(scaled + j); });
  }
  void multiply(int64_t rows, int64_t depth, Strided<T> a, const T* x, T* to, bool add = false) const {
    multiply(of_chunk(rows), n, depth, a, x, to, add);
  }

  // The state after the chunk, into the next entry. A factor of 0 cuts.
  void advance() {
    const T kept = gates.b[n - 1], gained = gates.g[n - 1], held = gates.p[n - 1];
    for (int64_t i = 0; i < k.layers(); ++i) {
      const LayerOfChunk& layer = layers[i];
      const T* rows = i == 0 ? k_rows : h_rows;
      T *const w = const_cast<T*>(layer.w) + entry_size, *const s = w + k.layers() * matrix_size();
      for (int64_t j = 0; j < layer.out * layer.row; j += L) {
        Vector<T> value = kept == 0 ? Vector<T>{} : load(layer.w + j) * kept;
        if (layer.s != nullptr) {
          const Vector<T> sum = load(layer.s + j);
          if (gained != 0) value += sum * gained;
          store(s + j, held == 0 ? Vector<T>{} : sum * held);
        }
        store(w + j, value);
      }
      learn(layer, last_c, rows, w);
      if (layer.s != nullptr) learn(layer, last_m, rows, s);
    }
  }

  // w [out][row] -= (factors delta) x^T
  void learn(const LayerOfChunk& layer, const T* factors, const T* x_rows, T* w) {
    of_chunk(layer.out).each(scaled, [&](int64_t j, int64_t i) { return load(layer.delta + j) * -load(factors + i); });
    product<T>(layer.out, layer.row, n, {scaled, C_row, 1}, x_rows, layer.row, w, layer.row, added<T>());
  }

  // ---- gradients of a chunk

  void chunk_gradients() {
    clear(columns, dlr), clear(columns, cb), clear(columns, mb);
    gb = pb = bb = 0;
    for (int64_t i = 0; i < k.layers(); ++i) {
      of_chunk(layers[i].in).look_for_odd(layers[i].x, odd);
      of_chunk(layers[i].out).look_for_odd(layers[i].delta, odd);
    }
    end_gradients();
    for (int64_t first = (n - 1) / ROWS * ROWS; first >= 0; first -= ROWS) part_gradients(part_of(first));
    inner_gradients();
    store_gate_gradients();
  }

  // Of the state after the chunk: begins ddelta, dx, what reaches the gates by the last rows, and dW, dS before it.
  void end_gradients() {
    dlast_p = dlast_g = dlast_b = 0;
    clear(columns, dlast_c), clear(columns, dlast_m);
    const bool by_momentum = carries() || start + n == k.T;  // without it S after a chunk is of that chunk alone
    for (int64_t l = 0; l < k.layers(); ++l) {
      const LayerOfChunk& layer = layers[l];
      end_gradients(layer, layer.dw, last_c, dlast_c, Keep<T>::nothing());
      if (by_momentum) end_gradients(layer, layer.ds, last_m, dlast_m, added<T>());
      if (carries() || k.decay != nullptr) carry_back(layer);
    }
  }

  // Of W' or S', from which the chunk took (factors delta) x^T.
  void end_gradients(const LayerOfChunk& layer, const T* dw, const T* factors, T* dfactors, Keep<T> keep) {
    const auto take_from = [&](int64_t rows, T* to) {
      of_chunk(rows).each(to, [&](int64_t j, int64_t i) {
        const Vector<T> value = load(through + j) * -load(factors + i);
        return keep.factor == nullptr ? value : load(to + j) + value;
      });
    };
    multiply(layer.out, layer.in, {dw, layer.row, 1}, layer.x, through);
    of_chunk(layer.out).dots(layer.delta, through, scaled);
    for (int64_t i = 0; i < columns; i += L) store(dfactors + i, load(dfactors + i) - load(scaled + i));
    take_from(layer.out, layer.ddelta);
    multiply(layer.in, layer.out, {dw, 1, layer.row}, layer.delta, through);
    take_from(layer.in, layer.dx);
  }

  // dW, dS from those after the chunk to those before it, but for the chunk's own tokens.
  void carry_back(const LayerOfChunk& layer) {
    const T kept = gates.b[n - 1], gained = gates.g[n - 1], held = gates.p[n - 1];
    Vector<T> ww = {}, ws = {}, ss = {};
    for (int64_t o = 0; o < layer.out; ++o) {
      for (int64_t i = 0; i < layer.row; i += L) {
        const int64_t j = o * layer.row + i;
        const bool edge = layer.in - i < L;  // beyond are numbers that stand for nothing
        const auto cut = [&](Vector<T> x) { return edge ? between<T>(0, layer.in - i - 1, x) : x; };
        const Vector<T> dw = load(layer.dw + j);
        ww += cut(dw * load(layer.w + j));
        store(layer.dw + j, dw * kept);
        if (layer.s == nullptr) continue;
        const Vector<T> s = load(layer.s + j), ds = load(layer.ds + j);
        ws += cut(dw * s), ss += cut(ds * s);
        store(layer.ds + j, dw * gained + ds * held);
      }
    }
    dlast_b += total<T>(ww), dlast_g += total<T>(ws), dlast_p += total<T>(ss);
  }

  // ---- gradients of a part

  void part_gradients(const Part& part) {
    begin_part(part);
    load_tokens(k.grad_o, part, q_rows, grad, R_row);
    load_tokens(k.q, part, q_rows, q, R_row);
    of_part(k.D, part).look_for_odd(q, odd), of_part(k.D, part).look_for_odd(grad, odd);
    weigh_pairs(0, part, q);
    if (k.linear()) {
      layer_gradients(0, part, grad, q, q_rows, dq);
    } else {
      hidden(part);
      weigh_pairs(1, part, H);
      layer_gradients(1, part, grad, H, H_rows, dH);
      of_part(k.F, part).each(dH, [&](int64_t j, int64_t) { return load(dH + j) * load(H_slope + j); });
      of_part(k.F, part).look_for_odd(dH, odd);
      pair_products(part, k.D, q, k_columns, pairs);
      layer_gradients(0, part, dH, q, q_rows, dq);
      of_part(k.D, part).each(dq, [&](int64_t j, int64_t) { return load(dq + j) + load(grad + j); });
    }
    store_tokens(dq, R_row, part, k.dq);
    gate_gradients(part);
  }

  void begin_part(const Part& part) {
    const T* mark = marks + part.first / ROWS * 2 * C_row;
    copy(columns, mark, m), copy(columns, mark + C_row, c);
    coefficients(part);
    clear(part.rows * C_row, dc), clear(part.width(), dg), clear(part.width(), db);
    if (part.end() < n) return;
    copy(columns, dlast_c, dc + (part.rows - 1) * C_row);
    dg[part.rows - 1] = dlast_g, db[part.rows - 1] = dlast_b;
  }

  // out [rows][C_row] = x^T y, for the tokens of y up to each row's own
  void pair_products(const Part& part, int64_t depth, const T* x, const T* y, T* out) const {
    const Strided<T> rows = {x, 1, R_row};
    if (part.first > 0) product<T>(part.rows, part.first, depth, rows, y, C_row, out, C_row, Keep<T>::nothing());
    product<T>(part.rows, part.width(), depth, rows, y + part.first, C_row, out + part.first, C_row, Keep<T>::nothing(),
               Band::columns_until_row);
  }

  // function(element number, column) for each row's tokens; its result, cut after the row's own, into out [rows][C_row]
  template <class Function>
  void each_pair(const Part& part, T* out, Function function) const {
    for (int64_t r = 0; r < part.rows; ++r) {
      for (int64_t i = 0; i < part.reach(); i += L) {
        const int64_t j = r * C_row + i, own = part.first + r - i;  // own: its lane
        store(out + j, own < 0 ? Vector<T>{} : between<T>(0, own, function(j)));
      }
    }
  }

  // pairs = x_t . x_i and weights[l] = -c pairs
  void weigh_pairs(int64_t l, const Part& part, const T* x) {
    pair_products(part, layers[l].in, x, layers[l].x, pairs);
    each_pair(part, weights[l], [&](int64_t j) { return load(pairs + j) * -load(c + C_row + j); });
  }

  Triangle<T> triangle(const Part& part) const { return {part.first, not_zero<T>(odd)}; }

  // H = silu(A), A = b W1 q + g S1 q - sum c (q . k_i) delta1_i
  void hidden(const Part& part) {
    const LayerOfChunk& layer = layers[0];
    const int64_t width = part.width();
    multiply(of_part(k.F, part), part.rows, k.D, {layer.w, D_row, 1}, q, H, false);
    if (layer.s != nullptr) multiply(of_part(k.F, part), part.rows, k.D, {layer.s, D_row, 1}, q, by_s, false);
    of_part(k.F, part).each(H, [&](int64_t j, int64_t i) {
      const Vector<T> value = load(H + j) * load(gates.b + part.first + i);
      return layer.s == nullptr ? value : value + load(by_s + j) * load(gates.g + part.first + i);
    });
    transpose_rows(weights[0], C_row, part.rows, part.reach(), turned, R_row);
    triangle(part).until(k.F, width, part.end(), {layer.delta, C_row, 1}, turned, H, R_row);
    of_part(k.F, part).each(H, [&](int64_t j, int64_t) {
      const Vector<T> a = load(H + j), gate = sigmoid<T>(a);
      store(H_slope + j, gate * (T(1) + a * (T(1) - gate)));
      return a * gate;
    });
    of_part(k.F, part).look_for_odd(H, odd);
    transpose_rows(H, R_row, k.F, width, H_rows, I_row);
  }

  // From the gradient of a layer's results, dy [out][R_row], to that of its inputs x, dx [in][R_row], and of all that the
  // results were made of. `pairs` has x_t . x_i.
  void layer_gradients(int64_t l, const Part& part, const T* dy, const T* x, const T* x_rows, T* dx) {
    const LayerOfChunk& layer = layers[l];
    state_gradients(layer, part, dy, x, dx);
    pair_products(part, layer.out, dy, layer.delta, grad_pairs);
    each_pair(part, dc, [&](int64_t j) { return load(dc + j) - load(grad_pairs + j) * load(pairs + j); });
    each_pair(part, grad_pairs, [&](int64_t j) { return load(grad_pairs + j) * -load(c + C_row + j); });
    transpose_rows(grad_pairs, C_row, part.rows, part.reach(), turned, R_row);
    const Triangle<T> sums = triangle(part);
    sums.until(layer.in, part.width(), part.end(), {layer.x, C_row, 1}, turned, dx, R_row);
    sums.from(layer.in, part.reach(), part.rows, {x, R_row, 1}, grad_pairs, layer.dx, C_row);
    sums.from(layer.out, part.reach(), part.rows, {dy, R_row, 1}, weights[l], layer.ddelta, C_row);
    add_outer(layer, part, dy, x_rows, gates.b, layer.dw);
    if (layer.s != nullptr) add_outer(layer, part, dy, x_rows, gates.g, layer.ds);
  }

  // What reaches x through b W x and g S x, and their factors.
  void state_gradients(const LayerOfChunk& layer, const Part& part, const T* dy, const T* x, T* dx) {
    const auto back = [&](const T* w, const T* factors, T* by, T* dfactors) {
      const Columns inputs = of_part(layer.in, part);
      multiply(inputs, part.rows, layer.out, {w, 1, layer.row}, dy, by, false);
      inputs.dots(x, by, scaled_rows);
      for (int64_t i = 0; i < part.width(); i += L) store(dfactors + i, load(dfactors + i) + load(scaled_rows + i));
      inputs.each(dx, [&](int64_t j, int64_t i) {
        const Vector<T> value = load(by + j) * load(factors + part.first + i);
        return w == layer.w ? value : load(dx + j) + value;
      });
    };
    back(layer.w, gates.b, by_w, db);
    if (layer.s != nullptr) back(layer.s, gates.g, by_s, dg);
  }

  // dw [out][row] += sum over t of factor_t dy_t x_t^T
  void add_outer(const LayerOfChunk& layer, const Part& part, const T* dy, const T* x_rows, const T* factors, T* dw) {
    for (int64_t r = 0; r < part.rows; ++r) {
      const T factor = factors[part.first + r];
      for (int64_t j = r * layer.row; j < (r + 1) * layer.row; j += L)
        store(scaled_rows + j, load(x_rows + j) * factor);
    }
    product<T>(layer.out, layer.row, part.rows, {dy, R_row, 1}, scaled_rows, layer.row, dw, layer.row, added<T>());
  }

  // ---- gates: back through the recurrences of c, m, g, p, b

  void gate_gradients(const Part& part) {
    for (int64_t r = part.rows - 1; r >= 0; --r) {
      const int64_t t = part.first + r;
      const bool last = t == n - 1;
      const T kept = gates.kept[t], held = gates.held[t];
      gb += dg[r], bb += db[r];
      pb += gb + (last ? dlast_p : T(0));
      Vector<T> c_dots = {}, m_dots = {};
      for (int64_t i = 0; i <= t; i += L) {
        const Vector<T> of_c = load(cb + i) + load(dc + r * C_row + i);
        Vector<T> of_m = load(mb + i) + of_c;
        if (last) of_m += load(dlast_m + i);
        c_dots += between<T>(0, t - 1 - i, of_c * load(c + r * C_row + i));
        m_dots += between<T>(0, t - 1 - i, of_m * load(m + r * C_row + i));
        store(dlr + i, load(dlr + i) + between<T>(t - k.window + 1 - i, t - i, of_m));
        store(cb + i, of_c * kept);
        store(mb + i, carries() ? of_m * held : Vector<T>{});
      }
      ddecay[t] = -(total<T>(c_dots) + (t > 0 ? gb * gates.g[t - 1] + bb * gates.b[t - 1] : bb));
      dmomentum[t] = total<T>(m_dots) + (t > 0 ? pb * gates.p[t - 1] : pb);
      gb *= kept, bb *= kept, pb *= held;
    }
  }

  void store_gate_gradients() const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = item.gate_at(start + i);
      static_cast<T*>(k.dlr)[j] = dlr[i];
      if (k.ddecay != nullptr) static_cast<T*>(k.ddecay)[j] = ddecay[i];
      if (k.dmomentum != nullptr) static_cast<T*>(k.dmomentum)[j] = dmomentum[i];
    }
  }

  // ---- the inner step: from ddelta, dx to k, v and the weights

  void inner_gradients() {
    T *dk = dx[0], *dresult = ddelta[k.layers() - 1];  // of f(k) - v
    if (k.linear()) {
      if (k.l2) from_inside(dresult, dk);
    } else {
      const LayerOfChunk &first = layers[0], &second = layers[1];
      T *const below = through, *const dh = second.dx;
      of_chunk(k.F).each(below, [&](int64_t j, int64_t) { return load(first.ddelta + j) * load(slope + j); });
      multiply(k.D, k.F, {second.w, I_row, 1}, below, dresult, true);
      transpose_rows(below, C_row, k.F, columns, scratch_rows, I_row);
      product<T>(k.D, I_row, n, {delta2, C_row, 1}, scratch_rows, I_row, second.dw, I_row, added<T>());
      if (k.l2) {
        multiply(k.F, k.D, {second.w, 1, I_row}, dresult, dh, true);
        product<T>(k.D, I_row, n, {dresult, C_row, 1}, h_rows, I_row, second.dw, I_row, added<T>());
        of_chunk(k.D).each(dk, [&](int64_t j, int64_t) { return load(dk + j) + load(dresult + j); });
      }
      of_chunk(k.F).each(below, [&](int64_t j, int64_t) {
        return load(first.ddelta + j) * load(bend + j) + load(dh + j) * load(slope + j);
      });
      from_inside(below, dk);
    }
    store_tokens(dk, C_row, {0, n}, k.dk);
    of_chunk(k.D).each(dresult, [&](int64_t j, int64_t) { return -load(dresult + j); });
    store_tokens(dresult, C_row, {0, n}, k.dv);
  }

  // From the gradient of W1 k, [inside][C_row].
  void from_inside(const T* da, T* dk) {
    const LayerOfChunk& first = layers[0];
    multiply(k.D, inside, {first.w, 1, D_row}, da, dk, true);
    product<T>(inside, D_row, n, {da, C_row, 1}, k_rows, D_row, first.dw, D_row, added<T>());
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
