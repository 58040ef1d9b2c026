// How warps of a block, and blocks of a head, put their work together between two steps of a recurrent cell.
//
//   Owners    the warps that finish a unit's sums and run its cell: each of the K_WARPS has other batch rows
//   Sum       adds what the K_WARPS have summed, in their order
//   Gather    forward: every block gets the new h of all units
//   Scatter   backward: every block gets from all blocks their part of the gradient of its units, added in their order
//
// EXCHANGE between blocks: 0 none, a block holds a head; 1 through the shared memory of a cluster; 2 through the second
// cache, between blocks of a cooperative launch. Inputs n, the n-th that blocks exchange, go to slot n % 2. A block sends
// n + 2 after it has received all of n + 1, which every other block sent after it had read n: a slot is never written
// while somebody reads it, and there is no barrier between blocks. Blocks send to themselves like to others: what a
// block waits for includes its own part, so that its warps too are done with n, and with the parts that Sum adds.
#pragma once

#include "rnn/device_product.h"

constexpr bool ALONE = EXCHANGE == 0, CLUSTERED = EXCHANGE == 1, OVER_GRID = EXCHANGE == 2;
static_assert(ALONE == (BLOCKS == 1), "one block exchanges nothing");

// The blocks of a head for the same batch rows; `first` teams were in earlier launches.
struct Team {
  int64_t index;  // of all
  int64_t place;  // in this launch
  int rank;

  __device__ __forceinline__ explicit Team(int64_t first)
      : index(first + blockIdx.x / BLOCKS), place(blockIdx.x / BLOCKS), rank(blockIdx.x % BLOCKS) {}
};

template <class Value>
__device__ __forceinline__ Value* take(char*& p_shared, int count) {
  Value* const taken = reinterpret_cast<Value*>(p_shared);
  p_shared += sizeof(Value) * count;
  return taken;
}

// f.operator()<i>() for i from FIRST to LAST - 1.
template <int FIRST, int LAST, class Function>
__device__ __forceinline__ void unrolled(const Function& f) {
  if constexpr (FIRST < LAST) {
    f.template operator()<FIRST>();
    unrolled<FIRST + 1, LAST>(f);
  }
}

// ------------------------------------------------------------------------------------------------ owners

constexpr int OWNERS = K_WARPS < LANE_ROWS ? K_WARPS : LANE_ROWS;
constexpr int OWNED = LANE_ROWS / OWNERS;  // of a lane's rows
constexpr int OWNER_THREADS = 32 * UNIT_WARPS * OWNERS;

static_assert(LANE_ROWS % OWNERS == 0 && (K_WARPS == 1 || UNIT_WARPS < 16), "rows to share, and barriers to name");

__device__ __forceinline__ bool is_owner() { return k_warp() < OWNERS; }
__device__ __forceinline__ int owned_row(int i) { return k_warp() * OWNED + i; }  // among LANE_ROWS

// COUNT values of every unit and row, from all warps to the owners.
template <int COUNT>
struct Sum {
  using Lane = Pack<Number, LANE_UNITS>;
  static constexpr int BYTES = K_WARPS > 1 ? sizeof(Lane) * COUNT * LANE_ROWS * THREADS : 0;

  Lane* s_parts;  // [K_WARPS][UNIT_WARPS][LANE_ROWS][COUNT][32]

  __device__ __forceinline__ explicit Sum(char*& p_shared) : s_parts(take<Lane>(p_shared, BYTES / sizeof(Lane))) {}

  __device__ __forceinline__ void add(const Sums<COUNT>& part, Number (&whole)[OWNED][COUNT][LANE_UNITS]) const {
    if constexpr (K_WARPS == 1) {
#pragma unroll
      for (int i = 0; i < OWNED; ++i) {
#pragma unroll
        for (int each = 0; each < COUNT; ++each) {
#pragma unroll
          for (int u = 0; u < LANE_UNITS; ++u) whole[i][each][u] = part.value[i / 2][each][u][i % 2];
        }
      }
      return;
    }
    const auto place = [&](int k, int row, int each) {
      return (((k * UNIT_WARPS + unit_warp()) * LANE_ROWS + row) * COUNT + each) * 32 + threadIdx.x % 32;
    };
#pragma unroll
    for (int row = 0; row < LANE_ROWS; ++row) {
#pragma unroll
      for (int each = 0; each < COUNT; ++each) {
        Lane lane;
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) lane[u] = part.value[row / 2][each][u][row % 2];
        s_parts[place(k_warp(), row, each)] = lane;
      }
    }
    if (!is_owner()) return named_barrier_arrive(1 + unit_warp(), 32 * K_WARPS);
    named_barrier_sync(1 + unit_warp(), 32 * K_WARPS);
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
#pragma unroll
      for (int each = 0; each < COUNT; ++each) {
#pragma unroll
        for (int u = 0; u < LANE_UNITS; ++u) whole[i][each][u] = 0;
#pragma unroll
        for (int k = 0; k < K_WARPS; ++k) {
          const Lane lane = s_parts[place(k, owned_row(i), each)];
#pragma unroll
          for (int u = 0; u < LANE_UNITS; ++u) whole[i][each][u] += lane[u];
        }
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ clusters

// Two barriers, at which the bytes of a slot arrive. Slot n % 2 is used for n > 0.
struct Arrivals {
  uint64_t* s_full;

  static constexpr int BYTES = CLUSTERED ? 16 : 0;

  __device__ __forceinline__ explicit Arrivals(char*& p_shared) : s_full(take<uint64_t>(p_shared, BYTES / 8)) {}

  // Then a cluster barrier, before anybody sends.
  __device__ __forceinline__ void begin(unsigned bytes) const {
    if (threadIdx.x != 0) return;
    for (int slot = 0; slot < 2; ++slot) mbarrier_init(s_full + slot, 1);
    mbarrier_init_fence();
    for (int slot = 0; slot < 2; ++slot) mbarrier_arrive_expect(s_full + slot, bytes);
  }
  // For `bytes` of n; as many are expected of n + 2, which nobody sends before all have them.
  __device__ __forceinline__ void wait(int n, unsigned bytes) const {
    mbarrier_wait(s_full + n % 2, (n - 1) / 2 % 2);
    if (threadIdx.x == 0) mbarrier_arrive_expect(s_full + n % 2, bytes);
  }
};

// ------------------------------------------------------------------------------------------------ forward

template <class Multiplier>
struct Gather {
  using Input = typename Multiplier::Input;
  using Item = Pack<Input, LANE_UNITS>;  // of a lane and row
  static constexpr int WORDS = sizeof(Item) / 4;
  static constexpr int RECEIVED = sizeof(Item) * 32 * LANE_ROWS * GROUPS;  // bytes
  static constexpr int PACKETS = 32 * WORDS * LANE_ROWS * GROUPS;
  static constexpr int BYTES = Arrivals::BYTES + 2 * Multiplier::INPUTS * sizeof(Input);

  Arrivals arrivals;
  Input* s_x;           // [2][INPUTS]
  uint64_t* p_packets;  // [2][GROUPS][LANE_ROWS][WORDS][32]
  int rank;

  __device__ __forceinline__ Gather(char*& p_shared, uint64_t* p_all, const Team& team)
      : arrivals(p_shared),
        s_x(take<Input>(p_shared, 2 * Multiplier::INPUTS)),
        p_packets(p_all + team.place * 2 * PACKETS),
        rank(team.rank) {}

  __device__ __forceinline__ Input* slot(int n) const { return s_x + n % 2 * Multiplier::INPUTS; }

  // Inputs 0: `first(row, k)` of the block's rows, the same for all blocks.
  template <int DEPTH, class First>
  __device__ __forceinline__ void begin(const First& first) const {
    for (int i = threadIdx.x; i < 8 * TILES * DEPTH; i += THREADS) {
      *Multiplier::input(slot(0), i / DEPTH, i % DEPTH) = first(i / DEPTH, i % DEPTH);
      *Multiplier::input(slot(1), i / DEPTH, i % DEPTH) = Input{};
    }
    if constexpr (CLUSTERED) {
      arrivals.begin(RECEIVED);
      cluster_barrier();
    }
  }

  // Inputs n of all units.
  __device__ __forceinline__ const Input* wait(int n) const {
    if (!CLUSTERED || n == 0) {
      if (OVER_GRID && n > 0) receive(n);
      __syncthreads();
    } else {
      arrivals.wait(n, RECEIVED);
    }
    return slot(n);
  }

  // Of this lane, inputs n of lane row `row`; by all lanes of the warp together.
  __device__ __forceinline__ void put(int n, int row, const Number (&value)[LANE_UNITS]) const {
    Item item;
#pragma unroll
    for (int u = 0; u < LANE_UNITS; ++u) item[u] = narrow<Input>(value[u]);
    if constexpr (ALONE) {
      *reinterpret_cast<Item*>(Multiplier::input(slot(n), tile_row(row), own_unit())) = item;
    } else {
      uint32_t words[WORDS];
      memcpy(words, &item, sizeof item);
      if constexpr (CLUSTERED) store_to_all(n, row, words);
      if constexpr (OVER_GRID) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
          const int group = rank * UNIT_WARPS + unit_warp();
          store_packet(packet(n, (group * LANE_ROWS + row) * WORDS + word), words[word], n);
        }
      }
    }
  }

 private:
  // A warp's row goes in accesses of 16 bytes, each made of the words of several lanes: PIECES of them to every block.
  __device__ __forceinline__ void store_to_all(int n, int row, const uint32_t (&words)[WORDS]) const {
    constexpr int PIECES = 8 * WORDS;
    const int lane = threadIdx.x % 32, piece = lane % PIECES;
    const int from = NARROW ? piece % 2 * 16 + piece / 2 : piece * (4 / WORDS);  // lane of its first word
    uint32_t whole[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      whole[i] = __shfl_sync(~0u, words[i % WORDS], from + i / WORDS * (NARROW ? 4 : 1));
    }
    Input* const own = Multiplier::input(slot(n), row / 2 * 8 + 2 * (from % 4) + row % 2,
                                         rank * UNITS + unit_warp() * GROUP + LANE_UNITS * (from / 4));
    const uint4 value = make_uint4(whole[0], whole[1], whole[2], whole[3]);
#pragma unroll
    for (int each = 0; each < (BLOCKS * PIECES + 31) / 32; ++each) {
      const int turn = lane / PIECES + each * (32 / PIECES);
      if (turn < BLOCKS) cluster_store_async(own, arrivals.s_full + n % 2, (rank + turn) % BLOCKS, value);
    }
  }

  __device__ __forceinline__ uint64_t* packet(int n, int index) const {
    return p_packets + (n % 2 * (PACKETS / 32) + index) * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ void receive(int n) const {
    constexpr int TOGETHER = 8;  // on their way at once
    for (int first = threadIdx.x / 32; first < PACKETS / 32; first += TOGETHER * WARPS) {
      uint64_t seen[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) {
        if (first + i * WARPS < PACKETS / 32) seen[i] = load_packet(packet(n, first + i * WARPS));
      }
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) {
        const int index = first + i * WARPS, row = index / WORDS % LANE_ROWS, group = index / WORDS / LANE_ROWS;
        if (index >= PACKETS / 32) continue;
        Input* const to = Multiplier::input(slot(n), tile_row(row), group * GROUP + LANE_UNITS * lane_group());
        reinterpret_cast<uint32_t*>(to)[index % WORDS] = wait_for_packet(packet(n, index), seen[i], n);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ backward

// A warp computes, from the block's own inputs, its part of the gradients of a group in each of PER blocks.
constexpr int PER = BLOCKS / K_WARPS;

struct Scatter {
  using Lane = Pack<Number, 2 * LANE_UNITS>;  // of one tile: [LANE_UNITS][2 rows]
  static constexpr int WORDS = sizeof(Lane) / 4;
  static constexpr int LANES = 32 * TILES * UNIT_WARPS * BLOCKS;
  static constexpr int RECEIVED = sizeof(Lane) * LANES;
  static constexpr int BYTES = Arrivals::BYTES + (CLUSTERED ? 2 * RECEIVED : 0);

  Arrivals arrivals;
  Lane* s_lanes;        // [2][BLOCKS][UNIT_WARPS][TILES][32]
  uint64_t* p_packets;  // [2][BLOCKS][BLOCKS][UNIT_WARPS][TILES][WORDS][32]
  int rank;

  __device__ __forceinline__ Scatter(char*& p_shared, uint64_t* p_all, const Team& team)
      : arrivals(p_shared),
        s_lanes(take<Lane>(p_shared, CLUSTERED ? 2 * LANES : 0)),
        p_packets(p_all + team.place * 2 * BLOCKS * LANES * WORDS),
        rank(team.rank) {}

  __device__ __forceinline__ void begin() const {
    if constexpr (CLUSTERED) {
      arrivals.begin(RECEIVED);
      cluster_barrier();
    }
  }

  // The block that output `out` of this warp belongs to: blocks begin with different ones.
  static __device__ __forceinline__ int block_of(int out, int rank) { return k_warp() * PER + (out + rank) % PER; }

  __device__ __forceinline__ void send(int n, int block, int tile, const Number (&value)[LANE_UNITS][2]) const {
    const int own = unit_warp() * TILES + tile, lane = threadIdx.x % 32;
    Lane lanes;
    memcpy(&lanes, value, sizeof lanes);
    if constexpr (CLUSTERED) {
      typename Word<sizeof(Lane)>::type whole;
      memcpy(&whole, &lanes, sizeof lanes);
      Lane* const to = s_lanes + ((n % 2 * BLOCKS + rank) * UNIT_WARPS * TILES + own) * 32 + lane;
      cluster_store_async(to, arrivals.s_full + n % 2, block, whole);
    }
    if constexpr (OVER_GRID) {
      uint32_t words[WORDS];
      memcpy(words, &lanes, sizeof lanes);
#pragma unroll
      for (int word = 0; word < WORDS; ++word) store_packet(packet(n, block, rank, own, word), words[word], n);
    }
  }

  // Sums n of this warp's units over PER of the blocks.
  __device__ __forceinline__ void wait(int n, Sums<1>& sums) const {
    if constexpr (CLUSTERED) arrivals.wait(n, RECEIVED);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int own = unit_warp() * TILES + tile;
#pragma unroll
      for (int u = 0; u < LANE_UNITS; ++u) sums.value[tile][0][u][0] = sums.value[tile][0][u][1] = 0;
      constexpr int TOGETHER = CLUSTERED ? 1 : 4;  // on their way at once
#pragma unroll(CLUSTERED ? 4 : 1)
      for (int first = 0; first < PER; first += TOGETHER) {
        Lane lanes[TOGETHER];
        if constexpr (CLUSTERED) {
          const int block = k_warp() * PER + first;
          lanes[0] = s_lanes[((n % 2 * BLOCKS + block) * UNIT_WARPS * TILES + own) * 32 + threadIdx.x % 32];
        }
        if constexpr (OVER_GRID) receive(n, first, own, lanes);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
          if (first + i >= PER) continue;
#pragma unroll
          for (int u = 0; u < LANE_UNITS; ++u) {
#pragma unroll
            for (int j = 0; j < 2; ++j) sums.value[tile][0][u][j] += lanes[i][2 * u + j];
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ uint64_t* packet(int n, int to, int from, int own, int word) const {
    const int warp = ((n % 2 * BLOCKS + to) * BLOCKS + from) * UNIT_WARPS * TILES + own;
    return p_packets + (int64_t(warp) * WORDS + word) * 32 + threadIdx.x % 32;
  }
  template <int TOGETHER>
  __device__ __forceinline__ void receive(int n, int first, int own, Lane (&lanes)[TOGETHER]) const {
    uint64_t seen[TOGETHER][WORDS];
#pragma unroll
    for (int i = 0; i < TOGETHER * WORDS; ++i) {
      if (first + i / WORDS >= PER) continue;
      seen[i / WORDS][i % WORDS] = load_packet(packet(n, rank, k_warp() * PER + first + i / WORDS, own, i % WORDS));
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      if (first + i >= PER) continue;
      uint32_t words[WORDS];
#pragma unroll
      for (int word = 0; word < WORDS; ++word) {
        const uint64_t* const p = packet(n, rank, k_warp() * PER + first + i, own, word);
        words[word] = wait_for_packet(p, seen[i][word], n);
      }
      memcpy(&lanes[i], words, sizeof words);
    }
  }
};
