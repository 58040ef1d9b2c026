// Products with tensor cores. FORMAT is bf16, f16 or tf32; `forget` leaves out the wait for the copies.
#include "common/gpu.h"

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define MMA JOIN(mma_, FORMAT, _m16n8k16)

#if !defined(TF32)
// C [16, 8] = A [16, K] B^T, K a multiple of 16: two shared buffers filled by cp.async, ldmatrix, mma.
//   p_a [16, K], p_b [8, K] in · p_c [16, 8] out, 16-bit operands
KERNEL(tile_product, 32)(const uint16_t* p_a, const uint16_t* p_b, float* p_c, int64_t K, bool forget) {
  SHARED_DYNAMIC(uint16_t, s_tiles);  // [2, 16 + 8, 16]
  const int lane = threadIdx.x;
  auto fetch = [&](int64_t k, int buffer) {
    uint16_t* tile = s_tiles + buffer * 24 * 16;
    for (int i = lane; i < 48; i += 32) {  // 24 rows of two 16-byte pieces
      const int row = i / 2, piece = i % 2 * 8;
      cp_async_16(tile + row * 16 + piece, (row < 16 ? p_a + row * K : p_b + (row - 16) * K) + k + piece);
    }
    cp_async_commit();
  };
  float d[4] = {};
  fetch(0, 0);
  for (int64_t k = 0; k < K; k += 16) {
    const int buffer = k / 16 % 2;
    if (k + 16 < K) {
      fetch(k + 16, 1 - buffer);
      if (!forget) cp_async_wait<1>();
    } else {
      if (!forget) cp_async_wait<0>();
    }
    __syncwarp();
    const uint16_t* tile = s_tiles + buffer * 24 * 16;
    uint32_t r_a[4], r_b[2];
    ldmatrix_x4(r_a, tile + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x2(r_b, tile + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    MMA(d, r_a, r_b);
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) p_c[(lane / 4 + (i >= 2 ? 8 : 0)) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
EXPORT(tile_product)

// The same for one step of 16 with A [16, 16] and B [16, 8] stored by columns of the result: transposed loads.
//   p_a [16, 16] as [k, m], p_b [16, 8] as [k, n] in · p_c [16, 8] out
KERNEL(tile_product_transposed, 32)(const uint16_t* p_a, const uint16_t* p_b, float* p_c) {
  SHARED_STATIC(uint16_t, s_a, 256);
  SHARED_STATIC(uint16_t, s_b, 128);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) s_a[i] = p_a[i];
  for (int i = lane; i < 128; i += 32) s_b[i] = p_b[i];
  __syncwarp();
  uint32_t r_a[4], r_b[2];
  // matrices in the order of a's registers: rows 0, rows 8, columns 8 of rows 0, columns 8 of rows 8
  ldmatrix_x4_transposed(r_a, s_a + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  ldmatrix_x2_transposed(r_b, s_b + lane % 16 * 8);
  float d[4] = {};
  MMA(d, r_a, r_b);
  for (int i = 0; i < 4; ++i) p_c[(lane / 4 + (i >= 2 ? 8 : 0)) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
EXPORT(tile_product_transposed)

#else
// C [16, 8] = A [16, 8] B^T, B [8, 8], float32 rounded to tf32 by dropping bits.
KERNEL(tile_product_tf32, 32)(const uint32_t* p_a, const uint32_t* p_b, float* p_c) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  const uint32_t r_a[4] = {p_a[group * 8 + pair], p_a[(group + 8) * 8 + pair], p_a[group * 8 + pair + 4],
                           p_a[(group + 8) * 8 + pair + 4]};
  const uint32_t r_b[2] = {p_b[group * 8 + pair], p_b[group * 8 + pair + 4]};
  float d[4] = {};
  mma_tf32_m16n8k8(d, r_a, r_b);
  for (int i = 0; i < 4; ++i) p_c[(group + (i >= 2 ? 8 : 0)) * 8 + pair * 2 + i % 2] = d[i];
}
EXPORT(tile_product_tf32)
#endif
