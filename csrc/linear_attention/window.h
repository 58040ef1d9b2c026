// Windows over chunks. The query chunk c sees, besides itself,
//
//   the chunks c - far(w) .. c - 1 whole, through a state that is the sum of what they add,
//   before them one or two chunks of which every query sees another piece: pairs, masked.
//
// Nothing is ever subtracted from a sum. The states of `far` chunks come from two stacks: blocks of that many chunks, a sum
// from the start of a block on, and sums to the end of the block before; each window is one of either.
#pragma once

#include "chunk.h"

namespace seqops::SEQOPS_ISA {
namespace {

struct Reach {
  int64_t first, last;  // chunks, first > last: none
};

SEQOPS_INLINE int64_t whole_chunks(int64_t window) { return window / C > 1 ? window / C - 1 : 0; }

// Chunks of which some queries of chunk c see some keys only.
SEQOPS_INLINE Reach keys_in_part(int64_t c, int64_t window) {
  const int64_t oldest = c * C - window + 1;
  return {oldest <= 0 ? 0 : oldest / C, c - 1 - whole_chunks(window)};
}

SEQOPS_INLINE Reach queries_in_part(int64_t c, int64_t window, int64_t chunks) {
  const int64_t last = (c * C + C + window - 2) / C;
  return {c + 1 + whole_chunks(window), last < chunks ? last : chunks - 1};
}

// Zero where the key is out of the query's window: they are `distance` + i - j steps apart.
template <class T>
void mask_window(int64_t rows, int64_t columns, int64_t distance, int64_t window, T* scores) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns && distance + i - j >= window; ++j) scores[i * C + j] = 0;
  }
}

// state = keep * state + other, with a factor for each row or for each column.
template <class T>
void fold_state(int64_t rows, int64_t columns, const T* keep, bool by_row, const T* other, T* state) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; c += L) {
      T* p = state + i * columns + c;
      const Vector<T> factor = by_row ? Vector<T>{} + keep[i] : load(keep + c);
      const Vector<T> added = other == nullptr ? Vector<T>{} : load(other + i * columns + c);
      const Vector<T> sum = load(p) * factor + added;
      store(p, factor == T(0) ? added : sum);  // a factor of 0 cuts, even what is infinite or NaN
    }
  }
}

// What is left at the beginning of chunk `late` of a state after chunk `early`.
template <class T>
void decay_between(int64_t early, int64_t late, int64_t K, const T* keeps, T* out) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < K; i += L) {
    Vector<T> factor = constant<T>(1);
    for (int64_t c = early + 1; c < late; ++c) factor *= load(keeps + c * K + i);
    store(out + i, flushed<T>(factor));
  }
}

// Chunks as a fold walks them: from the first to the last, or back.
template <class T>
struct Slots {
  T* states;  // [chunks][rows * columns]
  T* keeps;   // [chunks][K]
  int64_t chunks, size, K;
  bool backwards;

  int64_t at(int64_t i) const { return backwards ? chunks - 1 - i : i; }
  T* state(int64_t i) const { return states + at(i) * size; }
  T* keep(int64_t i) const { return keeps + at(i) * K; }
};

// sums[c] = what the `far` chunks before c (in the order of the walk) add together, decayed to its beginning.
// `slots.states` are overwritten. prefix [size], factors [2][K].
template <class T>
void two_stacks(const Slots<T>& slots, int64_t rows, int64_t columns, bool by_row, int64_t far, T* sums, T* prefix,
                T* factors) {
  constexpr int L = LANES<T>;
  const int64_t size = slots.size, K = slots.K;
  T *since = factors, *below = factors + K;  // products of the keeps: since the block began; of the suffix so far
  for (int64_t i = 0; i < slots.chunks; ++i) {
    if (i % far == 0) {
      for (int64_t j = i - 1; j >= 0 && j >= i - far; --j) {  // suffixes of the block that ended
        if (j == i - 1) {
          copy(slots.keep(j), K, below);
          continue;
        }
        T* p = slots.state(j);
        fold_state(rows, columns, below, by_row, slots.state(j + 1), p);
        for (int64_t c = 0; c < K; c += L) store(below + c, flushed<T>(load(below + c) * load(slots.keep(j) + c)));
      }
      clear(size, prefix);
      for (int64_t c = 0; c < K; c += L) store(since + c, constant<T>(1));
    } else {
      // prefix = keep(i - 1) prefix + state(i - 1), which no suffix has changed yet
      fold_state(rows, columns, slots.keep(i - 1), by_row, slots.state(i - 1), prefix);
      for (int64_t c = 0; c < K; c += L) store(since + c, flushed<T>(load(since + c) * load(slots.keep(i - 1) + c)));
    }
    T* sum = sums + slots.at(i) * size;
    if (i < far) {  // the past is shorter than a window
      copy(prefix, size, sum);
    } else {
      copy(slots.state(i - far), size, sum);
      fold_state(rows, columns, since, by_row, prefix, sum);
    }
  }
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
