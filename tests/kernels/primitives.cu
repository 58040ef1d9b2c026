// What every kernel stands on, one thing a kernel: arguments, waiting for the grid, clusters of CLUSTER blocks, where that is given.
#include "common/gpu.h"

// y_i = i * scale, negative if asked; one argument of each kind.
//   p_y [n] out, float32
KERNEL(number_off, 128)(float* p_y, int64_t n, float scale, bool negative) {
  const int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (i < n) p_y[i] = (negative ? -scale : scale) * float(i);
}
EXPORT(number_off)

// In each of T rounds a block takes its right neighbour's number plus 1: blocks that run ahead take an old one.
//   p_y [2, blocks] in (row 0) and out (row T % 2), float32 · p_arrived [1] zero
KERNEL(pass_on_in_grid, 64)(float* p_y, unsigned* p_arrived, int64_t T) {
  unsigned total = 0;
  const int64_t next = (blockIdx.x + 1) % gridDim.x;
  for (int64_t t = 0; t < T; ++t) {
    const volatile float* p_old = p_y + t % 2 * gridDim.x;
    if (threadIdx.x == 0) p_y[(t + 1) % 2 * gridDim.x + blockIdx.x] = p_old[next] + 1;
    grid_barrier(p_arrived, total);
  }
}
EXPORT(pass_on_in_grid)

#if defined(CLUSTER)  // sm_80 has none

// The same inside each cluster, through the neighbour's shared memory.
//   p_y [blocks] in and out, float32
CLUSTER_KERNEL(pass_on_in_cluster, 64, CLUSTER)(float* p_y, int64_t T) {
  SHARED_STATIC(float, s_number, 2);
  const unsigned previous = (cluster_rank() + CLUSTER - 1) % CLUSTER;
  if (threadIdx.x == 0) s_number[0] = p_y[blockIdx.x];
  cluster_barrier();
  for (int64_t t = 0; t < T; ++t) {
    if (threadIdx.x == 0) cluster_store(s_number + (t + 1) % 2, previous, s_number[t % 2] + 1);
    cluster_barrier();
  }
  if (threadIdx.x == 0) p_y[blockIdx.x] = s_number[T % 2];
}
EXPORT(pass_on_in_cluster)

// Both in one launch: in each round first inside the cluster, then from cluster to cluster.
//   p_y [2, blocks] in (row 0) and out (row T % 2), float32 · p_arrived [1] zero
CLUSTER_KERNEL(pass_on_in_both, 64, CLUSTER)(float* p_y, unsigned* p_arrived, int64_t T) {
  SHARED_STATIC(float, s_number, 1);
  unsigned total = 0;
  const unsigned previous = (cluster_rank() + CLUSTER - 1) % CLUSTER;
  const int64_t next = (blockIdx.x + CLUSTER) % gridDim.x;
  for (int64_t t = 0; t < T; ++t) {
    const volatile float* p_old = p_y + t % 2 * gridDim.x;
    cluster_barrier();  // the number of the last round has been read
    if (threadIdx.x == 0) cluster_store(s_number, previous, p_old[next] + 1);
    cluster_barrier();
    if (threadIdx.x == 0) p_y[(t + 1) % 2 * gridDim.x + blockIdx.x] = s_number[0];
    grid_barrier(p_arrived, total);
  }
  cluster_barrier();
}
EXPORT(pass_on_in_both)

#endif
