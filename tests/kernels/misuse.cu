// One mistake a kernel, each of which the simulator reports by name.
#include "common/gpu.h"

KERNEL(barrier_in_a_branch, 64)(const float* p_x, float* p_y) {
  if (p_x[threadIdx.x] > 0) {
    __syncthreads();
  } else {
    named_barrier_sync(1, 64);
  }
  p_y[threadIdx.x] = p_x[threadIdx.x];
}
EXPORT(barrier_in_a_branch)

KERNEL(two_barriers_in_branches, 64)(const float* p_x, float* p_y) {
  if (p_x[threadIdx.x] > 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p_y[threadIdx.x] = p_x[threadIdx.x];
}
EXPORT(two_barriers_in_branches)

KERNEL(half_a_warp, 32)(const float* p_x, float* p_y) {
  if (threadIdx.x < 16) p_y[threadIdx.x] = __shfl_sync(~0u, p_x[threadIdx.x], 0);
}
EXPORT(half_a_warp)

KERNEL(absent_lane, 32)(const float* p_x, float* p_y) {
  if (threadIdx.x < 16) p_y[threadIdx.x] = __shfl_sync(0xFFFFu, p_x[threadIdx.x], 16);
}
EXPORT(absent_lane)

KERNEL(different_shuffles, 32)(const float* p_x, float* p_y) {
  const float x = p_x[threadIdx.x];
  p_y[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(~0u, x, 0) : __shfl_xor_sync(~0u, x, 1);
}
EXPORT(different_shuffles)

KERNEL(past_dynamic, 32)(float* p_y) {
  SHARED_DYNAMIC(float, s_all);
  s_all[threadIdx.x + 1] = 1;  // 32 floats were asked for
  __syncwarp();
  p_y[threadIdx.x] = s_all[threadIdx.x];
}
EXPORT(past_dynamic)

KERNEL(past_static, 32)(float* p_y) {
  SHARED_STATIC(float, s_first, 32);
  SHARED_STATIC(float, s_second, 32);
  s_second[threadIdx.x] = 0;
  s_first[threadIdx.x + 4] = 1;
  __syncwarp();
  p_y[threadIdx.x] = s_first[threadIdx.x] + s_second[threadIdx.x];
}
EXPORT(past_static)

KERNEL(never_written, 32)(float* p_y, double* p_z) {
  SHARED_STATIC(float, s_static, 32);
  SHARED_STATIC(double, s_double, 32);
  SHARED_DYNAMIC(float, s_dynamic);
  p_y[threadIdx.x] = s_static[threadIdx.x];
  p_y[32 + threadIdx.x] = s_dynamic[threadIdx.x];
  p_z[threadIdx.x] = s_double[threadIdx.x];
}
EXPORT(never_written)

KERNEL(null_pointer, 32)(float* p_y) { p_y[threadIdx.x] = 1; }
EXPORT(null_pointer)

KERNEL(no_pointer, 32)(float* p_y) {
  float* address = reinterpret_cast<float*>(uintptr_t(1) << 63);
  address[threadIdx.x] = p_y[threadIdx.x];
}
EXPORT(no_pointer)

KERNEL(trap, 32)(float* p_y) {
  if (threadIdx.x == 3) __trap();
  p_y[threadIdx.x] = 1;
}
EXPORT(trap)

KERNEL(misaligned_vector, 32)(const float* p_x, float* p_y) {
  const float4 x = load_streaming(reinterpret_cast<const float4*>(p_x + 1));
  p_y[threadIdx.x] = x.x + x.y + x.z + x.w;
}
EXPORT(misaligned_vector)

KERNEL(misaligned_copy, 32)(const float* p_x, float* p_y) {
  SHARED_STATIC(float, s_x, 32 * 4 + 4);
  cp_async_16(s_x + threadIdx.x * 4 + 1, p_x);
  cp_async_commit();
  cp_async_wait<0>();
  p_y[threadIdx.x] = s_x[threadIdx.x];
}
EXPORT(misaligned_copy)

KERNEL(mbarrier_not_initialised, 32)(float* p_y) {
  SHARED_STATIC(uint64_t, s_barrier, 1);
  mbarrier_arrive(s_barrier);
  p_y[threadIdx.x] = 1;
}
EXPORT(mbarrier_not_initialised)

#if defined(SIMULATE)  // ptxas refuses it
KERNEL(large_array, 32)(float* p_y) {
  SHARED_STATIC(float, s_x, 12 * 1024 + 1);
  s_x[threadIdx.x] = 0;
  p_y[threadIdx.x] = s_x[threadIdx.x];
}
EXPORT(large_array)
#endif
