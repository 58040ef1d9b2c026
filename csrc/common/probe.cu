// What the tuner's hardware model is measured by (seqops/tune/probe.py), one thing a kernel. Each leaves a result beside
// its time, which is right only if it did what it is timed for. CLUSTER is given for sm_90 and later.
#include "common/gpu.h"

constexpr int UNROLL = 16;

// Does nothing: what is timed is its launch.
KERNEL(probe_nothing, 32)(int64_t) {}
EXPORT(probe_nothing)

// Keeps the stream busy, so that what is queued behind it starts without waiting for the host.
KERNEL(probe_delay, 32)(int64_t cycles) {
  const int64_t start = clock_cycles();
  while (clock_cycles() - start < cycles) spin_pause();
}
EXPORT(probe_delay)

// 16 rounds __syncthreads of 8 warps.
//   p_cycles [1] out
KERNEL(probe_sync, 256)(int64_t* p_cycles, int64_t rounds) {
  __syncthreads();
  const int64_t start = clock_cycles();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) __syncthreads();
  }
  const int64_t end = clock_cycles();
  if (threadIdx.x == 0) p_cycles[0] = end - start;
}
EXPORT(probe_sync)

// 16 rounds products of ones in each of CHAINS sums, of which each product waits for the one before in its sum.
//   p_cycles [warps] out · p_sums [threads] out: 256 rounds in every sum, and so their mean
template <int CHAINS>
__device__ __forceinline__ void multiply_ones(int64_t* p_cycles, float* p_sums, int64_t rounds) {
  constexpr uint32_t ONES = 0x3f803f80;  // two bfloat16
  const uint32_t r_a[4] = {ONES, ONES, ONES, ONES}, r_b[2] = {ONES, ONES};
  float d[CHAINS][4] = {};
  __syncthreads();
  const int64_t start = clock_cycles();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
#pragma unroll
      for (int chain = 0; chain < CHAINS; ++chain) mma_bf16_m16n8k16(d[chain], r_a, r_b);
    }
  }
  const int64_t end = clock_cycles();
  float sum = 0;
#pragma unroll
  for (int chain = 0; chain < CHAINS; ++chain) sum += (d[chain][0] + d[chain][1]) + (d[chain][2] + d[chain][3]);
  p_sums[threadIdx.x] = sum / (4 * CHAINS);
  if (threadIdx.x % 32 == 0) p_cycles[threadIdx.x / 32] = end - start;
}

// One warp, one sum: latency.
KERNEL(probe_mma_latency, 32)(int64_t* p_cycles, float* p_sums, int64_t rounds) {
  multiply_ones<1>(p_cycles, p_sums, rounds);
}
EXPORT(probe_mma_latency)

// Two warps with four sums each on every quarter of the multiprocessor: the tensor cores are never idle.
KERNEL(probe_mma_issue, 256)(int64_t* p_cycles, float* p_sums, int64_t rounds) {
  multiply_ones<4>(p_cycles, p_sums, rounds);
}
EXPORT(probe_mma_issue)

// A count goes to and fro between block 0 and block `partner` of a cooperative grid, by a flag each.
//   p_flags [65] zero; out: rounds in the first word and in the last
KERNEL(probe_flags, 32)(unsigned* p_flags, int64_t partner, int64_t rounds) {
  if (threadIdx.x > 0) return;
  unsigned *p_mine = p_flags, *p_other = p_flags + 64;  // not in one line
  if (blockIdx.x == 0) {
    for (int64_t i = 1; i <= rounds; ++i) {
      store_release(p_mine, unsigned(i));
      wait_for_count(p_other, unsigned(i));
    }
  } else if (blockIdx.x == partner) {
    for (int64_t i = 1; i <= rounds; ++i) {
      wait_for_count(p_mine, unsigned(i));
      store_release(p_other, unsigned(i));
    }
  }
}
EXPORT(probe_flags)

// Follows a chain of words, each the place of the next, past the first cache.
//   p_next [words] in · p_place [1] in and out: where to begin, and where it ends after so many steps
KERNEL(probe_chase, 32)(const unsigned* p_next, unsigned* p_place, int64_t steps) {
  if (threadIdx.x > 0) return;
  unsigned place = p_place[0];
  for (int64_t i = 0; i < steps; ++i) place = __ldcg(p_next + place);
  p_place[0] = place;
}
EXPORT(probe_chase)

// So many barriers of a cooperative grid.
//   p_arrived [1] zero; out: blocks * rounds
KERNEL(probe_grid, 256)(unsigned* p_arrived, int64_t rounds) {
  unsigned total = 0;
  for (int64_t i = 0; i < rounds; ++i) grid_barrier(p_arrived, total);
}
EXPORT(probe_grid)

#if defined(CLUSTER)

// A count goes to and fro between the first and the last block of a cluster, by a flag in the shared memory of each.
//   p_cycles [1] out · p_count [1] out: 2 rounds
CLUSTER_KERNEL(probe_hand_over, 32, CLUSTER)(int64_t* p_cycles, unsigned* p_count, int64_t rounds) {
  SHARED_STATIC(uint32_t, s_flag, 1);
  const unsigned rank = cluster_rank(), last = CLUSTER - 1;
  if (threadIdx.x == 0) s_flag[0] = 0;
  cluster_barrier();
  if (threadIdx.x == 0 && rank == 0) {
    const int64_t start = clock_cycles();
    for (int64_t i = 0; i < rounds; ++i) {
      cluster_store_flag(s_flag, last, unsigned(2 * i + 1));
      cluster_wait_for_flag(s_flag, unsigned(2 * i + 2));
    }
    p_cycles[0] = clock_cycles() - start;
    p_count[0] = s_flag[0];
  } else if (threadIdx.x == 0 && rank == last) {
    for (int64_t i = 0; i < rounds; ++i) {
      cluster_wait_for_flag(s_flag, unsigned(2 * i + 1));
      cluster_store_flag(s_flag, 0, unsigned(2 * i + 2));
    }
  }
  cluster_barrier();  // no block leaves while a flag may still come to its memory
}
EXPORT(probe_hand_over)

// Every block stores to its neighbour at once: 8 KB a round.
//   p_cycles [blocks] out · p_from [blocks] out: the rank whose numbers have come
CLUSTER_KERNEL(probe_stores, 256, CLUSTER)(int64_t* p_cycles, float* p_from, int64_t rounds) {
  SHARED_STATIC(float, s_data, 8 * 256);
  const unsigned rank = cluster_rank(), next = (rank + 1) % CLUSTER;
  cluster_barrier();
  const int64_t start = clock_cycles();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) cluster_store(s_data + k * 256 + threadIdx.x, next, float(rank));
  }
  cluster_barrier();
  const int64_t end = clock_cycles();
  float least = INFINITY, most = -INFINITY;
  for (int k = 0; k < 8; ++k) {
    least = fminf(least, s_data[k * 256 + threadIdx.x]);
    most = fmaxf(most, s_data[k * 256 + threadIdx.x]);
  }
  const int same = __syncthreads_and(least == most);
  if (threadIdx.x == 0) {
    p_cycles[blockIdx.x] = end - start;
    p_from[blockIdx.x] = same ? least : NAN;
  }
}
EXPORT(probe_stores)

// How many clusters are there at once, if each stays for so many cycles and there are enough of them.
//   p_live [2] zero; out: 0, and the most
CLUSTER_KERNEL(probe_clusters, 32, CLUSTER)(unsigned* p_live, int64_t cycles) {
  cluster_barrier();
  if (threadIdx.x == 0 && cluster_rank() == 0) {
    atomicMax(p_live + 1, atomicAdd(p_live, 1u) + 1u);
    const int64_t start = clock_cycles();
    while (clock_cycles() - start < cycles) spin_pause();
    atomicSub(p_live, 1u);
  }
  cluster_barrier();
}
EXPORT(probe_clusters)

#endif
