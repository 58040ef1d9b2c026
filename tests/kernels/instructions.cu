// Every warp-wide, atomic and arithmetic function once, with results that a test computes by other means.
#include "common/gpu.h"

// p_x [32] in · p_y [COUNT, 32] out, one row a function
KERNEL(warp_functions, 32)(const int32_t* p_x, int32_t* p_y) {
  const int32_t x = p_x[threadIdx.x];
  const double wide = double(x) + 0.5;
  int row = 0;
  auto put = [&](int32_t value) { p_y[row++ * 32 + threadIdx.x] = value; };
  put(__shfl_sync(~0u, x, 5));
  put(__shfl_sync(~0u, x, threadIdx.x + 1, 8));
  put(__shfl_up_sync(~0u, x, 3));
  put(__shfl_up_sync(~0u, x, 3, 8));
  put(__shfl_down_sync(~0u, x, 3));
  put(__shfl_down_sync(~0u, x, 3, 8));
  put(__shfl_xor_sync(~0u, x, 17));
  put(int32_t(2 * __shfl_xor_sync(~0u, wide, 1)));
  put(int32_t(__ballot_sync(~0u, x > 0)));
  put(__any_sync(~0u, x > 1000));
  put(__all_sync(~0u, x < 1000));
  put(__reduce_add_sync(~0u, x));
  put(__reduce_max_sync(~0u, x));
  put(__reduce_min_sync(~0u, x));
  put(int32_t(__reduce_xor_sync(~0u, uint32_t(x))));
  const uint32_t half = threadIdx.x < 16 ? 0xFFFFu : 0xFFFF0000u;  // two groups of a warp at the same time
  put(__reduce_add_sync(half, x));
}
EXPORT(warp_functions)

// p_word [8], p_long [1], p_float [1]: what 64 threads leave there · p_votes [3, 64]
KERNEL(block_functions, 64)(uint32_t* p_word, uint64_t* p_long, float* p_float, int32_t* p_votes) {
  const unsigned i = threadIdx.x;
  atomicAdd(p_word + 0, i);
  atomicMax(p_word + 1, i);
  atomicMin(p_word + 2, i);
  atomicInc(p_word + 3, 9u);
  atomicOr(p_word + 4, 1u << i % 32);
  atomicCAS(p_word + 5, 7u, 42u);
  atomicExch(p_word + 6, 11u);
  atomicSub(p_word + 7, 1u);
  atomicAdd(reinterpret_cast<unsigned long long*>(p_long), (unsigned long long)(i) << 32);
  atomicAdd(p_float, 0.5f);
  p_votes[i] = __syncthreads_count(i % 3 == 0);
  p_votes[64 + i] = __syncthreads_or(i == 63);
  p_votes[128 + i] = __syncthreads_and(i < 63);
}
EXPORT(block_functions)

// p_x [n] in · p_y [COUNT, n] out, one block of 32 threads
KERNEL(arithmetic, 32)(const float* p_x, float* p_y, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += 32) {
    const float x = p_x[i];
    int row = 0;
    auto put = [&](float value) { p_y[row++ * n + i] = value; };
    put(expf(x));
    put(__expf(x));
    put(logf(x));
    put(log1pf(x));
    put(tanhf(x));
    put(exp2_approx(x));
    put(tanh_approx(x));
    put(reciprocal_approx(x));
    put(rsqrtf(x));
    put(fmaxf(x, 1.0f));
    put(max(x, 1.0f));
    put(min(x, 1.0f));
    put(fmaf(x, x, 1.0f));
    put(isfinite(x) && !isnan(x) && !isinf(x));
    put(__uint_as_float(__float_as_uint(x)));
    put(float(exp(double(x)) + log(double(x))));
    put(INFINITY * x);
    put(NAN);
    put(load_streaming(p_x + i) + __ldg(p_x + i));
    put(float(__popc(unsigned(i)) + __clz(int(i)) + __ffs(int(i))));
  }
  __syncthreads();
  if (threadIdx.x < n / 4) {
    const float4 four = load_streaming(reinterpret_cast<const float4*>(p_x) + threadIdx.x);
    store_streaming(reinterpret_cast<float4*>(p_y) + threadIdx.x, make_float4(four.w, four.z, four.y, four.x));
  }
}
EXPORT(arithmetic)

// Copies of every size, the zero-filled one too, each visible only after the wait.
//   p_x [32, 4] in · p_y [32, 4 + 2 + 1 + 4 + 1] out: the last one has the halves of x[1] in turn
KERNEL(copies, 32)(const float* p_x, float* p_y) {
  SHARED_STATIC(float, s_16, 128);
  SHARED_STATIC(float, s_8, 64);
  SHARED_STATIC(float, s_4, 32);
  SHARED_STATIC(float, s_fill, 128);
  SHARED_STATIC(uint32_t, s_2, 64);
  const int i = threadIdx.x;
  cp_async_16(s_16 + i * 4, p_x + i * 4);
  cp_async_commit();
  cp_async_8(s_8 + i * 2, p_x + i * 4);
  cp_async_4(s_4 + i, p_x + i * 4);
  cp_async_16_zero_fill(s_fill + i * 4, p_x + i * 4, i % 5 * 4);
  for (int half = 0; half < 2; ++half) {
    cp_async_2_of_word(s_2 + 2 * i + half, reinterpret_cast<const uint16_t*>(p_x + i * 4 + 1) + half);
  }
  cp_async_commit();
  cp_async_wait<1>();
  for (int k = 0; k < 4; ++k) p_y[i * 12 + k] = s_16[i * 4 + k];
  cp_async_wait<0>();
  for (int k = 0; k < 2; ++k) p_y[i * 12 + 4 + k] = s_8[i * 2 + k];
  p_y[i * 12 + 6] = s_4[i];
  for (int k = 0; k < 4; ++k) p_y[i * 12 + 7 + k] = s_fill[i * 4 + k];
  p_y[i * 12 + 11] = __uint_as_float((s_2[2 * i] & 0xFFFFu) | (s_2[2 * i + 1] & 0xFFFF0000u));
}
EXPORT(copies)

// p_order [blocks * threads]: the number at which each thread came
KERNEL(order, 64)(unsigned* p_count, int32_t* p_order) {
  p_order[blockIdx.x * 64 + threadIdx.x] = int32_t(atomicAdd(p_count, 1u));
}
EXPORT(order)

// p_y [z, y, x] of threads and blocks: the linear number of each
KERNEL(shapes, 24)(int64_t* p_y) {
  const int64_t block = blockIdx.x + gridDim.x * (blockIdx.y + int64_t(gridDim.y) * blockIdx.z);
  const int64_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  p_y[block * 24 + thread] = block * 1000 + thread;
}
EXPORT(shapes)
