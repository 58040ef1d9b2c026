// A scan of rows through registers, warp shuffles and shared memory. `forget` leaves out the barrier.
#include "common/gpu.h"

// h_t = a_t h_{t-1} + x_t, one row of T <= 4 * 256 steps a block.
//   p_a, p_x [B, T] in · p_h [B, T] out
KERNEL(scan_rows, 256)(const float* p_a, const float* p_x, float* p_h, int64_t T, bool forget) {
  SHARED_STATIC(float, s_a, 8);
  SHARED_STATIC(float, s_h, 8);
  constexpr int ITEMS = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = threadIdx.x * ITEMS, row = blockIdx.x * T;

  float r_a[ITEMS], r_h[ITEMS], product = 1, state = 0;  // this thread's steps, as if it started from 0
  for (int i = 0; i < ITEMS; ++i) {
    const bool inside = first + i < T;
    const float a = inside ? p_a[row + first + i] : 1.0f, x = inside ? p_x[row + first + i] : 0.0f;
    state = a * state + x;
    product *= a;
    r_a[i] = product;
    r_h[i] = state;
  }
  for (int distance = 1; distance < 32; distance *= 2) {  // inclusive scan of the warp
    const float left_a = __shfl_up_sync(~0u, product, distance), left_h = __shfl_up_sync(~0u, state, distance);
    if (lane >= distance) {
      state = product * left_h + state;
      product *= left_a;
    }
  }
  if (lane == 31) {
    s_a[warp] = product;
    s_h[warp] = state;
  }
  if (!forget) __syncthreads();
  float carry = 0;  // the state with which this thread starts
  for (int w = 0; w < warp; ++w) carry = s_a[w] * carry + s_h[w];
  const float left_a = __shfl_up_sync(~0u, product, 1), left_h = __shfl_up_sync(~0u, state, 1);
  if (lane > 0) carry = left_a * carry + left_h;
  for (int i = 0; i < ITEMS; ++i) {
    if (first + i < T) p_h[row + first + i] = r_a[i] * carry + r_h[i];
  }
}
EXPORT(scan_rows)
