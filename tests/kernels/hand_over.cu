// Warp 0 fills one buffer, warp 1 empties it. `forget` leaves out the wait for an empty buffer.
#include "common/gpu.h"

// Rows of 32 come out reversed, handed over by two mbarriers.
//   p_x [rounds, 32] in · p_y [rounds, 32] out
KERNEL(hand_over, 64)(const float* p_x, float* p_y, int64_t rounds, bool forget) {
  SHARED_STATIC(float, s_row, 32);
  SHARED_STATIC(uint64_t, s_full, 1);
  SHARED_STATIC(uint64_t, s_empty, 1);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(s_full, 32);
    mbarrier_init(s_empty, 32);
  }
  __syncthreads();
  for (int64_t i = 0; i < rounds; ++i) {
    if (threadIdx.x < 32) {
      if (!forget) mbarrier_wait(s_empty, (i + 1) % 2);  // passes at once in the first round
      s_row[lane] = p_x[i * 32 + lane];
      mbarrier_arrive(s_full);
    } else {
      mbarrier_wait(s_full, i % 2);
      p_y[i * 32 + lane] = s_row[31 - lane];
      mbarrier_arrive(s_empty);
    }
  }
}
EXPORT(hand_over)

// The same by named barriers: 1 for full, 2 for empty.
KERNEL(hand_over_named, 64)(const float* p_x, float* p_y, int64_t rounds, bool forget) {
  SHARED_STATIC(float, s_row, 32);
  const int lane = threadIdx.x % 32;
  for (int64_t i = 0; i < rounds; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0 && !forget) named_barrier_sync(2, 64);
      s_row[lane] = p_x[i * 32 + lane];
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
      p_y[i * 32 + lane] = s_row[31 - lane];
      if (i + 1 < rounds && !forget) named_barrier_arrive(2, 64);
    }
  }
}
EXPORT(hand_over_named)
