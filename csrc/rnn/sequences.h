// Sequences as the recurrent cells' CUDA kernels see them: where rows and steps lie, and what a cell's backward reads.
#pragma once

#include "rnn/numbers.h"

// Pair (row, step) of a contiguous sequence [B, T, .., H, D], or of one with time first, is number row * b + time * t.
struct Pairs {
  int64_t b, t;
};

// Steps of a row. Nothing checks the values on a GPU: clamped, they may give wrong results but never a wrong address.
__device__ __forceinline__ int64_t length_of(const int64_t* p_lengths, int64_t row, int64_t T) {
  if (p_lengths == nullptr) return T;
  const int64_t length = p_lengths[row];
  return length < 0 ? 0 : length > T ? T : length;
}

// Where a value that a cell's backward reads lies.
struct Source {
  enum Tensor { CACHE, KEPT, OUTPUT };
  Tensor tensor;
  int index;   // in CACHE
  int before;  // the state that is read one step before, where the first step has the initial one; or -1
};

struct Kept {
  const S* p_cache;  // [B, T, CACHES, H, D]
  const S* p_kept;   // [B, T, H, D]
  const S* p_h;      // [B, T, H, D]

  // Of all units of a pair: `width` of them.
  __device__ __forceinline__ const S* at(const Source& source, int64_t pair, int caches, int64_t width) const {
    return source.tensor == Source::CACHE  ? p_cache + (pair * caches + source.index) * width
           : source.tensor == Source::KEPT ? p_kept + pair * width
                                           : p_h + pair * width;
  }
};
