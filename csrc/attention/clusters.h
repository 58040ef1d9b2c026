// Clusters of tokens on the CPU: what the host (clusters.cpp) hands to clusters_kernel.cpp.
//
//   B batch · T tokens · H heads · Hx heads of x (each of H / Hx heads in turn) · K clusters · D channels
//
// Scores x_t . mu_c are sums in float (double where x is), over the channels in their order: neither the batch nor the
// number of threads changes a bit.
#pragma once

#include <stdint.h>

#include "../common/isa.h"

namespace seqops {

constexpr int64_t CLUSTER_TOKENS = 64;  // of a tile

struct ClusterScores {
  int64_t T, K, D;
  const void* x;          // [T, D] of one (b, h): the last dimension dense
  int64_t x_t;            // stride in elements
  const void* centroids;  // of that head, as `pack` lays them out
  int32_t* nearest;  // of token t at t * nearest_t: the cluster of the largest score, NaN before all, ties to the lower
  int64_t nearest_t;
  int64_t first, count;  // tokens of this call
  void* keys;            // [K, T], or null: scores as unsigned integers in the same order, NaN largest
  void* tile;            // [CLUSTER_TOKENS, D] in float or double
};

// By storage type of x: float, double, bfloat16, float16. Centroids [K, D] are float or double.
struct ClusterKernels {
  int64_t (*packed_size[2])(int64_t K, int64_t D);  // in bytes, by whether it is double
  void (*pack[2])(const void* centroids, int64_t K, int64_t D, void* packed);
  void (*scores[4])(const ClusterScores&);
};

#define SEQOPS_DECLARE(name)                   \
  namespace name {                             \
  extern const ClusterKernels cluster_kernels; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

}  // namespace seqops
