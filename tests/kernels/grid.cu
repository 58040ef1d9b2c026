// Blocks that exchange data through global memory. `forget` leaves out the waiting.
#include "common/gpu.h"

// T steps of h <- R h by a cooperative grid of 4 blocks: two buffers and a grid barrier a step.
//   p_r [64, 64] in · p_h [2, 64] in and out · p_arrived [1] zero
KERNEL(grid_recurrence, 64)(const float* p_r, float* p_h, unsigned* p_arrived, int64_t T, bool forget) {
  const int row = threadIdx.x / 4, part = threadIdx.x % 4, own = blockIdx.x * 16 + row;
  unsigned total = 0;
  for (int64_t t = 0; t < T; ++t) {
    const volatile float* old = p_h + t % 2 * 64;
    float sum = 0;
    for (int i = part; i < 64; i += 4) sum += p_r[own * 64 + i] * old[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (part == 0) p_h[(t + 1) % 2 * 64 + own] = sum;
    if (forget) {
      __syncthreads();
    } else {
      grid_barrier(p_arrived, total);
    }
  }
}
EXPORT(grid_recurrence)

// Running total over the blocks: each waits for the one before it. Blocks take their number from a ticket, so that the
// one before has started; with `forget` they use blockIdx, which need not.
//   p_x [blocks, 32] in · p_y [blocks, 32] out
//   p_state [1 + blocks] zero: tickets, then a flag a block · p_sums [blocks] scratch
KERNEL(chained_sum, 32)(const float* p_x, float* p_y, unsigned* p_state, float* p_sums, bool forget) {
  SHARED_STATIC(unsigned, s_number, 1);
  if (threadIdx.x == 0) s_number[0] = forget ? blockIdx.x : atomicAdd(p_state, 1u);
  __syncthreads();
  const int64_t number = s_number[0];
  float sum = p_x[number * 32 + threadIdx.x];
  for (int distance = 1; distance < 32; distance *= 2) {
    const float left = __shfl_up_sync(~0u, sum, distance);
    if (threadIdx.x >= unsigned(distance)) sum += left;
  }
  float before = 0;
  if (number > 0) {
    while (load_acquire(p_state + number) == 0) spin_pause();
    before = static_cast<volatile float*>(p_sums)[number - 1];
  }
  p_y[number * 32 + threadIdx.x] = before + sum;
  if (threadIdx.x == 31) {
    p_sums[number] = before + sum;
    __threadfence();
    store_release(p_state + 1 + number, 1);
  }
}
EXPORT(chained_sum)
