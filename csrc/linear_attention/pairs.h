// Pairs of steps of one chunk, a query at step i and a key at step j <= i: their scores
//
//   A_ij = (q_i . k_j) e^{g_{j+1} + .. + g_i}
//
// and, where decays differ between channels, the way back from dA to dq and dk.
//
// With a decay for each channel, the chunk is taken in parts of PART steps. A pair of different parts meets at the first
// step of the query's part: q_i `up_i` times k_j `down_j` and all parts between, both factors at most 1. Pairs of one part
// are multiplied out step by step.
#pragma once

#include "chunk.h"

namespace seqops::SEQOPS_ISA {
namespace {

// The decays of pairs, and 0 where j > i, into scores [n][C] (and others of the same pairs).
template <class S, class T = Compute<S>>
void mask_pairs(const Item<S>& item, int64_t n, const Decays<T>& d, Compute<S>* scores, Compute<S>* others) {
  constexpr int L = LANES<T>;
  const int64_t columns = LinearAttention::padded(n);
  Vector<T> lanes;
  for (int lane = 0; lane < L; ++lane) lanes[lane] = static_cast<T>(lane);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < columns; j += L) {
      T* p = scores + i * C + j;
      T* other = others == nullptr ? nullptr : others + i * C + j;
      if (j > i) {
        store(p, Vector<T>{});
        if (other != nullptr) store(other, Vector<T>{});
        continue;
      }
      Vector<T> weight = constant<T>(1);
      if (item.k.decay == DecayKind::step) {
        const Vector<T> sum = (d.high[i] - load(d.high + j)) + (d.low[i] - load(d.low + j));
        weight = exp<T>(at_most<T>(sum, T(0)));
      }
      const auto past = lanes > static_cast<T>(i - j);
      Vector<T> value = load(p) * weight;
      store(p, past ? Vector<T>{} : value);
      if (other != nullptr) {
        value = load(other) * weight;
        store(other, past ? Vector<T>{} : value);
      }
    }
  }
}

template <class T>
SEQOPS_INLINE T sum_of_lanes(Vector<T> v) {
  Bits<T> lanes = {};
  for (int lane = 0; lane < LANES<T>; ++lane) lanes[lane] = lane;
#pragma GCC unroll 4
  for (int half = LANES<T> / 2; half > 0; half /= 2) v += permute<T>(v, lanes ^ half);
  return v[0];
}

// Buffers for decays of channels.
template <class T>
struct ChannelPairs {
  T* q_up;         // [C][K]: q times `up`
  T* met;          // [C][K]: keys of earlier parts, as they are at the first step of this one
  T* met_columns;  // [K][C]: the same transposed
  T* weighted;     // [PART][K]

  ChannelPairs(Arena<T>& arena, int64_t K, bool wanted) {
    const int64_t size = wanted ? C * K : 0;
    q_up = arena.take(size), met = arena.take(size), met_columns = arena.take(size);
    weighted = arena.take(wanted ? PART * K : 0);
  }

  void load_queries(int64_t n, int64_t K, const T* q, const Decays<T>& d) {
    constexpr int L = LANES<T>;
    for (int64_t i = 0; i < n * K; i += L) store(q_up + i, load(q + i) * load(d.up + i));
  }

  void score(int64_t n, int64_t K, const T* q, const T* k, const Decays<T>& d, T* scores) {
    constexpr int L = LANES<T>;
    load_queries(n, K, q, d);
    for (int64_t part = 0; part * PART < n; ++part) {
      const int64_t begin = part * PART, end = begin + PART < n ? begin + PART : n;
      if (part > 0) {
        product<T>(end - begin, begin, K, {q_up + begin * K, K, 1}, met_columns, C, scores + begin * C, C,
                   Keep<T>::nothing());
      }
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = begin; j < LinearAttention::padded(n); j += L) store(scores + i * C + j, Vector<T>{});
      }
      for (int64_t j = begin; j < end; ++j) {
        copy(k + j * K, K, weighted);
        for (int64_t i = j; i < end; ++i) {
          Vector<T> sum = {};
          for (int64_t c = 0; c < K; c += L) {
            Vector<T> key = load(weighted + c);
            if (i > j) {
              key *= load(d.a + i * K + c);
              store(weighted + c, key);
            }
            sum += key * load(q + i * K + c);
          }
          scores[i * C + j] = sum_of_lanes<T>(sum);
        }
      }
      if (end == n) return;
      for (int64_t c = 0; c < K; ++c) {
        const T factor = d.part[part * K + c];
        for (int64_t j = 0; j < begin; j += L) {
          store(met_columns + c * C + j, load(met_columns + c * C + j) * factor);
        }
      }
      for (int64_t i = 0; i < (end - begin) * K; i += L) {
        store(weighted + i, load(k + begin * K + i) * load(d.down + begin * K + i));
      }
      transpose_rows(weighted, K, end - begin, K, met_columns + begin, C);
    }
  }

  // dq += the part of pairs, from dscores [n][C], 0 where j > i.
  void query_gradients(int64_t n, int64_t K, const T* k, const Decays<T>& d, const T* dscores, T* dq) {
    constexpr int L = LANES<T>;
    for (int64_t part = 0; part * PART < n; ++part) {
      const int64_t begin = part * PART, end = begin + PART < n ? begin + PART : n;
      if (part > 0) {
        product<T>(end - begin, K, begin, {dscores + begin * C, C, 1}, met, K, weighted, K, Keep<T>::nothing());
        for (int64_t i = 0; i < (end - begin) * K; i += L) {
          T* p = dq + begin * K + i;
          store(p, load(p) + load(weighted + i) * load(d.up + begin * K + i));
        }
      }
      scale_columns(begin, K, d.part + part * K, met);
      for (int64_t i = begin * K; i < end * K; i += L) store(met + i, load(k + i) * load(d.down + i));
    }
  }

  // dk = what reaches the keys after the chunk, `after` [n][K], which is overwritten, and the part of pairs.
  void key_gradients(int64_t n, int64_t K, const Decays<T>& d, const T* dscores, T* after, T* dk) {
    constexpr int L = LANES<T>;
    for (int64_t part = (n - 1) / PART; part >= 0; --part) {
      const int64_t begin = part * PART, end = begin + PART < n ? begin + PART : n;
      for (int64_t i = begin * K; i < end * K; i += L) store(dk + i, load(after + i) * load(d.down + i));
      if (part == 0) return;
      scale_columns(begin, K, d.part + part * K, after);
      product<T>(begin, K, end - begin, {dscores + begin * C, 1, C}, q_up + begin * K, K, after, K, added<T>());
    }
  }

  // Pairs of one part: both gradients.
  void near_gradients(int64_t n, int64_t K, const T* q, const T* k, const Decays<T>& d, const T* dscores, T* dq,
                      T* dk) {
    constexpr int L = LANES<T>;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t end = (j / PART + 1) * PART < n ? (j / PART + 1) * PART : n;
      for (int64_t c = 0; c < K; c += L) {
        Vector<T> weight = constant<T>(1), sum = {};
        const Vector<T> key = load(k + j * K + c);
        for (int64_t i = j; i < end; ++i) {
          if (i > j) weight *= load(d.a + i * K + c);
          const Vector<T> both = weight * dscores[i * C + j];
          store(dq + i * K + c, load(dq + i * K + c) + both * key);
          sum += both * load(q + i * K + c);
        }
        store(dk + j * K + c, load(dk + j * K + c) + sum);
      }
    }
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
