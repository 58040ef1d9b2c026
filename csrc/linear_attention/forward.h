// The forward of one item: see linear_attention.h for its passes.
#pragma once

#include "pairs.h"
#include "window.h"

namespace seqops::SEQOPS_ISA {
namespace {

// What a chunk hands on, and where: states [K][V], or their transposes.
template <class T>
struct ItemSlots {
  T *keeps, *first, *second, *first_sums, *second_sums;  // the second ones in a backward, sums under a window

  ItemSlots(const LinearAttention& k, void* slots, bool backward) {
    Arena<T> arena = {static_cast<T*>(slots)};
    const int64_t count = k.most_chunks + 2, states = count * k.state_size();
    keeps = arena.take(count * LinearAttention::padded(k.K));
    first = arena.take(states);
    second = backward ? arena.take(states) : nullptr;
    first_sums = k.window > 0 ? arena.take(states) : nullptr;
    second_sums = k.window > 0 && backward ? arena.take(states) : nullptr;
  }
};

// One step of the recurrence, and what chunks with infinite numbers or NaN are computed with: then no product with 0 may
// stand for "does not count".
template <class S>
struct Steps {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;

  const Item<S>& item;
  Decays<T> d;
  T *q, *k, *v, *o;

  Steps(const Item<S>& item, Arena<T>& arena) : item(item), d(arena, item.K, item.by_channel()) {
    q = arena.take(item.K), k = arena.take(item.K), v = arena.take(item.V), o = arena.take(item.V);
  }

  // Step t; d.whole has its decay.
  void load(int64_t t) {
    Vector<T> ignored = {};
    bool odd = false;
    item.load_rows(item.k.k, t, 1, item.k.K, item.K, T(1), k, ignored);
    item.load_rows(item.k.v, t, 1, item.k.V, item.V, T(1), v, ignored);
    load_decays(item, t, 1, d, odd);
  }

  void decay(T* state) const { fold_state<T>(item.K, item.V, d.whole, true, nullptr, state); }

  void add(const T* left, const T* right, T* state) const {
    for (int64_t i = 0; i < item.K; ++i) {
      for (int64_t c = 0; c < item.V; c += L) {
        T* p = state + i * item.V + c;
        store(p, seqops::SEQOPS_ISA::load(p) + left[i] * seqops::SEQOPS_ISA::load(right + c));
      }
    }
  }

  void update(int64_t t, T* state) {
    load(t);
    decay(state);
    add(k, v, state);
  }

  void output(int64_t t, const T* state) {
    Vector<T> ignored = {};
    item.load_rows(item.k.q, t, 1, item.k.K, item.K, item.scale, q, ignored);
    // The filling is left out: a zero there times an infinite state is no zero.
    product<T>(1, item.V, item.k.K, {q, item.K, 1}, state, item.V, o, item.V, Keep<T>::nothing());
    item.store_rows(item.k.o, t, 1, item.k.V, item.V, T(1), o);
  }
};

template <class S>
struct Forward {
  using T = Compute<S>;

  Item<S> item;
  Arena<T> arena;
  Decays<T> d, other_d;
  ChannelPairs<T> pairs;
  Steps<S> steps;
  T *q, *k, *v, *o, *scores, *columns, *state, *between, *factors;
  T* more_states;
  bool odd = false;

  Forward(const LinearAttention& arguments, int64_t number, void* buffers)
      : item(arguments, number),
        arena{static_cast<T*>(buffers)},
        d(arena, item.K, item.by_channel()),
        other_d(arena, item.K, item.by_channel()),
        pairs(arena, item.K, item.by_channel()),
        steps(item, arena) {
    const int64_t K = item.K, V = item.V;
    q = arena.take(C * K), k = arena.take(C * K), columns = arena.take(C * K);
    v = arena.take(C * V), o = arena.take(C * V), scores = arena.take(C * C);
    state = arena.take(K * V), between = arena.take(K), factors = arena.take(2 * K);
    more_states = arena.take(2 * K * V);
  }

  T* other_state() const { return more_states; }
  T* marched() const { return more_states + item.size(); }

  void load_keys(int64_t t, int64_t n, Decays<T>& decays) {
    Vector<T> strange = {};
    item.load_rows(item.k.k, t, n, item.k.K, item.K, T(1), k, strange);
    item.load_rows(item.k.v, t, n, item.k.V, item.V, T(1), v, strange);
    load_decays(item, t, n, decays, odd);
    odd = odd || any_not_zero<T>(strange);
  }

  void load_queries(int64_t t, int64_t n) {
    Vector<T> strange = {};
    item.load_rows(item.k.q, t, n, item.k.K, item.K, item.scale, q, strange);
    odd = odd || any_not_zero<T>(strange);
  }

  // The pairs of the chunk, into scores; k stays.
  void score(int64_t n) {
    if (item.by_channel()) return pairs.score(n, item.K, q, k, d, scores);
    transpose_rows(k, item.K, n, item.K, columns, C);
    product<T>(n, LinearAttention::padded(n), item.K, {q, item.K, 1}, columns, C, scores, C, Keep<T>::nothing(),
               Band::columns_until_row);
    mask_pairs<S>(item, n, d, scores, nullptr);
  }

  // state = whole state + what the chunk adds; k becomes what is left of the keys after the chunk.
  void update(int64_t n, T* into, bool fresh) {
    const int64_t K = item.K, V = item.V;
    scale_rows(item, n, K, d.out, k);
    product<T>(K, V, n, {k, 1, K}, v, V, into, V, fresh ? Keep<T>::nothing() : Keep<T>{d.whole, 1});
  }

  void outputs_from(int64_t t, int64_t n, const T* from) {
    const int64_t K = item.K, V = item.V;
    score(n);
    product<T>(n, V, n, {scores, C, 1}, v, V, o, V, Keep<T>::nothing(), Band::until_row);
    scale_rows(item, n, K, d.into, q);
    if (from != nullptr) product<T>(n, V, K, {q, K, 1}, from, V, o, V, added<T>());
  }

  // Under a window that leaves nothing of the item out: the same bits as without.
  bool is_short() const { return item.k.window > 0 && item.window == 0; }

  void march() {
    item.load_state(item.k.initial, state, false);
    if (item.steps == 1) march_by_steps(0, 1, state);
    for (int64_t c = 0; c < item.chunks() && item.steps > 1; ++c) {
      const int64_t t = c * C, n = item.length(c);
      if (chunk_outputs(c, state)) {
        update(n, state, false);
      } else {
        add_up(t, n, other_state());
        fold_state(item.K, item.V, d.whole, true, other_state(), state);
      }
    }
    item.store_state(state, item.k.final);
  }

  void march_by_steps(int64_t t, int64_t n, T* from) {
    for (int64_t i = t; i < t + n; ++i) {
      steps.update(i, from);
      steps.output(i, from);
    }
  }

  // ---- in passes

  // What steps t .. t + n - 1 add to a state.
  void add_up(int64_t t, int64_t n, T* into) {
    odd = false;
    load_keys(t, n, d);
    if (!odd) return update(n, into, true);
    clear(item.size(), into);
    for (int64_t i = t; i < t + n; ++i) steps.update(i, into);
  }

  void states(int64_t begin, int64_t end, const ItemSlots<T>& slots) {
    for (int64_t c = begin; c < end; ++c) {
      add_up(c * C, item.length(c), slots.first + c * item.size());
      copy(d.whole, item.K, slots.keeps + c * item.K);
    }
  }

  // The sum of the last `window` steps.
  void window_state(T* into) {
    clear(item.size(), into);
    T* const added_up = other_state();
    for (int64_t t = item.steps - item.window; t < item.steps;) {
      const int64_t next = (t / C + 1) * C < item.steps ? (t / C + 1) * C : item.steps;
      add_up(t, next - t, added_up);
      fold_state(item.K, item.V, d.whole, true, added_up, into);
      t = next;
    }
  }

  void fold(const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V, size = item.size(), chunks = item.chunks();
    if (item.window > 0) {
      window_state(state);
      if (whole_chunks(item.window) > 0) {
        two_stacks<T>({slots.first, slots.keeps, chunks, size, K, false}, K, V, true, whole_chunks(item.window),
                      slots.first_sums, other_state(), factors);
      }
    } else {
      item.load_state(item.k.initial, state, false);
      T* const added_up = other_state();
      for (int64_t c = 0; c < chunks; ++c) {  // every slot then has the state before its chunk
        T* slot = slots.first + c * size;
        copy(slot, size, added_up);
        copy(state, size, slot);
        fold_state(K, V, slots.keeps + c * K, true, added_up, state);
      }
      if (!item.k.causal && chunks > 0) copy(state, size, slots.first);
    }
    item.store_state(state, item.k.final);
  }

  void outputs(int64_t begin, int64_t end, const ItemSlots<T>& slots) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t t = c * C, n = item.length(c);
      if (item.k.causal && item.window > 0) {
        window_outputs(c, slots);
      } else if (item.k.causal) {
        chunk_outputs(c, slots.first + c * item.size());
      } else {
        load_queries(t, n);
        product<T>(n, item.V, item.k.K, {q, item.K, 1}, slots.first, item.V, o, item.V, Keep<T>::nothing());
        item.store_rows(item.k.o, t, n, item.k.V, item.V, T(1), o);
      }
    }
  }

  // Whether the numbers of the chunk were finite.
  bool chunk_outputs(int64_t c, const T* from) {
    const int64_t t = c * C, n = item.length(c);
    odd = false;
    load_keys(t, n, d), load_queries(t, n);
    if (odd || !all_finite(from, item.size())) {
      copy(from, item.size(), marched());
      march_by_steps(t, n, marched());
      return false;
    }
    outputs_from(t, n, from);
    item.store_rows(item.k.o, t, n, item.k.V, item.V, T(1), o);
    return true;
  }

  void window_outputs(int64_t c, const ItemSlots<T>& slots) {
    const int64_t K = item.K, V = item.V, t = c * C, n = item.length(c);
    T* const from = whole_chunks(item.window) > 0 ? slots.first_sums + c * item.size() : nullptr;
    odd = from != nullptr && !all_finite(from, item.size());
    load_keys(t, n, d), load_queries(t, n);
    if (!odd) {
      score(n);
      mask_window(n, n, 0, item.window, scores);
      product<T>(n, V, n, {scores, C, 1}, v, V, o, V, Keep<T>::nothing(), Band::until_row);
      scale_rows(item, n, K, d.into, q);
      if (from != nullptr) product<T>(n, V, K, {q, K, 1}, from, V, o, V, added<T>());
    }
    const Reach reach = keys_in_part(c, item.window);
    for (int64_t e = reach.last; e >= reach.first && !odd; --e) {
      load_keys(e * C, C, other_d);
      if (odd) break;
      scale_rows(item, C, K, other_d.out, k);
      decay_between(e, c, K, slots.keeps, between);
      scale_columns(C, K, between, k);
      transpose_rows(k, K, C, K, columns, C);
      product<T>(n, C, K, {q, K, 1}, columns, C, scores, C, Keep<T>::nothing());
      mask_window(n, C, (c - e) * C, item.window, scores);
      product<T>(n, V, C, {scores, C, 1}, v, V, o, V, added<T>());
    }
    if (!odd) return item.store_rows(item.k.o, t, n, item.k.V, V, T(1), o);
    for (int64_t i = t; i < t + n; ++i) {
      clear(item.size(), state);
      for (int64_t j = i < item.window ? 0 : i - item.window + 1; j <= i; ++j) steps.update(j, state);
      steps.output(i, state);
    }
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
