// The product of the recurrent cells' CUDA kernels: the weights that a block holds times a step's inputs.
//
// Lane 4 g + q of warp w owns units LANE_UNITS (8 w + g) and on, of batch rows 2 q and 2 q + 1 of each tile of 8 rows,
// and gets all sums of these cells. Units past the head's are computed with zeros. Rows are independent columns of the
// product, so NaN stays in one. Constants: see device.h.
#pragma once

#include "common/gpu.h"

// For KERNEL: one block a multiprocessor may have all registers.
#if defined(SIMULATE)
#define BOUNDS THREADS
#else
#define BOUNDS THREADS, 1
#endif

using S = STORAGE;
using Number = Compute<S>;

constexpr bool NARROW = sizeof(S) == 2;  // multiplied by tensor cores
constexpr int LANE_UNITS = NARROW ? 2 : 1;
constexpr int WARPS = THREADS / 32;
constexpr int PADDED = 8 * LANE_UNITS * WARPS;
constexpr int LANE_ROWS = 2 * TILES;
constexpr int VECS = LANE_UNITS / VEC;

static_assert(THREADS % 32 == 0 && PADDED >= DIM && PADDED - DIM < 8 * LANE_UNITS, "a warp for each group of units");
static_assert(VEC == 1 || (VEC == LANE_UNITS && DIM % VEC == 0), "an access never leaves its head");

// ------------------------------------------------------------------------------------------------ numbers

// Of 16-bit sequences the fast forms, to 4e-5 of the value; NaN stays NaN in all of them.
__device__ __forceinline__ float exponential(float x) { return NARROW ? exp2_approx(x * 1.44269504f) : expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float sigmoid(float x) {
  return NARROW ? reciprocal_approx(1 + exponential(-x)) : 1 / (1 + expf(-x));
}
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  if (!NARROW) return tanhf(x);
  const float e = exponential(-2 * fabsf(x)), large = copysignf((1 - e) * reciprocal_approx(1 + e), x);
  return fabsf(x) < 0.125f ? x - x * x * x * 0.33333333f : large;  // where 1 - e would lose the digits
}
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
__device__ __forceinline__ float log_sigmoid(float x) { return (x < 0 ? x : 0) - log1pf(exponential(-fabsf(x))); }
__device__ __forceinline__ double log_sigmoid(double x) { return (x < 0 ? x : 0) - log1p(exp(-fabs(x))); }

__device__ __forceinline__ Number clamp(Number x, Number limit) { return x < -limit ? -limit : x > limit ? limit : x; }

__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }

// ------------------------------------------------------------------------------------------------ products

__device__ __forceinline__ int lane_group() { return threadIdx.x % 32 / 4; }  // g
__device__ __forceinline__ int lane_pair() { return threadIdx.x % 4; }        // q
__device__ __forceinline__ int first_unit() { return LANE_UNITS * (threadIdx.x / 32 * 8 + lane_group()); }

// Sums of OUT values a unit over DEPTH inputs. `weight(out, unit, first, k)`, of input first + k, is 0 past the head's
// units.
template <int OUT, int DEPTH>
struct Sums {
  Number value[TILES][OUT][LANE_UNITS][2];  // .., batch rows 2 q and 2 q + 1 of the tile
};

// 16-bit numbers on tensor cores: A is the weights, a tile of 16 rows for each output, B the inputs of 8 batch rows.
// Row g of A is unit 2 g and row g + 8 is unit 2 g + 1, so that a lane's two units are neighbours in memory.
template <int OUT, int DEPTH>
struct MmaProduct {
  static constexpr int STEPS = DEPTH / 16, KEPT = K_REGS < STEPS ? K_REGS : STEPS;
  // Elements of a row of inputs: 16 bytes more than the sum is long, so that 8 rows lie in different banks.
  static constexpr int STRIDE = DEPTH + 8;
  static constexpr int INPUTS = 8 * TILES * STRIDE;
  using Input = S;

  uint32_t r_weights[KEPT ? KEPT : 1][OUT][4];
  const uint4* s_weights;  // [STEPS - KEPT][WARPS][OUT][32]

  // Takes from p_shared what it needs, and STAGE words a thread behind that for a while.
  template <int STAGE, class Weight>
  __device__ __forceinline__ void load(char*& p_shared, const Weight& weight) {
    uint4* const s_all = reinterpret_cast<uint4*>(p_shared);
    p_shared += sizeof(uint4) * 32 * OUT * WARPS * (STEPS - KEPT);
    const auto fragment = [&](int step, int out) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int unit = first_unit() + i % 2, k = 2 * lane_pair() + 8 * (i / 2);
        a[i] = weight(out, unit, 16 * step, k).bits | uint32_t(weight(out, unit, 16 * step, k + 1).bits) << 16;
      }
      return make_uint4(a[0], a[1], a[2], a[3]);
    };
    // Through shared memory, so that loops over loads need not be unrolled: the compiler would start them all at once,
    // and has no registers for their addresses.
    constexpr int TOGETHER = STAGE / OUT;
    static_assert(TOGETHER > 0);
    uint4* const s_stage = reinterpret_cast<uint4*>(p_shared) + threadIdx.x;
#pragma unroll
    for (int first = 0; first < KEPT; first += TOGETHER) {
      const int parts = OUT * (KEPT - first < TOGETHER ? KEPT - first : TOGETHER);
#pragma unroll 1
      for (int i = 0; i < parts; ++i) s_stage[i * THREADS] = fragment(first + i / OUT, i % OUT);
      __syncwarp();
#pragma unroll
      for (int step = first; step < first + TOGETHER; ++step) {
#pragma unroll
        for (int out = 0; out < OUT; ++out) {
          if (step >= KEPT) continue;
          const uint4 word = s_stage[((step - first) * OUT + out) * THREADS];
          r_weights[step][out][0] = word.x, r_weights[step][out][1] = word.y;
          r_weights[step][out][2] = word.z, r_weights[step][out][3] = word.w;
        }
      }
      __syncwarp();
    }
    const int own = threadIdx.x / 32 * OUT * 32 + threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < OUT * (STEPS - KEPT); ++i) {
      s_all[(i / OUT * WARPS * OUT + i % OUT) * 32 + own] = fragment(KEPT + i / OUT, i % OUT);
    }
    s_weights = s_all + own;
  }

  // s_x [8 TILES][STRIDE]
  __device__ __forceinline__ void multiply(const S* s_x, Sums<OUT, DEPTH>& sums) const {
    float d[SPLIT][TILES][OUT][4];
#pragma unroll
    for (int i = 0; i < SPLIT * TILES * OUT * 4; ++i) (&d[0][0][0][0])[i] = 0;
    const S* const s_row = s_x + threadIdx.x % 8 * STRIDE + threadIdx.x % 32 / 8 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
      uint32_t b[TILES][2][2];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        if (step + 1 < STEPS) {
          uint32_t both[4];
          ldmatrix_x4(both, s_row + tile * 8 * STRIDE + step * 16);
          b[tile][0][0] = both[0], b[tile][0][1] = both[1], b[tile][1][0] = both[2], b[tile][1][1] = both[3];
        } else {  // lanes 16 and on name no row
          ldmatrix_x2(b[tile][0], s_x + (tile * 8 + threadIdx.x % 8) * STRIDE + step * 16 + threadIdx.x % 16 / 8 * 8);
        }
      }
#pragma unroll
      for (int each = 0; each < 2 && step + each < STEPS; ++each) {
#pragma unroll
        for (int out = 0; out < OUT; ++out) {
          uint32_t a[4];
          weights(step + each, out, a);
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) mma(d[(step + each) % SPLIT][tile][out], a, b[tile][each], S());
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int out = 0; out < OUT; ++out) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = d[0][tile][out][i];
#pragma unroll
          for (int split = 1; split < SPLIT; ++split) sum += d[split][tile][out][i];
          sums.value[tile][out][i / 2][i % 2] = sum;
        }
      }
    }
  }

  __device__ __forceinline__ void weights(int step, int out, uint32_t (&a)[4]) const {
    if (step < KEPT) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = r_weights[step][out][i];
    } else {
      const uint4 word = s_weights[((step - KEPT) * WARPS * OUT + out) * 32];
      a[0] = word.x, a[1] = word.y, a[2] = word.z, a[3] = word.w;
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
    mma_bf16_m16n8k16(d, a, b);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
    mma_f16_m16n8k16(d, a, b);
  }

  // The input k, and the next, of batch row 2 q + j of a tile.
  static __device__ __forceinline__ void put(S* s_x, int tile, int j, int k, const Number (&value)[2]) {
    const Pack<S, 2> pack = {narrow<S>(value[0]), narrow<S>(value[1])};
    *reinterpret_cast<Pack<S, 2>*>(s_x + (8 * tile + 2 * lane_pair() + j) * STRIDE + k) = pack;
  }
};

// Wider numbers without: lane 4 g + q sums every fourth k, from q on, for all rows of its unit; then the four lanes of
// a unit exchange parts until each has whole sums of two rows. The order of additions is the same for every row.
template <int OUT, int DEPTH>
struct FmaProduct {
  static constexpr int STEPS = DEPTH / 4, KEPT = K_REGS < STEPS ? K_REGS : STEPS;
  static constexpr int INPUTS = 8 * TILES * DEPTH;
  using Input = Number;

  Number r_weights[KEPT ? KEPT : 1][OUT];
  const Number* s_weights;  // [STEPS - KEPT][WARPS][OUT][32]

  template <int STAGE, class Weight>
  __device__ __forceinline__ void load(char*& p_shared, const Weight& weight) {
    Number* const s_all = reinterpret_cast<Number*>(p_shared);
    p_shared += sizeof(Number) * 32 * OUT * WARPS * (STEPS - KEPT);
#pragma unroll
    for (int step = 0; step < KEPT; ++step) {
#pragma unroll
      for (int out = 0; out < OUT; ++out) r_weights[step][out] = weight(out, first_unit(), 4 * step, lane_pair());
      __syncwarp();  // as above
    }
    const int own = threadIdx.x / 32 * OUT * 32 + threadIdx.x % 32;
    for (int step = KEPT; step < STEPS; ++step) {
#pragma unroll
      for (int out = 0; out < OUT; ++out) {
        s_all[((step - KEPT) * WARPS * OUT + out) * 32 + own] = weight(out, first_unit(), 4 * step, lane_pair());
      }
    }
    s_weights = s_all + own;
  }

  // s_x [TILES][DEPTH][8]
  __device__ __forceinline__ void multiply(const Number* s_x, Sums<OUT, DEPTH>& sums) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      Number d[OUT][8];
#pragma unroll
      for (int i = 0; i < OUT * 8; ++i) (&d[0][0])[i] = 0;
      const Number* const s_own = s_x + (tile * DEPTH + lane_pair()) * 8;
      const auto add = [&](int step, const Number(&a)[OUT]) {
        // Two accesses of float, four of double, each the same for all units of the warp.
        const Pack<Number, 8> x = *reinterpret_cast<const Pack<Number, 8>*>(s_own + step * 32);
#pragma unroll
        for (int out = 0; out < OUT; ++out) {
#pragma unroll
          for (int row = 0; row < 8; ++row) d[out][row] = multiply_add(a[out], x[row], d[out][row]);
        }
      };
#pragma unroll
      for (int step = 0; step < KEPT; ++step) add(step, r_weights[step]);
#pragma unroll 2
      for (int step = KEPT; step < STEPS; ++step) {
        Number a[OUT];
#pragma unroll
        for (int out = 0; out < OUT; ++out) a[out] = s_weights[((step - KEPT) * WARPS * OUT + out) * 32];
        add(step, a);
      }
      const bool upper = lane_pair() / 2, odd = lane_pair() % 2;
#pragma unroll
      for (int out = 0; out < OUT; ++out) {
        Number half[4];
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          const Number other = upper ? d[out][row] : d[out][row + 4];
          half[row] = (upper ? d[out][row + 4] : d[out][row]) + __shfl_xor_sync(~0u, other, 2);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const Number other = odd ? half[row] : half[row + 2];
          sums.value[tile][out][0][row] = (odd ? half[row + 2] : half[row]) + __shfl_xor_sync(~0u, other, 1);
        }
      }
    }
  }

  static __device__ __forceinline__ void put(Number* s_x, int tile, int j, int k, const Number (&value)[1]) {
    s_x[(tile * DEPTH + k) * 8 + 2 * lane_pair() + j] = value[0];
  }
};

template <bool MMA, int OUT, int DEPTH>
struct ProductOf {
  using type = MmaProduct<OUT, DEPTH>;
};
template <int OUT, int DEPTH>
struct ProductOf<false, OUT, DEPTH> {
  using type = FmaProduct<OUT, DEPTH>;
};
template <int OUT, int DEPTH>
using Product = typename ProductOf<NARROW, OUT, DEPTH>::type;
