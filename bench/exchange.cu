// What it costs blocks of threads to tell each other: rounds in which every block sends its slice to all, and goes on
// with what came from the next one (bench/exchange.py). Each way is that of a recurrent kernel, without its arithmetic.
//
//   THREADS of a block · WORDS of 16 bytes in a slice · CLUSTER blocks, where the kernel has clusters
//   p_out [blocks] out: where every thread of block b got the same from all words of its neighbour's slices, the number
//   1000 ((b + rounds) mod blocks) + rounds, which only complete and ordered rounds give; else all ones
#include "common/gpu.h"

constexpr unsigned WRONG = ~0u;

__device__ __forceinline__ uint4 spread(unsigned value) { return make_uint4(value, value, value, value); }

// The value of the round after this one, from a word of the neighbour's slice.
__device__ __forceinline__ unsigned next_value(const uint4& word) {
  return word.x == word.y && word.x == word.z && word.x == word.w && word.x != WRONG ? word.x + 1 : WRONG;
}

__device__ __forceinline__ void finish(unsigned* p_out, unsigned value) {
  SHARED_STATIC(unsigned, s_first, 1);
  if (threadIdx.x == 0) s_first[0] = value;
  __syncthreads();
  const int same = __syncthreads_and(s_first[0] == value);
  if (threadIdx.x == 0) p_out[blockIdx.x] = same ? value : WRONG;
}

// ---- one block: a slice for each warp, through shared memory

KERNEL(exchange_block, THREADS)(unsigned* p_out, int64_t rounds) {
  constexpr unsigned WARPS = THREADS / 32;
  SHARED_STATIC(uint4, s_slot, 2 * THREADS);
  const unsigned warp = threadIdx.x / 32, from = (warp + 1) % WARPS * 32 + threadIdx.x % 32;
  unsigned value = 1000 * warp;
  for (int64_t i = 0; i < rounds; ++i) {
    uint4* const s_round = s_slot + i % 2 * THREADS;
    s_round[threadIdx.x] = spread(value);
    __syncthreads();
    value = next_value(s_round[from]);
  }
  // of the warps, all of which stand for a block here
  value = value == 1000 * ((warp + unsigned(rounds)) % WARPS) + unsigned(rounds) ? unsigned(rounds) : WRONG;
  finish(p_out, value);
}
EXPORT(exchange_block)

// ---- a cluster

#if defined(CLUSTER)

CLUSTER_KERNEL(exchange_cluster_barrier, THREADS, CLUSTER)(unsigned* p_out, int64_t rounds) {
  SHARED_STATIC(uint4, s_slot, 2 * CLUSTER * WORDS);
  const unsigned rank = cluster_rank(), next = (rank + 1) % CLUSTER;
  unsigned value = 1000 * rank;
  cluster_barrier();
  for (int64_t i = 0; i < rounds; ++i) {
    uint4* const s_round = s_slot + i % 2 * CLUSTER * WORDS;
    for (unsigned k = threadIdx.x; k < CLUSTER * WORDS; k += THREADS) {
      *cluster_map(s_round + rank * WORDS + k % WORDS, k / WORDS) = spread(value);
    }
    cluster_barrier();
    value = next_value(s_round[next * WORDS + threadIdx.x % WORDS]);
  }
  finish(p_out, value);
}
EXPORT(exchange_cluster_barrier)

// Bytes that arrive are counted by the receiver's mbarrier; no barrier of the cluster in the loop.
CLUSTER_KERNEL(exchange_cluster_async, THREADS, CLUSTER)(unsigned* p_out, int64_t rounds) {
  SHARED_STATIC(uint4, s_slot, 2 * CLUSTER * WORDS);
  SHARED_STATIC(uint64_t, s_full, 2);
  const unsigned rank = cluster_rank(), next = (rank + 1) % CLUSTER;
  unsigned value = 1000 * rank;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(s_full + i, 1);
    mbarrier_init_fence();
  }
  cluster_barrier();
  for (int64_t i = 0; i < rounds; ++i) {
    uint4* const s_round = s_slot + i % 2 * CLUSTER * WORDS;
    if (threadIdx.x == 0) mbarrier_arrive_expect(s_full + i % 2, CLUSTER * WORDS * sizeof(uint4));
    for (unsigned k = threadIdx.x; k < CLUSTER * WORDS; k += THREADS) {
      cluster_store_async(s_round + rank * WORDS + k % WORDS, s_full + i % 2, k / WORDS, spread(value));
    }
    mbarrier_wait(s_full + i % 2, i / 2 % 2);
    value = next_value(s_round[next * WORDS + threadIdx.x % WORDS]);
    // All threads have read this round before the block sends the next, after which others may write over this one.
    __syncthreads();
  }
  cluster_barrier();  // no block leaves while others may still write to its memory
  finish(p_out, value);
}
EXPORT(exchange_cluster_async)

#endif

// ---- a cooperative grid, through the second cache
//   p_slots [2, blocks, WORDS] of 16 bytes · p_flags [blocks or 1] zero

KERNEL(exchange_grid_barrier, THREADS)(unsigned* p_out, uint4* p_slots, unsigned* p_flags, int64_t rounds) {
  const unsigned blocks = gridDim.x, rank = blockIdx.x, next = (rank + 1) % blocks;
  unsigned value = 1000 * rank, total = 0;
  for (int64_t i = 0; i < rounds; ++i) {
    uint4* const p_round = p_slots + i % 2 * blocks * WORDS;
    if (threadIdx.x < WORDS) p_round[rank * WORDS + threadIdx.x] = spread(value);
    grid_barrier(p_flags, total);
    value = next_value(__ldcg(p_round + next * WORDS + threadIdx.x % WORDS));
  }
  finish(p_out, value);
}
EXPORT(exchange_grid_barrier)

// One flag for each producer, which is released after its slice.
KERNEL(exchange_grid_flags, THREADS)(unsigned* p_out, uint4* p_slots, unsigned* p_flags, int64_t rounds) {
  const unsigned blocks = gridDim.x, rank = blockIdx.x, next = (rank + 1) % blocks;
  unsigned value = 1000 * rank;
  for (int64_t i = 0; i < rounds; ++i) {
    uint4* const p_round = p_slots + i % 2 * blocks * WORDS;
    if (threadIdx.x < WORDS) p_round[rank * WORDS + threadIdx.x] = spread(value);
    __syncthreads();
    if (threadIdx.x == 0) store_release(p_flags + rank, unsigned(i + 1));
    for (unsigned k = threadIdx.x; k < blocks; k += THREADS) wait_for_count(p_flags + k, unsigned(i + 1));
    __syncthreads();
    value = next_value(__ldcg(p_round + next * WORDS + threadIdx.x % WORDS));
  }
  finish(p_out, value);
}
EXPORT(exchange_grid_flags)

// Packets of 4 bytes and a tag, which every thread polls for itself.
//   p_packets [2, blocks, 4 WORDS] zero
KERNEL(exchange_grid_packets, THREADS)(unsigned* p_out, uint64_t* p_packets, int64_t rounds) {
  constexpr unsigned PACKETS = 4 * WORDS;
  SHARED_STATIC(unsigned, s_next, PACKETS);
  const unsigned blocks = gridDim.x, rank = blockIdx.x, next = (rank + 1) % blocks;
  unsigned value = 1000 * rank;
  for (int64_t i = 0; i < rounds; ++i) {
    uint64_t* const p_round = p_packets + i % 2 * blocks * PACKETS;
    const unsigned tag = unsigned(i + 1);
    for (unsigned k = threadIdx.x; k < PACKETS; k += THREADS) store_packet(p_round + rank * PACKETS + k, value, tag);
    for (unsigned k = threadIdx.x; k < blocks * PACKETS; k += THREADS) {
      const unsigned data = wait_for_packet(p_round + k, load_packet(p_round + k), tag);
      if (k / PACKETS == next) s_next[k % PACKETS] = data;
    }
    __syncthreads();
    const unsigned* const s_word = s_next + threadIdx.x % WORDS * 4;
    value = next_value(make_uint4(s_word[0], s_word[1], s_word[2], s_word[3]));
    __syncthreads();
  }
  finish(p_out, value);
}
EXPORT(exchange_grid_packets)
