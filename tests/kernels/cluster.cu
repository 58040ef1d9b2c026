// Blocks of a cluster that write each other's shared memory. `forget` leaves out one synchronisation.
#include "common/gpu.h"

// T steps of h <- R h by one cluster of 4 blocks: each block owns 16 rows and sends its part of h to all.
//   p_r [64, 64] in · p_h [64] in and out
CLUSTER_KERNEL(cluster_recurrence, 64, 4)(const float* p_r, float* p_h, int64_t T, bool forget) {
  SHARED_STATIC(float, s_h, 2 * 64);  // two buffers: one is read while the other is written
  const int row = threadIdx.x / 4, part = threadIdx.x % 4, own = cluster_rank() * 16 + row;
  s_h[threadIdx.x] = p_h[threadIdx.x];
  __syncthreads();
  cluster_barrier();
  for (int64_t t = 0; t < T; ++t) {
    const float* old = s_h + t % 2 * 64;
    float sum = 0;
    for (int i = part; i < 64; i += 4) sum += p_r[own * 64 + i] * old[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    cluster_store(s_h + (t + 1) % 2 * 64 + own, part, sum);  // the four lanes of a row serve the four blocks
    if (!forget) cluster_barrier();
  }
  cluster_barrier();  // no block leaves while others may still write to its memory
  if (cluster_rank() == 0) p_h[threadIdx.x] = s_h[T % 2 * 64 + threadIdx.x];
}
EXPORT(cluster_recurrence)

// The same without cluster barriers: bytes that arrive are counted by an mbarrier of the block they arrive at.
CLUSTER_KERNEL(cluster_recurrence_async, 64, 4)(const float* p_r, float* p_h, int64_t T, bool forget) {
  SHARED_STATIC(float, s_h, 2 * 64);
  SHARED_STATIC(uint64_t, s_full, 2);   // of each buffer: 64 numbers have come
  SHARED_STATIC(uint64_t, s_empty, 2);  // of each buffer: all 4 blocks have read theirs
  const int row = threadIdx.x / 4, part = threadIdx.x % 4, own = cluster_rank() * 16 + row;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(s_full + i, 1);
      mbarrier_init(s_empty + i, 4);
    }
    mbarrier_init_fence();
  }
  s_h[threadIdx.x] = p_h[threadIdx.x];
  cluster_barrier();
  for (int64_t t = 0; t < T; ++t) {
    const int from = t % 2, to = 1 - from;
    if (threadIdx.x == 0) mbarrier_arrive_expect(s_full + to, 64 * sizeof(float));
    if (t > 0 && !forget) mbarrier_wait(s_full + from, (t - 1) / 2 % 2);
    float sum = 0;
    for (int i = part; i < 64; i += 4) sum += p_r[own * 64 + i] * s_h[from * 64 + i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    __syncthreads();
    if (threadIdx.x < 4) mbarrier_arrive_cluster(s_empty + from, threadIdx.x);
    if (t > 0) mbarrier_wait(s_empty + to, (t - 1) / 2 % 2);  // read in the step before
    cluster_store_async(s_h + to * 64 + own, s_full + to, part, sum);
  }
  if (T > 0) mbarrier_wait(s_full + T % 2, (T - 1) / 2 % 2);
  cluster_barrier();
  if (cluster_rank() == 0) p_h[threadIdx.x] = s_h[T % 2 * 64 + threadIdx.x];
}
EXPORT(cluster_recurrence_async)
