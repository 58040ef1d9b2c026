// The backward of one item: see linear_attention.h for its passes. With P = dS, the gradient of the state,
//
//   P_t = scale q_t do_t^T + e^{g_{t+1}} P_{t+1}     dq_t = scale S_t do_t     dk_t = P_t v_t     dv_t = P_t^T k_t
//   dg_t = q_t dq_t - k_t dk_t + dg_{t+1}            after a chunk: the row sums of S P there
//
// Slots: `first` has S^T [V][K] before each chunk (and after the last), `second` P [K][V] after each chunk.
#pragma once

#include "forward.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class S>
struct Backward {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;

  Item<S> item;
  Arena<T> arena;
  Decays<T> d, other_d;
  ChannelPairs<T> pairs;
  Steps<S> steps;
  T *q, *k, *v, *grad, *k_columns, *v_columns, *scores, *dscores, *far_scores;
  T *dq, *dk, *dv, *after, *other_q, *other_v;
  T *state, *other_state, *grad_state, *grad_columns;
  T *between, *factors, *dg;
  double* rest;  // [K]: the gradient of a decay right after the chunk
  bool odd = false;

  Backward(const LinearAttention& arguments, int64_t number, void* buffers)
      : item(arguments, number),
        arena{static_cast<T*>(buffers)},
        d(arena, item.K, item.by_channel()),
        other_d(arena, item.K, item.by_channel()),
        pairs(arena, item.K, item.by_channel()),
        steps(item, arena) {
    const int64_t K = item.K, V = item.V;
    T** const of_keys[] = {&q, &k, &k_columns, &dq, &dk, &after, &other_q};
    T** const of_values[] = {&v, &grad, &v_columns, &dv, &other_v};
    T** const of_pairs[] = {&scores, &dscores, &far_scores};
    T** const of_states[] = {&state, &other_state, &grad_state, &grad_columns};
    for (T** p : of_keys) *p = arena.take(C * K);
    for (T** p : of_values) *p = arena.take(C * V);
    for (T** p : of_pairs) *p = arena.take(C * C);
    for (T** p : of_states) *p = arena.take(K * V);
    between = arena.take(K), factors = arena.take(2 * K), dg = arena.take(C);
    rest = reinterpret_cast<double*>(arena.take(2 * K));
  }

  void load_queries(int64_t t, int64_t n, T* queries, T* gradients) {
    Vector<T> strange = {};
    item.load_rows(item.k.q, t, n, item.k.K, item.K, item.scale, queries, strange);
    item.load_rows(item.k.grad_o, t, n, item.k.V, item.V, T(1), gradients, strange);
    odd = odd || any_not_zero<T>(strange);
  }

  void load_keys(int64_t t, int64_t n, T* keys, T* values) {
    Vector<T> strange = {};
    item.load_rows(item.k.k, t, n, item.k.K, item.K, T(1), keys, strange);
    item.load_rows(item.k.v, t, n, item.k.V, item.V, T(1), values, strange);
    odd = odd || any_not_zero<T>(strange);
  }

  // ---- states of chunks

  // What steps t .. t + n - 1 add to S^T after them; for their own decays in d.
  void add_up(int64_t t, int64_t n, T* into) {
    odd = false;
    load_keys(t, n, k, v);
    load_decays(item, t, n, d, odd);
    if (odd) {
      clear(item.size(), state);
      for (int64_t i = t; i < t + n; ++i) steps.update(i, state);
      return transpose_state(state, into);
    }
    scale_rows(item, n, item.K, d.out, k);
    product<T>(item.V, item.K, n, {v, 1, item.V}, k, item.K, into, item.K, Keep<T>::nothing());
  }

  // [K][V] -> [V][K]
  void transpose_state(const T* from, T* to) const { transpose_rows(from, item.V, item.K, item.V, to, item.K); }

  void states(int64_t begin, int64_t end, const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t t = c * C, n = item.length(c);
      add_up(t, n, slots.first + c * item.size());
      copy(d.whole, K, slots.keeps + c * K);
      T* const grad_slot = slots.second + c * item.size();
      load_queries(t, n, q, grad);
      if (odd) {
        clear(item.size(), grad_slot);
        for (int64_t i = t + n - 1; i >= t; --i) step_back(i, grad_slot);
      } else {
        scale_rows(item, n, K, d.into, q);
        product<T>(K, V, n, {q, 1, K}, grad, V, grad_slot, V, Keep<T>::nothing());
      }
    }
  }

  // P before the decay of step t: with what the output of step t adds, then decayed.
  void step_back(int64_t t, T* gradient) {
    add_output(t, gradient);
    steps.load(t);
    steps.decay(gradient);
  }

  void add_output(int64_t t, T* gradient) {
    load_queries(t, 1, other_q, other_v);
    steps.add(other_q, other_v, gradient);
  }

  void window_state(T* into) {
    clear(item.size(), into);
    for (int64_t t = item.steps - item.window; t < item.steps;) {
      const int64_t next = (t / C + 1) * C < item.steps ? (t / C + 1) * C : item.steps;
      add_up(t, next - t, other_state);
      fold_state(item.V, item.K, d.whole, false, other_state, into);
      t = next;
    }
  }

  void fold(const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V, size = item.size(), chunks = item.chunks();
    if (item.window > 0) {
      const int64_t far = whole_chunks(item.window);
      if (far > 0) {
        two_stacks<T>({slots.first, slots.keeps, chunks, size, K, false}, V, K, false, far, slots.first_sums, state,
                      factors);
        two_stacks<T>({slots.second, slots.keeps, chunks, size, K, true}, K, V, true, far, slots.second_sums, state,
                      factors);
      }
      clear(size, state);
      return item.store_state(state, item.k.dinitial);
    }
    item.load_state(item.k.initial, state, true);
    for (int64_t c = 0; c < chunks; ++c) {
      T* slot = slots.first + c * size;
      copy(slot, size, other_state);
      copy(state, size, slot);
      fold_state(V, K, slots.keeps + c * K, false, other_state, state);
    }
    copy(state, size, slots.first + (item.k.causal ? chunks : 0) * size);
    item.load_state(item.k.dfinal, state, false);
    for (int64_t c = chunks - 1; c >= 0; --c) {
      T* slot = slots.second + c * size;
      copy(slot, size, other_state);
      copy(state, size, slot);
      fold_state(K, V, slots.keeps + c * K, true, other_state, state);
    }
    if (!item.k.causal) copy(state, size, slots.second);
    item.store_state(state, item.k.dinitial);
  }

  // ---- gradients of chunks

  void gradients(int64_t begin, int64_t end, const ItemSlots<T>& slots) {
    if (item.window > 0) first_rest();
    for (int64_t c = end - 1; c >= begin; --c) {
      const int64_t t = c * C, n = item.length(c);
      odd = false;
      load_queries(t, n, q, grad);
      load_keys(t, n, k, v);
      load_decays(item, t, n, d, odd);
      if (!item.k.causal) {
        one_state(n, slots);
      } else if (item.window > 0) {
        window_gradients(c, slots);
      } else {
        chunk_gradients(c, slots);
      }
      store(t, n);
    }
  }

  void store(int64_t t, int64_t n) {
    item.store_rows(item.k.dq, t, n, item.k.K, item.K, item.scale, dq);
    item.store_rows(item.k.dk, t, n, item.k.K, item.K, T(1), dk);
    item.store_rows(item.k.dv, t, n, item.k.V, item.V, T(1), dv);
  }

  // Without causality: one S and one P for all steps.
  void one_state(int64_t n, const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V;
    transpose_state(slots.second, grad_columns);
    product<T>(n, K, item.k.V, {grad, V, 1}, slots.first, K, dq, K, Keep<T>::nothing());
    product<T>(n, K, item.k.V, {v, V, 1}, grad_columns, K, dk, K, Keep<T>::nothing());
    product<T>(n, V, item.k.K, {k, K, 1}, slots.second, V, dv, V, Keep<T>::nothing());
  }

  void chunk_gradients(int64_t c, const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V, n = item.length(c), size = item.size();
    const T *before = slots.first + c * size, *next = before + size, *gradient = slots.second + c * size;
    if (odd || !all_finite(before, size) || !all_finite(gradient, size)) return gradients_by_steps(c, before, gradient);
    score(n);
    transpose_state(gradient, grad_columns);
    // `after`: what reaches the keys after the chunk; dq: what reaches the queries before it
    product<T>(n, K, V, {v, V, 1}, grad_columns, K, after, K, Keep<T>::nothing());
    product<T>(n, K, V, {grad, V, 1}, before, K, dq, K, Keep<T>::nothing());
    product<T>(n, V, n, {scores, 1, C}, grad, V, dv, V, Keep<T>::nothing(), Band::from_row);
    near_gradients(n);
    product<T>(n, V, K, {after, K, 1}, gradient, V, dv, V, added<T>());  // by now the keys as they are after the chunk
    if (!item.decays()) return;
    for (int64_t i = 0; i < K; i += L) {
      Vector<T> sum = {};
      for (int64_t j = 0; j < V; ++j) sum += load(next + j * K + i) * load(grad_columns + j * K + i);
      for (int lane = 0; lane < L; ++lane) rest[i + lane] = sum[lane];
    }
    decay_gradients(c);
  }

  // Scores of the chunk's pairs and their gradients.
  void score(int64_t n) {
    const int64_t K = item.K, V = item.V, columns = LinearAttention::padded(n);
    transpose_rows(v, V, n, V, v_columns, C);
    product<T>(n, columns, V, {grad, V, 1}, v_columns, C, dscores, C, Keep<T>::nothing(), Band::columns_until_row);
    if (item.by_channel()) {
      pairs.score(n, K, q, k, d, scores);
      mask_upper(n);
    } else {
      transpose_rows(k, K, n, K, k_columns, C);
      product<T>(n, columns, K, {q, K, 1}, k_columns, C, scores, C, Keep<T>::nothing(), Band::columns_until_row);
      mask_pairs<S>(item, n, d, scores, dscores);
    }
  }

  void mask_upper(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < LinearAttention::padded(n); ++j) dscores[i * C + j] = 0;
    }
  }

  // From `after` and dq as they are outside of the chunk to dk and dq, with the chunk's own pairs; `after` then has the
  // keys as they are after the chunk.
  void near_gradients(int64_t n) {
    const int64_t K = item.K;
    scale_rows(item, n, K, d.into, dq);
    if (item.by_channel()) {
      pairs.query_gradients(n, K, k, d, dscores, dq);
      pairs.key_gradients(n, K, d, dscores, after, dk);
      pairs.near_gradients(n, K, q, k, d, dscores, dq, dk);
    } else {
      product<T>(n, K, n, {dscores, C, 1}, k, K, dq, K, added<T>(), Band::until_row);
      copy(after, n * K, dk);
      scale_rows(item, n, K, d.out, dk);
      product<T>(n, K, n, {dscores, 1, C}, q, K, dk, K, added<T>(), Band::from_row);
    }
    copy(k, n * K, after);
    scale_rows(item, n, K, d.out, after);
  }

  // ---- gradients of decays

  void first_rest() {
    for (int64_t i = 0; i < item.K; ++i) rest[i] = 0;
    if (!item.decays() || item.k.dfinal == nullptr) return;
    window_state(state);
    item.load_state(item.k.dfinal, grad_columns, true);
    for (int64_t i = 0; i < item.k.V; ++i) {
      for (int64_t j = 0; j < item.k.K; ++j) {
        rest[j] += static_cast<double>(state[i * item.K + j]) * grad_columns[i * item.K + j];
      }
    }
  }

  // From q dq - k dk of the chunk's steps, still unrounded, and `rest`, which becomes that of the chunk before.
  void decay_gradients(int64_t c) {
    const int64_t K = item.K, t = c * C, n = item.length(c);
    if (item.by_channel()) {
      for (int64_t i = 0; i < item.k.K; ++i) {
        double sum = rest[i];
        for (int64_t j = n - 1; j >= 0; --j) {
          const int64_t at = j * K + i;
          sum += static_cast<double>(q[at]) * dq[at] - static_cast<double>(k[at]) * dk[at];
          store_gradient(t + j, i, d.g[at], sum);
        }
        rest[i] = sum;
      }
      return;
    }
    double sum = 0, total = 0;
    for (int64_t i = 0; i < item.k.K; ++i) sum += rest[i];
    for (int64_t j = n - 1; j >= 0; --j) {
      Vector<T> terms = {};
      for (int64_t i = 0; i < K; i += L) {
        terms += load(q + j * K + i) * load(dq + j * K + i) - load(k + j * K + i) * load(dk + j * K + i);
      }
      sum += sum_of_lanes<T>(terms);
      total += store_gradient(t + j, 0, d.g[j], sum);
    }
    if (item.k.sum_decay) item.k.dg_sums[item.item * item.k.most_chunks + c] = total;
    for (int64_t i = 0; i < K; ++i) rest[i] = i == 0 ? sum : 0;
  }

  // A reset has no gradient, and nothing before it reaches what comes after: the sum starts anew.
  double store_gradient(int64_t t, int64_t channel, T g, double& sum) {
    if (is_reset(g)) sum = 0;
    // Nor has a decay of nothing: of no state at all, or of one that no query sees.
    const bool of_nothing = item.window == 1 || (t == 0 && item.k.initial == nullptr);
    const double value = is_reset(g) || g > 0 || of_nothing ? 0 : sum;
    if (item.k.sum_decay) return value;
    const HeadView& view = item.k.dg;
    const int64_t at = item.batch * view.batch + (item.first + t) * view.step + item.head * view.head + channel;
    store_decay<T>(item.k.decay_type, view.data, at, static_cast<T>(value));
    return value;
  }

  // ---- chunks with numbers that are not finite: step by step, as the recurrence is written

  void gradients_by_steps(int64_t c, const T* before, const T* gradient) {
    const int64_t t = c * C, n = item.length(c);
    double total = 0;
    transpose_rows(before, item.K, item.V, item.K, state, item.V);
    for (int64_t i = 0; i < n; ++i) {
      steps.update(t + i, state);
      transpose_state(state, other_state);
      query_gradient(i, other_state);
    }
    copy(gradient, item.size(), grad_state);
    for (int64_t i = n - 1; i >= 0; --i) {
      add_output(t + i, grad_state);
      key_gradients(i, grad_state);
      steps.load(t + i);
      steps.decay(grad_state);
      if (!item.decays()) continue;
      transpose_rows(before, item.K, item.V, item.K, state, item.V);
      for (int64_t j = 0; j < i; ++j) steps.update(t + j, state);
      double sum = 0;
      for (int64_t a = 0; a < item.k.K; ++a) {
        double of_channel = 0;
        for (int64_t b = 0; b < item.k.V; ++b) {
          of_channel += static_cast<double>(state[a * item.V + b]) * grad_state[a * item.V + b];
        }
        if (item.by_channel()) store_gradient(t + i, a, d.g[i * item.K + a], of_channel);
        sum += of_channel;
      }
      if (!item.by_channel()) total += store_gradient(t + i, 0, d.g[i], sum);
    }
    if (item.k.sum_decay) item.k.dg_sums[item.item * item.k.most_chunks + c] = total;
  }

  void query_gradient(int64_t i, const T* state_columns) {
    product<T>(1, item.K, item.k.V, {grad + i * item.V, 0, 1}, state_columns, item.K, dq + i * item.K, item.K,
               Keep<T>::nothing());
  }

  void key_gradients(int64_t i, const T* gradient) {
    transpose_state(gradient, grad_columns);
    product<T>(1, item.K, item.k.V, {v + i * item.V, 0, 1}, grad_columns, item.K, dk + i * item.K, item.K,
               Keep<T>::nothing());
    product<T>(1, item.V, item.k.K, {k + i * item.K, 0, 1}, gradient, item.V, dv + i * item.V, item.V,
               Keep<T>::nothing());
  }

  // ---- windows

  void window_gradients(int64_t c, const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V, n = item.length(c), size = item.size(), w = item.window;
    const bool far = whole_chunks(w) > 0;
    const T* before = far ? slots.first_sums + c * size : nullptr;
    const T* gradient = far ? slots.second_sums + c * size : nullptr;
    odd = odd || (far && !(all_finite(before, size) && all_finite(gradient, size)));
    if (!odd) {
      score(n);
      mask_window(n, n, 0, w, scores), mask_window(n, n, 0, w, dscores);
      product<T>(n, V, n, {scores, 1, C}, grad, V, dv, V, Keep<T>::nothing(), Band::from_row);
      clear(n * K, after), clear(n * K, dq);
      if (far) {
        transpose_state(gradient, grad_columns);
        product<T>(n, K, V, {v, V, 1}, grad_columns, K, after, K, Keep<T>::nothing());
        product<T>(n, K, V, {grad, V, 1}, before, K, dq, K, Keep<T>::nothing());
      }
      keys_of_queries(c, slots.keeps);
      queries_of_keys(c, slots.keeps, far ? gradient : nullptr);
      final_of_keys(c, slots.keeps);
    }
    if (odd) {
      window_gradients_by_steps(c);
    } else {
      near_gradients(n);
    }
    if (item.decays()) decay_gradients(c);
  }

  // Keys of earlier chunks, into dq: as before the chunk.
  void keys_of_queries(int64_t c, const T* keeps) {
    const int64_t K = item.K, V = item.V, n = item.length(c);
    const Reach reach = keys_in_part(c, item.window);
    for (int64_t e = reach.last; e >= reach.first && !odd; --e) {
      load_keys(e * C, C, other_q, other_v);
      load_decays(item, e * C, C, other_d, odd);
      if (odd) return;
      scale_rows(item, C, K, other_d.out, other_q);
      decay_between(e, c, K, keeps, between);
      scale_columns(C, K, between, other_q);
      transpose_rows(other_v, V, C, V, v_columns, C);
      product<T>(n, C, V, {grad, V, 1}, v_columns, C, far_scores, C, Keep<T>::nothing());
      mask_window(n, C, (c - e) * C, item.window, far_scores);
      product<T>(n, K, C, {far_scores, C, 1}, other_q, K, dq, K, added<T>());
    }
  }

  // Queries of later chunks, into `after`, as after the chunk, and dv; with what far queries add to dv.
  void queries_of_keys(int64_t c, const T* keeps, const T* gradient) {
    const int64_t K = item.K, V = item.V, n = item.length(c);
    copy(k, n * K, dk);  // dk has the keys as they are after the chunk, until near_gradients
    scale_rows(item, n, K, d.out, dk);
    if (gradient != nullptr) product<T>(n, V, K, {dk, K, 1}, gradient, V, dv, V, added<T>());
    const Reach reach = queries_in_part(c, item.window, item.chunks());
    for (int64_t e = reach.first; e <= reach.last && !odd; ++e) {
      const int64_t m = item.length(e);
      load_queries(e * C, m, other_q, other_v);
      load_decays(item, e * C, m, other_d, odd);
      if (odd) return;
      scale_rows(item, m, K, other_d.into, other_q);
      decay_between(c, e, K, keeps, between);
      scale_columns(m, K, between, other_q);
      transpose_rows(v, V, n, V, v_columns, C);
      product<T>(m, LinearAttention::padded(n), V, {other_v, V, 1}, v_columns, C, far_scores, C, Keep<T>::nothing());
      mask_window(m, n, (e - c) * C, item.window, far_scores);
      product<T>(n, K, m, {far_scores, 1, C}, other_q, K, after, K, added<T>());
      transpose_rows(dk, K, n, K, k_columns, C);
      product<T>(m, LinearAttention::padded(n), K, {other_q, K, 1}, k_columns, C, far_scores, C, Keep<T>::nothing());
      mask_window(m, n, (e - c) * C, item.window, far_scores);
      product<T>(n, V, m, {far_scores, 1, C}, other_v, V, dv, V, added<T>());
    }
  }

  // The final state is like a query after the last step that sees the last `window` keys.
  void final_of_keys(int64_t c, const T* keeps) {
    const int64_t K = item.K, V = item.V, t = c * C, n = item.length(c), oldest = item.steps - item.window - t;
    if (item.k.dfinal == nullptr || oldest >= n) return;
    const int64_t from = oldest > 0 ? oldest : 0;
    item.load_state(item.k.dfinal, grad_state, false);
    decay_between(c, item.chunks(), K, keeps, between);
    fold_state<T>(K, V, between, true, nullptr, grad_state);
    odd = odd || !all_finite(grad_state, item.size());
    transpose_state(grad_state, grad_columns);
    product<T>(n - from, K, V, {v + from * V, V, 1}, grad_columns, K, after + from * K, K, added<T>());
    product<T>(n - from, V, K, {dk + from * K, K, 1}, grad_state, V, dv + from * V, V, added<T>());
  }

  void window_gradients_by_steps(int64_t c) {
    const int64_t t = c * C, n = item.length(c), w = item.window;
    for (int64_t i = t; i < t + n; ++i) {
      clear(item.size(), state);
      for (int64_t j = i < w ? 0 : i - w + 1; j <= i; ++j) steps.update(j, state);
      transpose_state(state, other_state);
      query_gradient(i - t, other_state);

      const int64_t last = i + w - 1 < item.steps ? i + w - 1 : item.steps - 1;
      clear(item.size(), grad_state);
      if (i + w >= item.steps) item.load_state(item.k.dfinal, grad_state, false);
      for (int64_t j = last; j > i; --j) step_back(j, grad_state);
      add_output(i, grad_state);
      key_gradients(i - t, grad_state);
    }
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
