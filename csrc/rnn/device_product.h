// The product of the recurrent cells' CUDA kernels: the weights that a block holds times a step's inputs.
//
// A block owns UNITS units of its head. Its warps are UNIT_WARPS, each with the next GROUP units, times K_WARPS, which
// share their work: the sum in the forward, the outputs in the backward. Lane 4 g + q of a warp has units LANE_UNITS g
// and on of its group, of batch rows 2 q and 2 q + 1 of each tile of 8 rows. Units past the head's are computed with
// zeros. Rows are independent columns of the product, so NaN stays in one. Constants: see device.h.
#pragma once

#include "rnn/numbers.h"

// One block a multiprocessor may have all registers.
#if defined(SIMULATE)
#define BOUNDS THREADS
#else
#define BOUNDS THREADS, 1
#endif
#if EXCHANGE == 1
#define TEAM_KERNEL(name) CLUSTER_KERNEL(name, BOUNDS, BLOCKS)
#else
#define TEAM_KERNEL(name) KERNEL(name, BOUNDS)
#endif

constexpr int LANE_UNITS = NARROW ? 2 : 1;
constexpr int WARPS = UNIT_WARPS * K_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = 8 * LANE_UNITS;        // units of a warp
constexpr int UNITS = GROUP * UNIT_WARPS;    // of a block
constexpr int GROUPS = BLOCKS * UNIT_WARPS;  // of the head
constexpr int PADDED = GROUP * GROUPS;
constexpr int LANE_ROWS = 2 * TILES;
constexpr int VECS = LANE_UNITS / VEC;
constexpr int PART = NARROW ? 16 : 4;  // inputs of one part of a sum

static_assert(PADDED >= DIM && PADDED - DIM < UNITS, "every block has units");
static_assert(VEC == 1 || (VEC == LANE_UNITS && DIM % VEC == 0), "an access never leaves its head");

__device__ __forceinline__ int lane_group() { return threadIdx.x % 32 / 4; }  // g
__device__ __forceinline__ int lane_pair() { return threadIdx.x % 4; }        // q
__device__ __forceinline__ int unit_warp() { return threadIdx.x / 32 % UNIT_WARPS; }
__device__ __forceinline__ int k_warp() { return threadIdx.x / 32 / UNIT_WARPS; }
__device__ __forceinline__ int own_unit() { return unit_warp() * GROUP + LANE_UNITS * lane_group(); }  // of the block's

// Row 2 q + j of a tile, of lane row i = 2 tile + j.
__device__ __forceinline__ int tile_row(int i) { return i / 2 * 8 + 2 * lane_pair() + i % 2; }

// ------------------------------------------------------------------------------------------------ products

// OUT values a unit, each a sum over DEPTH inputs, computed CHUNK at a time. A chunk's sum over PART inputs is a part of
// the weights: the first K_REGS parts lie in registers, the next K_SHARED in shared memory, in the order in which lanes
// read them, and the others are read in every step: from global memory in that order or, where DIRECT, as r lies.
// `weight(out, unit, first, k)`, of input first + k, is 0 past the head's units.
template <int COUNT>
struct Sums {
  Number value[TILES][COUNT][LANE_UNITS][2];  // .., batch rows 2 q and 2 q + 1 of the tile
};

template <int OUT, int CHUNK, int DEPTH>
struct Parts {
  static constexpr int STEPS = DEPTH / PART;  // of a sum
  static constexpr int ALL = OUT / CHUNK * STEPS;
  static constexpr int KEPT = K_REGS < ALL ? K_REGS : ALL;
  static constexpr int HELD = K_SHARED < ALL - KEPT ? KEPT + K_SHARED : ALL;
  static constexpr int STREAMED = DIRECT ? 0 : ALL - HELD;
  static constexpr int CHUNKED = CHUNK;

  // So many of a sum's steps.
  static constexpr int within(int parts) { return parts < 0 ? 0 : parts < STEPS ? parts : STEPS; }
  static_assert(OUT % CHUNK == 0 && DEPTH % PART == 0);
};

// 16-bit numbers on tensor cores: A is the weights, a tile of 16 rows for each output, B the inputs of 8 batch rows.
// Row g of A is unit 2 g and row g + 8 is unit 2 g + 1, so that a lane's two units are neighbours in memory.
// ALL_DEPTH: of the inputs in shared memory, of which the product may take a part.
template <int OUT, int CHUNK, int DEPTH, int ALL_DEPTH>
struct MmaProduct : Parts<OUT, CHUNK, DEPTH> {
  using Layout = Parts<OUT, CHUNK, DEPTH>;
  using Layout::STEPS, Layout::KEPT, Layout::HELD, Layout::STREAMED, Layout::within;
  using Input = S;
  using Fragment = uint4;  // a lane's weights of one output
  // Elements of a row of inputs: 16 bytes more than its length, so that 8 rows lie in different banks.
  static constexpr int STRIDE = ALL_DEPTH + 8;
  static constexpr int INPUTS = 8 * TILES * STRIDE;

  uint32_t r_weights[KEPT ? KEPT : 1][CHUNK][4];
  const uint4* s_weights;   // [HELD - KEPT][WARPS][CHUNK][32]
  const uint4* p_streamed;  // [STREAMED][CHUNK][THREADS]

  template <class Weight>
  static __device__ __forceinline__ uint4 fragment(const Weight& weight, int part, int each) {
    const int out = part / STEPS * CHUNK + each, step = part % STEPS;
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int unit = own_unit() + i % 2, k = 2 * lane_pair() + 8 * (i / 2);
      a[i] = weight(out, unit, 16 * step, k).bits | uint32_t(weight(out, unit, 16 * step, k + 1).bits) << 16;
    }
    return make_uint4(a[0], a[1], a[2], a[3]);
  }

  // Takes from p_shared what it needs; at first, STAGE fragments a thread. p_workspace is the block's.
  template <int STAGE, class Weight>
  __device__ __forceinline__ void load(char*& p_shared, uint4* p_workspace, const Weight& weight) {
    uint4* const s_all = reinterpret_cast<uint4*>(p_shared);
    p_shared += sizeof(uint4) * CHUNK * THREADS * (HELD - KEPT);
    // Through shared memory, so that loops over loads need not be unrolled whole: the compiler would start them all at
    // once, and has no registers for their addresses.
    constexpr int TOGETHER = STAGE / CHUNK;
    static_assert(TOGETHER > 0);
    uint4* const s_stage = s_all + threadIdx.x;
#pragma unroll
    for (int first = 0; first < KEPT; first += TOGETHER) {
      const int fragments = CHUNK * (KEPT - first < TOGETHER ? KEPT - first : TOGETHER);
#pragma unroll 2
      for (int i = 0; i < fragments; ++i) s_stage[i * THREADS] = fragment(weight, first + i / CHUNK, i % CHUNK);
      __syncwarp();
#pragma unroll
      for (int part = first; part < first + TOGETHER; ++part) {
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
          if (part >= KEPT) continue;
          const uint4 word = s_stage[((part - first) * CHUNK + each) * THREADS];
          r_weights[part][each][0] = word.x, r_weights[part][each][1] = word.y;
          r_weights[part][each][2] = word.z, r_weights[part][each][3] = word.w;
        }
      }
      __syncwarp();
    }
    __syncthreads();
    const int own = threadIdx.x / 32 * CHUNK * 32 + threadIdx.x % 32;
#pragma unroll 2
    for (int i = 0; i < CHUNK * (HELD - KEPT); ++i) {
      s_all[(i / CHUNK * WARPS * CHUNK + i % CHUNK) * 32 + own] = fragment(weight, KEPT + i / CHUNK, i % CHUNK);
    }
    s_weights = s_all + own;
    p_streamed = p_workspace + threadIdx.x;
#pragma unroll 2
    for (int i = 0; i < CHUNK * STREAMED; ++i) {
      p_workspace[i * THREADS + threadIdx.x] = fragment(weight, HELD + i / CHUNK, i % CHUNK);
    }
  }

  // Outputs CHUNKTH x CHUNK and on, of inputs s_x [8 TILES][STRIDE].
  template <int CHUNKTH, class Weight>
  __device__ __forceinline__ void multiply(const S* s_x, const Weight& weight, Sums<CHUNK>& sums) const {
    float d[SPLIT][TILES][CHUNK][4];
#pragma unroll
    for (int i = 0; i < SPLIT * TILES * CHUNK * 4; ++i) (&d[0][0][0][0])[i] = 0;
    constexpr int FIRST = CHUNKTH * STEPS;  // part
    constexpr int IN_REGISTERS = within(KEPT - FIRST), HERE = within(HELD - FIRST);
    const S* const s_row = s_x + threadIdx.x % 8 * STRIDE + threadIdx.x % 32 / 8 * 8;
    uint32_t b[TILES][2][2];
    const auto inputs = [&](int step, bool both) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        if (both) {
          uint32_t four[4];
          ldmatrix_x4(four, s_row + tile * 8 * STRIDE + step * 16);
          b[tile][0][0] = four[0], b[tile][0][1] = four[1], b[tile][1][0] = four[2], b[tile][1][1] = four[3];
        } else {  // lanes 16 and on name no row
          ldmatrix_x2(b[tile][0], s_x + (tile * 8 + threadIdx.x % 8) * STRIDE + step * 16 + threadIdx.x % 16 / 8 * 8);
        }
      }
    };
#pragma unroll
    for (int step = 0; step < IN_REGISTERS; step += 2) {
      inputs(step, step + 1 < IN_REGISTERS);
#pragma unroll
      for (int i = 0; i < 2 && step + i < IN_REGISTERS; ++i) {
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            mma(d[(step + i) % SPLIT][tile][each], r_weights[FIRST + step + i][each], b[tile][i], S());
          }
        }
      }
    }
    // The others in loops, so that their loads take few registers: those of two steps are on their way together.
    const auto two_steps = [&](int step, bool both, const auto& read) {
      uint4 a[2][CHUNK];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
          if (i == 0 || both) a[i][each] = read(FIRST + step + i, each);
        }
      }
      inputs(step, both);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i == 1 && !both) continue;
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
          const uint32_t word[4] = {a[i][each].x, a[i][each].y, a[i][each].z, a[i][each].w};
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) mma(d[i % SPLIT][tile][each], word, b[tile][i], S());
        }
      }
    };
#pragma unroll 1
    for (int step = IN_REGISTERS; step < HERE; step += 2) {
      two_steps(step, step + 1 < HERE,
                [&](int part, int each) { return s_weights[((part - KEPT) * WARPS * CHUNK + each) * 32]; });
    }
#pragma unroll 1
    for (int step = HERE; step < STEPS; step += 2) {
      two_steps(step, step + 1 < STEPS, [&](int part, int each) { return streamed(part, each, weight); });
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int each = 0; each < CHUNK; ++each) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = d[0][tile][each][i];
#pragma unroll
          for (int split = 1; split < SPLIT; ++split) sum += d[split][tile][each][i];
          sums.value[tile][each][i / 2][i % 2] = sum;
        }
      }
    }
  }

  template <class Weight>
  __device__ __forceinline__ uint4 streamed(int part, int each, const Weight& weight) const {
    if constexpr (DIRECT) return fragment(weight, part, each);
    return p_streamed[((part - HELD) * CHUNK + each) * THREADS];
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
    mma_bf16_m16n8k16(d, a, b);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
    mma_f16_m16n8k16(d, a, b);
  }

  // Input k of a batch row of the block.
  static __device__ __forceinline__ S* input(S* s_x, int row, int k) { return s_x + row * STRIDE + k; }
  // Where inputs k and on begin.
  static __device__ __forceinline__ const S* from(const S* s_x, int k) { return s_x + k; }
};

// Wider numbers without: lane 4 g + q sums every fourth k, from q on, for all rows of its unit; then the four lanes of
// a unit exchange parts until each has whole sums of two rows. The order of additions is the same for every row.
template <int OUT, int CHUNK, int DEPTH, int ALL_DEPTH>
struct FmaProduct : Parts<OUT, CHUNK, DEPTH> {
  using Layout = Parts<OUT, CHUNK, DEPTH>;
  using Layout::STEPS, Layout::KEPT, Layout::HELD, Layout::STREAMED, Layout::within;
  using Input = Number;
  using Fragment = Number;
  static constexpr int INPUTS = 8 * TILES * ALL_DEPTH;

  Number r_weights[KEPT ? KEPT : 1][CHUNK];
  const Number* s_weights;   // [HELD - KEPT][WARPS][CHUNK][32]
  const Number* p_streamed;  // [STREAMED][CHUNK][THREADS]

  template <class Weight>
  static __device__ __forceinline__ Number fragment(const Weight& weight, int part, int each) {
    return weight(part / STEPS * CHUNK + each, own_unit(), 4 * (part % STEPS), lane_pair());
  }

  template <int STAGE, class Weight>
  __device__ __forceinline__ void load(char*& p_shared, Number* p_workspace, const Weight& weight) {
    Number* const s_all = reinterpret_cast<Number*>(p_shared);
    p_shared += sizeof(Number) * CHUNK * THREADS * (HELD - KEPT);
#pragma unroll
    for (int part = 0; part < KEPT; ++part) {
#pragma unroll
      for (int each = 0; each < CHUNK; ++each) r_weights[part][each] = fragment(weight, part, each);
      __syncwarp();  // so that the compiler does not start all loads at once
    }
    const int own = threadIdx.x / 32 * CHUNK * 32 + threadIdx.x % 32;
#pragma unroll 2
    for (int i = 0; i < CHUNK * (HELD - KEPT); ++i) {
      s_all[(i / CHUNK * WARPS * CHUNK + i % CHUNK) * 32 + own] = fragment(weight, KEPT + i / CHUNK, i % CHUNK);
    }
    s_weights = s_all + own;
    p_streamed = p_workspace + threadIdx.x;
#pragma unroll 2
    for (int i = 0; i < CHUNK * STREAMED; ++i) {
      p_workspace[i * THREADS + threadIdx.x] = fragment(weight, HELD + i / CHUNK, i % CHUNK);
    }
  }

  // s_x [TILES][ALL_DEPTH][8]
  template <int CHUNKTH, class Weight>
  __device__ __forceinline__ void multiply(const Number* s_x, const Weight& weight, Sums<CHUNK>& sums) const {
    constexpr int FIRST = CHUNKTH * STEPS;
    constexpr int IN_REGISTERS = within(KEPT - FIRST), HERE = within(HELD - FIRST);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      Number d[CHUNK][8];
#pragma unroll
      for (int i = 0; i < CHUNK * 8; ++i) (&d[0][0])[i] = 0;
      const Number* const s_own = s_x + (tile * ALL_DEPTH + lane_pair()) * 8;
      const auto add = [&](int step, const Number(&a)[CHUNK]) {
        // Two accesses of float, four of double, each the same for all units of the warp.
        const Pack<Number, 8> x = *reinterpret_cast<const Pack<Number, 8>*>(s_own + step * 32);
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
#pragma unroll
          for (int row = 0; row < 8; ++row) d[each][row] = multiply_add(a[each], x[row], d[each][row]);
        }
      };
#pragma unroll
      for (int step = 0; step < IN_REGISTERS; ++step) add(step, r_weights[FIRST + step]);
#pragma unroll 2
      for (int step = IN_REGISTERS; step < HERE; ++step) {
        Number a[CHUNK];
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
          a[each] = s_weights[((FIRST + step - KEPT) * WARPS * CHUNK + each) * 32];
        }
        add(step, a);
      }
#pragma unroll 4
      for (int step = HERE; step < STEPS; ++step) {
        Number a[CHUNK];
#pragma unroll
        for (int each = 0; each < CHUNK; ++each) {
          if constexpr (DIRECT) {
            a[each] = fragment(weight, FIRST + step, each);
          } else {
            a[each] = p_streamed[((FIRST + step - HELD) * CHUNK + each) * THREADS];
          }
        }
        add(step, a);
      }
      const bool upper = lane_pair() / 2, odd = lane_pair() % 2;
#pragma unroll
      for (int each = 0; each < CHUNK; ++each) {
        Number half[4];  // places 0, 1, 4, 5, or 2, 3, 6, 7
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int place = i / 2 * 4 + i % 2;
          const Number other = upper ? d[each][place] : d[each][place + 2];
          half[i] = (upper ? d[each][place + 2] : d[each][place]) + __shfl_xor_sync(~0u, other, 2);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Number other = odd ? half[2 * j] : half[2 * j + 1];
          sums.value[tile][each][0][j] = (odd ? half[2 * j + 1] : half[2 * j]) + __shfl_xor_sync(~0u, other, 1);
        }
      }
    }
  }

  // Row 2 q + j of a tile is at place 4 j + q, so that the same row of all four lanes makes whole accesses.
  static __device__ __forceinline__ Number* input(Number* s_x, int row, int k) {
    return s_x + (row / 8 * ALL_DEPTH + k) * 8 + row % 2 * 4 + row % 8 / 2;
  }
  static __device__ __forceinline__ const Number* from(const Number* s_x, int k) { return s_x + k * 8; }
};

template <bool MMA, int OUT, int CHUNK, int DEPTH, int ALL_DEPTH>
struct ProductOf {
  using type = MmaProduct<OUT, CHUNK, DEPTH, ALL_DEPTH>;
};
template <int OUT, int CHUNK, int DEPTH, int ALL_DEPTH>
struct ProductOf<false, OUT, CHUNK, DEPTH, ALL_DEPTH> {
  using type = FmaProduct<OUT, CHUNK, DEPTH, ALL_DEPTH>;
};
template <int OUT, int CHUNK, int DEPTH, int ALL_DEPTH>
using Product = typename ProductOf<NARROW, OUT, CHUNK, DEPTH, ALL_DEPTH>::type;
