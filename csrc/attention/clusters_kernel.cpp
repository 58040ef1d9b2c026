// Scores of tokens against centroids, and the largest of each token. See clusters.h.
#include "../common/vector.h"
#include "clusters.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class A>
SEQOPS_INLINE A least(A a, A b) {
  return a < b ? a : b;
}

// The scores in registers at a time: of MOST vectors of clusters, or of as few as K takes, and of tokens that keep as many
// sums under way.
constexpr int MOST = SEQOPS_VECTOR_BYTES == 64 ? 4 : 2;

template <class T>
int vectors_of(int64_t K) {
  return K <= LANES<T> ? 1 : K <= 2 * LANES<T> ? 2 : MOST;
}

template <class T>
int64_t blocks_of(int64_t K) {
  const int64_t width = vectors_of<T>(K) * LANES<T>;
  return (K + width - 1) / width;
}

template <class T>
int64_t packed_size(int64_t K, int64_t D) {
  return blocks_of<T>(K) * vectors_of<T>(K) * LANES<T> * D * sizeof(T);
}

// [K, D] as [blocks, D, vectors * LANES], zeros past K.
template <class T>
void pack(const void* centroids, int64_t K, int64_t D, void* packed) {
  const int64_t width = vectors_of<T>(K) * LANES<T>;
  const T* from = static_cast<const T*>(centroids);
  T* to = static_cast<T*>(packed);
  for (int64_t block = 0; block < blocks_of<T>(K); ++block) {
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t c = block * width + lane;
        *to++ = c < K ? from[c * D + d] : T(0);
      }
    }
  }
}

SEQOPS_INLINE uint32_t key_of(float score) {
  if (score != score) return ~uint32_t{0};
  score += 0.0f;  // of both zeros, one
  uint32_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
}

SEQOPS_INLINE uint64_t key_of(double score) {
  if (score != score) return ~uint64_t{0};
  score += 0.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

template <class T>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

template <class T>
struct Best {
  Vector<T> value;
  Bits<T> cluster;
};

// Lanes whose score is larger, or is the first NaN. Of equal scores the earlier one stays.
template <class T>
SEQOPS_INLINE void take(Best<T>& best, Vector<T> score, Bits<T> cluster, Bits<T> beyond) {
  const Bits<T> kept = (score <= best.value) | (best.value != best.value) | beyond;
  best.value = (Vector<T>)(((Bits<T>)best.value & kept) | ((Bits<T>)score & ~kept));
  best.cluster = (best.cluster & kept) | (cluster & ~kept);
}

template <class T>
int32_t best_of(const Best<T>& best, int64_t K) {
  T value = best.value[0];
  int64_t cluster = best.cluster[0];
  for (int lane = 1; lane < LANES<T>; ++lane) {
    const T other = best.value[lane];
    const int64_t c = best.cluster[lane];
    if (c >= K) continue;
    const bool nan = value != value, other_nan = other != other;
    const bool same = other == value || (nan && other_nan);
    const bool larger = other > value || (other_nan && !nan);
    if (larger || (same && c < cluster)) value = other, cluster = c;
  }
  return static_cast<int32_t>(cluster);
}

// The tokens of a tile from `first` on, TOKENS of them, of which `count` exist.
template <class T, int VECTORS, int TOKENS>
void score_tokens(const ClusterScores& k, const T* rows, int64_t first, int64_t count) {
  constexpr int64_t L = LANES<T>, WIDTH = VECTORS * L;
  using Key = typename KeyOf<T>::type;
  Bits<T> lanes;
  for (int lane = 0; lane < L; ++lane) lanes[lane] = lane;
  Best<T> best[TOKENS];
  for (int m = 0; m < TOKENS; ++m) best[m] = {constant<T>(-__builtin_inf()), lanes};
  const T* centroids = static_cast<const T*>(k.centroids);
  for (int64_t block = 0; block < blocks_of<T>(k.K); ++block) {
    Vector<T> sums[TOKENS][VECTORS] = {};
    for (int64_t d = 0; d < k.D; ++d, centroids += WIDTH) {
      Vector<T> mu[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) mu[v] = load(centroids + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < TOKENS; ++m) {
        const T value = rows[m * k.D + d];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[m][v] += mu[v] * value;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Bits<T> cluster = lanes + static_cast<decltype(lanes[0] + 0)>(block * WIDTH + v * L);
      const Bits<T> beyond = cluster >= (Bits<T>{} + static_cast<decltype(lanes[0] + 0)>(k.K));
#pragma GCC unroll 8
      for (int m = 0; m < TOKENS; ++m) take<T>(best[m], sums[m][v], cluster, beyond);
    }
    if (k.keys == nullptr) continue;
    for (int64_t i = 0; i < least(WIDTH, k.K - block * WIDTH); ++i) {
      Key* keys = static_cast<Key*>(k.keys) + (block * WIDTH + i) * k.T + first;
      for (int64_t m = 0; m < count; ++m) keys[m] = key_of(sums[m][i / L][i % L]);
    }
  }
  for (int64_t m = 0; m < count; ++m) k.nearest[(first + m) * k.nearest_t] = best_of<T>(best[m], k.K);
}

template <class T, int VECTORS, int TOKENS>
void score_rows(const ClusterScores& k, const T* tile, int64_t begin, int64_t rows) {
  static_assert(CLUSTER_TOKENS % TOKENS == 0, "tokens that do not exist are read, and dropped");
  for (int64_t i = 0; i < rows; i += TOKENS) {
    score_tokens<T, VECTORS, TOKENS>(k, tile + i * k.D, begin + i, least<int64_t>(TOKENS, rows - i));
  }
}

template <class S>
void scores(const ClusterScores& k) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  const S* x = static_cast<const S*>(k.x);
  T* tile = static_cast<T*>(k.tile);
  for (int64_t begin = k.first; begin < k.first + k.count; begin += CLUSTER_TOKENS) {
    const int64_t rows = least(CLUSTER_TOKENS, k.first + k.count - begin);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < k.D; d += L) {
        const int64_t n = least(L, k.D - d);
        store(tile + i * k.D + d, load(x + (begin + i) * k.x_t + d, n), n);
      }
    }
    // Rows that do not exist are computed and dropped.
    __builtin_memset(tile + rows * k.D, 0, (CLUSTER_TOKENS - rows) * k.D * sizeof(T));
    const int vectors = vectors_of<T>(k.K);
    if (vectors == 1) {
      score_rows<T, 1, 8>(k, tile, begin, rows);
    } else if (vectors == 2) {
      score_rows<T, 2, 4>(k, tile, begin, rows);
    } else {
      score_rows<T, MOST, 4>(k, tile, begin, rows);
    }
  }
}

}  // namespace

extern const ClusterKernels cluster_kernels;
const ClusterKernels cluster_kernels = {{packed_size<float>, packed_size<double>},
                                        {pack<float>, pack<double>},
                                        {scores<float>, scores<double>, scores<bfloat16>, scores<float16>}};

}  // namespace seqops::SEQOPS_ISA
