// What the scan kernels share: how a carried state is walked through time, in two ways.
//
//   march   a thread owns VEC neighbouring channels of one row and walks all its steps: for many channels.
//   tiles   a block owns a few channels and some hundred steps, and the state travels between blocks: for few channels.
//
// Both are given an operation. With `carry` the state [VEC] of a thread's channels and `i` a step, counted in the order
// of the walk, an operation has
//
//   place(walk, b, lane)             the thread's row and channels, VEC * lane and on
//   BYTES, buffers(p)                shared memory for what a thread reads in a step; STEPS of them from p on
//   fetch(i, slot)                   begins to read a step into a slot, read(slot) gives it as Raw
//   step(i, raw, carry, ending)      carry after the step; stores what the step gives. ending: the sequence whose last
//                                    step it is, or -1
//   State initial(n, v)              the state before sequence n, channel v of the thread
//   finish(n, carry)                 stores the state after sequence n
//   Map                              the effect of several steps on the state of a channel, and for tiles
//   Map::Running, extend(raw, running)   builds it step by step
//   SUMS, sum[SUMS]                  sums over the steps of a thread, given to store_sums(row, lane, sum); or 0
//
// Constants: VEC channels a thread · STEPS that a thread reads ahead (march) or holds (tiles) · THREADS a block.
// Letters: B batch, T time, C channels, N packed sequences.
#pragma once

#include "common/gpu.h"

// For KERNEL: a thread may have as many registers as one block a multiprocessor leaves it. How many blocks fit is known
// when THREADS and STEPS are chosen; a compiler that guesses at it now and then spills to make room for more.
#if defined(SIMULATE)
#define BOUNDS THREADS
#else
#define BOUNDS THREADS, 1
#endif

// ------------------------------------------------------------------------------------------------ numbers

template <class R>
__device__ __forceinline__ Complex<R> operator+(Complex<R> x, Complex<R> y) {
  return {x.re + y.re, x.im + y.im};
}

__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }
template <class R>
__device__ __forceinline__ Complex<R> multiply_add(R x, Complex<R> y, Complex<R> z) {
  return {multiply_add(x, y.re, z.re), multiply_add(x, y.im, z.im)};
}
template <class R>
__device__ __forceinline__ Complex<R> multiply_add(Complex<R> x, Complex<R> y, Complex<R> z) {
  return {multiply_add(x.re, y.re, multiply_add(-x.im, y.im, z.re)),
          multiply_add(x.re, y.im, multiply_add(x.im, y.re, z.im))};
}

__device__ __forceinline__ float multiply(float x, float y) { return x * y; }
__device__ __forceinline__ double multiply(double x, double y) { return x * y; }
template <class R>
__device__ __forceinline__ Complex<R> multiply(R x, Complex<R> y) {
  return {x * y.re, x * y.im};
}
template <class R>
__device__ __forceinline__ Complex<R> multiply(Complex<R> x, Complex<R> y) {
  return {multiply_add(x.re, y.re, -x.im * y.im), multiply_add(x.re, y.im, x.im * y.re)};
}

__device__ __forceinline__ float conjugate(float x) { return x; }
__device__ __forceinline__ double conjugate(double x) { return x; }
template <class R>
__device__ __forceinline__ Complex<R> conjugate(Complex<R> x) {
  return {x.re, -x.im};
}

__device__ __forceinline__ bool is_zero(float x) { return x == 0; }
__device__ __forceinline__ bool is_zero(double x) { return x == 0; }
template <class R>
__device__ __forceinline__ bool is_zero(Complex<R> x) {
  return x.re == 0 && x.im == 0;
}

// Infinity and NaN are the numbers that do not cancel themselves.
__device__ __forceinline__ bool is_finite(float x) { return x - x == 0; }
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0; }
template <class R>
__device__ __forceinline__ bool is_finite(Complex<R> x) {
  return is_finite(x.re) && is_finite(x.im);
}

template <class C>
struct Number {
  static __device__ __forceinline__ C from(C x) { return x; }
};
template <class R>
struct Number<Complex<R>> {
  static __device__ __forceinline__ Complex<R> from(R x) { return {x, 0}; }
};
template <class C>
__device__ __forceinline__ C number(Real<C> x) {
  return Number<C>::from(x);
}

// ------------------------------------------------------------------------------------------------ several steps

// carry -> a carry + x. An a of exactly 0 is a reset, which neither infinity nor NaN passes; a product of gates that
// underflows is therefore kept at the smallest normal number, and one that overflows leaves a carry of 0 alone.
//
// One rounded product stands for the same gates again and again where they do not vary: its error is a drift, which is
// lost where |a| < 1 forgets it, but not where complex gates only turn the state. Those are multiplied in double.
template <class A>
struct ProductType {
  using type = A;
  static __device__ __forceinline__ A from(A a) { return a; }
};
template <>
struct ProductType<complex64> {
  using type = complex128;
  static __device__ __forceinline__ complex128 from(complex64 a) { return {a.re, a.im}; }
};

template <class P>
struct StepsType {
  using type = P;
  static __device__ __forceinline__ P from(P a) { return a; }
  static __device__ __forceinline__ P to(P a) { return a; }
};
template <>
struct StepsType<float> {
  using type = double;
  static __device__ __forceinline__ double from(float a) { return a; }
  static __device__ __forceinline__ float to(double a) { return float(a); }
};

template <class P, class C>
__device__ __forceinline__ C apply(P product, C carry, C x) {
  return multiply_add(product, carry, x);
}
__device__ __forceinline__ complex64 apply(complex128 product, complex64 carry, complex64 x) {
  const complex128 sum = multiply_add(product, complex128{carry.re, carry.im}, complex128{x.re, x.im});
  return {float(sum.re), float(sum.im)};
}

template <class A, class C>
struct Affine {
  using Product = typename ProductType<A>::type;

  Product a;
  C x;

  static __device__ __forceinline__ Affine identity() { return {number<Product>(1), number<C>(0)}; }
  static __device__ __forceinline__ Affine constant(C state) { return {number<Product>(0), state}; }
  static __device__ __forceinline__ Affine held(C state) { return constant(state); }
  __device__ __forceinline__ C state() const { return x; }

  __device__ __forceinline__ C operator()(C carry) const {
    return is_zero(a) || (is_zero(carry) && !is_finite(a)) ? x : apply(a, carry, x);
  }

  // The same, while steps are added one by one. A product of float gates close below 1 would lose the same half unit at
  // every step: it is rounded once, at the end.
  struct Running {
    typename StepsType<Product>::type a;
    C x;
    bool cut;

    __device__ __forceinline__ void append(A gate, C input) {
      a = multiply(a, StepsType<Product>::from(ProductType<A>::from(gate)));
      x = is_zero(gate) ? input : multiply_add(gate, x, input);
      cut = cut || is_zero(gate);
    }
    __device__ __forceinline__ Affine map() const { return rounded(StepsType<Product>::to(a), x, cut); }
  };
  static __device__ __forceinline__ Running run(const Affine& map) {
    return {StepsType<Product>::from(map.a), map.x, is_zero(map.a)};
  }
  static __device__ __forceinline__ Affine rounded(Product a, C x, bool cut) {
    const Product smallest = number<Product>(Limits<Real<Product>>::SMALLEST_NORMAL);
    return {cut ? number<Product>(0) : is_zero(a) ? smallest : a, x};
  }

  // First this, then `newer`.
  __device__ __forceinline__ Affine then(const Affine& newer) const {
    return rounded(multiply(a, newer.a), newer(x), is_zero(a) || is_zero(newer.a));
  }
};

// ------------------------------------------------------------------------------------------------ sequences

// A tensor along the walk: where each step of it is.
template <class V>
struct Line {
  V* p;
  int64_t stride;

  __device__ __forceinline__ V* operator()(int64_t i) const { return p + i * stride; }
};

struct Span {  // a sequence and its steps, in the order of the walk
  int64_t n, begin, end;
};

// The steps of a batch row, or of the sequences packed into one: cu_seqlens [N + 1], null for a batch.
struct Walk {
  int64_t T, N;
  const int64_t* p_cu_seqlens;
  bool flip;  // the walk begins at the last step

  __device__ __forceinline__ int64_t time(int64_t i) const { return flip ? T - 1 - i : i; }
  template <class V>
  __device__ __forceinline__ Line<V> line(V* p, int64_t stride) const {
    return flip ? Line<V>{p + (T - 1) * stride, -stride} : Line<V>{p, stride};
  }

  // Nothing checks the values on a GPU: clamped, they may give wrong results but never a wrong address.
  __device__ __forceinline__ int64_t edge(int64_t n) const {
    const int64_t edge = p_cu_seqlens[n];
    return edge < 0 ? 0 : edge > T ? T : edge;
  }
  __device__ __forceinline__ Span turned(int64_t n, int64_t begin, int64_t end) const {
    return flip ? Span{n, T - end, T - begin} : Span{n, begin, end};
  }

  // Row `row` of the states.
  __device__ __forceinline__ Span span(int64_t row) const {
    if (p_cu_seqlens == nullptr) return {row, 0, T};
    const int64_t begin = edge(row), end = edge(row + 1);
    return turned(row, begin, end < begin ? begin : end);
  }

  // The sequence of step i < T, batch row b: the last one that begins at or before it.
  __device__ __forceinline__ Span find(int64_t i, int64_t b) const {
    if (p_cu_seqlens == nullptr) return {b, 0, T};
    const int64_t t = time(i);
    int64_t n = 0, above = N;
    while (above - n > 1) {
      const int64_t middle = n + (above - n) / 2;
      if (edge(middle) <= t) {
        n = middle;
      } else {
        above = middle;
      }
    }
    const int64_t begin = edge(n), end = edge(n + 1);
    return turned(n, begin > t ? t : begin, end <= t ? t + 1 : end);
  }
};

// ------------------------------------------------------------------------------------------------ reading

// Every thread reads what it needs itself, into slots of its own: no barrier between threads, and no registers.
// Each tensor has an array [STEPS][THREADS] of accesses, so that a warp's are next to each other.
template <class V>
__device__ __forceinline__ V* own_slots(char*& p_shared) {
  V* const slots = reinterpret_cast<V*>(p_shared) + threadIdx.x;
  p_shared += sizeof(V) * STEPS * THREADS;
  return slots;
}

// Visible after cp_async_wait; what cp.async cannot move, 2 bytes, is copied at once.
template <class S, int N>
__device__ __forceinline__ void copy_to_slot(Pack<S, N>& slot, const S* from) {
  constexpr int BYTES = sizeof(slot);
  if constexpr (BYTES == 2) slot = load<S, N>(from);
  if constexpr (BYTES == 4) cp_async_4(&slot, from);
  if constexpr (BYTES == 8) cp_async_8(&slot, from);
  if constexpr (BYTES >= 16) {
#pragma unroll
    for (int byte = 0; byte < BYTES; byte += 16) {
      cp_async_16(reinterpret_cast<char*>(&slot) + byte, reinterpret_cast<const char*>(from) + byte);
    }
  }
}

// ------------------------------------------------------------------------------------------------ many channels

// Thread q walks row q / lanes, channels VEC (q % lanes) and on. Shared memory: BYTES [STEPS][THREADS].
//
// What limits it is the memory's latency: a thread must have asked for the steps it will need in 0.8 us, and 132 SMs at
// 4.8 TB/s need 29 KB in flight each, twice that to be safe. With 64 x 2048 channels in 16 bits an SM has 124 threads;
// 16 steps ahead of two tensors are 512 bytes a thread, 63 KB an SM. Registers could not hold that without waiting for
// several steps at once (a warp has six counters of open loads), so copies are asynchronous: each thread waits for its
// own oldest ones, and no barrier is needed, since no thread reads what another has copied.
//
// TOGETHER: steps for which a thread waits at once, as there are few other warps to hide behind.
template <class Operation, int TOGETHER = 2>
__device__ __forceinline__ void march(Operation& operation, const Walk& walk, int64_t rows, int64_t lanes) {
  using Raw = typename Operation::Raw;
  static_assert(STEPS % TOGETHER == 0);
  SHARED_DYNAMIC(char, s_slots);
  const int64_t q = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (q >= rows * lanes) return;
  const int64_t row = q / lanes, lane = q % lanes;
  const Span span = walk.span(row);
  operation.place(walk, walk.p_cu_seqlens == nullptr ? row : 0, lane);

  typename Operation::State carry[VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) carry[v] = operation.initial(span.n, v);

  operation.buffers(s_slots);
  const auto fetch = [&](int64_t i, int slot) {
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
      if (i + k < span.end) operation.fetch(i + k, slot + k);
    }
    cp_async_commit();
  };
  for (int slot = 0; slot < STEPS; slot += TOGETHER) fetch(span.begin + slot, slot);
  int slot = 0;
  for (int64_t i = span.begin; i < span.end; i += TOGETHER) {
    cp_async_wait<STEPS / TOGETHER - 1>();
    Raw raw[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) raw[k] = operation.read(slot + k);
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
      if (i + k < span.end) operation.step(i + k, raw[k], carry, i + k + 1 == span.end ? span.n : -1);
    }
    fetch(i + STEPS, slot);
    slot = slot + TOGETHER == STEPS ? 0 : slot + TOGETHER;
  }
  operation.finish(span.n, carry);
  if constexpr (Operation::SUMS > 0) {
    if (operation.sums_over_time()) operation.store_sums(row, lane, operation.sum);
  }
}

// ------------------------------------------------------------------------------------------------ few channels

// A value that one block publishes and others wait for: every 32 bits of it travel with a flag in one 64-bit store, so
// neither side needs a fence. p_packets is zero before the launch.
template <class V>
struct Packet {
  static constexpr int WORDS = sizeof(V) / 4;
  uint64_t word[WORDS];

  // Packets [.., WORDS, channels]
  static __device__ __forceinline__ volatile uint64_t* place(uint64_t* p_packets, int64_t packet, int channels) {
    return p_packets + packet * WORDS * channels;
  }
  static __device__ __forceinline__ void publish(volatile uint64_t* place, int channels, const V& value) {
    uint32_t part[WORDS];
    memcpy(part, &value, sizeof value);
#pragma unroll
    for (int w = 0; w < WORDS; ++w) place[int64_t(w) * channels] = uint64_t(1) << 32 | part[w];
  }
  __device__ __forceinline__ void look(const volatile uint64_t* place, int channels) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) word[w] = place[int64_t(w) * channels];
  }
  __device__ __forceinline__ V wait(const volatile uint64_t* place, int channels) {
    while (true) {
      bool ready = true;
#pragma unroll
      for (int w = 0; w < WORDS; ++w) ready = ready && word[w] >> 32;
      if (ready) break;
      spin_pause();
      look(place, channels);
    }
    uint32_t part[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) part[w] = uint32_t(word[w]);
    V value;
    memcpy(&value, part, sizeof value);
    return value;
  }
};

// A block takes the next tile: `slices` x STEPS steps of `lanes` x VEC channels, thread = (slice, lane), lanes a power
// of two. Tiles are numbered time-major by a ticket, so every tile that a block waits for was taken before its own.
//
//   1  each thread reads its steps, all at once, and composes them into a Map
//   2  a thread for each channel composes the slices, and publishes the tile's Map for the later tiles of its group
//   3  the Maps of the earlier tiles of the group, and the state before the group, are gathered
//   4  a thread for each channel folds them, oldest first; in the last tile of a group it publishes the state after it;
//      then it walks the slices, so that each knows the state it starts from
//   5  each thread walks its steps again, now with the state, and stores
//
// The order of every fold depends on the sizes only, never on who came first. Products of gates are never multiplied
// across tiles.
//
// The sizes are chosen by seqops/scan/tiles.py. What speaks for and against (estimates, for an H200): 29 KB in flight an
// SM hide the latency; with two blocks of 64 KB loading may pause while one folds. The chain of states through the last
// tiles of the groups costs a write, a read and a fold, 0.6 us a group: 32 tiles of 96 KB in that time are 5.2 TB/s, above
// what the memory gives. With fewer tiles a group, one row of tiles would wait for its own chain; with more, the Maps read
// again would outweigh the tile. Many rows of tiles side by side share the wait, and groups are smaller.
//
// Workspace, all zero: ticket [1]; states [strips][groups]; maps [strips][tiles], packets of all channels of a tile.
// Shared memory: BYTES [STEPS][THREADS], Map [slices][channels], Map [group][channels], State [channels].
template <class Operation>
__device__ __forceinline__ void tiles(Operation& operation, const Walk& walk, int64_t B, int64_t C, int64_t lanes_64,
                                      int64_t group, uint64_t* p_workspace) {
  using Map = typename Operation::Map;
  using State = typename Operation::State;
  constexpr int LOOKS = sizeof(Map) <= 12 ? 4 : sizeof(Map) <= 16 ? 2 : 1;  // packets that a thread asks for at once

  const int lanes = int(lanes_64), slices = THREADS / lanes, channels = lanes * VEC;
  const int lane = threadIdx.x % lanes, slice = threadIdx.x / lanes;
  SHARED_DYNAMIC(char, s_slots);
  Map* const s_maps = reinterpret_cast<Map*>(s_slots + Operation::BYTES * STEPS * THREADS);
  Map* const s_before = s_maps + slices * channels;
  State* const s_state = reinterpret_cast<State*>(s_before + group * channels);
  SHARED_STATIC(unsigned, s_ticket, 1);

  if (threadIdx.x == 0) *s_ticket = atomicAdd(reinterpret_cast<unsigned*>(p_workspace), 1u);
  __syncthreads();
  const int64_t strips_of_row = (C + channels - 1) / channels, strips = B * strips_of_row;
  const int64_t strip = *s_ticket % unsigned(strips), tile = *s_ticket / unsigned(strips);  // the grid has 31 bits
  const int64_t block_t = int64_t(slices) * STEPS, n_tiles = (walk.T + block_t - 1) / block_t;
  const int64_t groups = (n_tiles + group - 1) / group;
  uint64_t* const p_states = p_workspace + 1;
  uint64_t* const p_maps = p_states + strips * groups * channels * Packet<State>::WORDS;

  const int64_t b = strip / strips_of_row, first_lane = strip % strips_of_row * lanes;
  const bool active = (first_lane + lane) * VEC < C;
  const int64_t begin = tile * block_t + int64_t(slice) * STEPS;
  const int left = !active || walk.T <= begin ? 0 : walk.T - begin < STEPS ? int(walk.T - begin) : STEPS;
  if (active) operation.place(walk, b, first_lane + lane);
  operation.buffers(s_slots);

  // 1
  for (int k = 0; k < left; ++k) operation.fetch(begin + k, k);
  cp_async_commit();
  const Span first_span = left > 0 ? walk.find(begin, b) : Span{0, 0, 0};
  const bool inside = first_span.begin < begin && begin + left < first_span.end;  // no sequence begins or ends here
  {
    typename Map::Running running[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) running[v] = Map::run(Map::identity());
    cp_async_wait<0>();
    if (inside) {
#pragma unroll 2
      for (int k = 0; k < left; ++k) operation.extend(operation.read(k), running);
    } else {
      Span span = first_span;
#pragma unroll 1
      for (int k = 0; k < left; ++k) {
        if (begin + k == span.end) span = walk.find(begin + k, b);
        if (begin + k == span.begin) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) running[v] = Map::run(Map::constant(operation.initial(span.n, v)));
        }
        operation.extend(operation.read(k), running);
      }
    }
#pragma unroll
    for (int v = 0; v < VEC; ++v) s_maps[slice * channels + lane * VEC + v] = running[v].map();
  }
  __syncthreads();

  // 2
  const int place_in_group = int(tile % group);
  const bool last_of_group = place_in_group == group - 1, last_of_all = tile == n_tiles - 1;
  if (!last_of_all) {
    for (int channel = threadIdx.x; channel < channels; channel += THREADS) {
      Map map = s_maps[channel];
      for (int s = 1; s < slices; ++s) map = map.then(s_maps[s * channels + channel]);
      if (last_of_group) {
        s_before[place_in_group * channels + channel] = map;  // behind those of the earlier tiles
      } else {
        Packet<Map>::publish(Packet<Map>::place(p_maps, strip * n_tiles + tile, channels) + channel, channels, map);
      }
    }
  }

  // 3
  const int wanted = place_in_group * channels;
  for (int first = threadIdx.x; first < wanted; first += THREADS * LOOKS) {
    Packet<Map> packet[LOOKS];
    const volatile uint64_t* place[LOOKS];
#pragma unroll
    for (int k = 0; k < LOOKS; ++k) {
      const int item = first + k * THREADS;
      if (item < wanted) {
        const int64_t earlier = tile - place_in_group + item / channels;
        place[k] = Packet<Map>::place(p_maps, strip * n_tiles + earlier, channels) + item % channels;
        packet[k].look(place[k], channels);
      }
    }
#pragma unroll
    for (int k = 0; k < LOOKS; ++k) {
      const int item = first + k * THREADS;
      if (item < wanted) s_before[item] = packet[k].wait(place[k], channels);
    }
  }
  for (int channel = threadIdx.x; channel < channels; channel += THREADS) {
    if (tile >= group) {
      const volatile uint64_t* place =
          Packet<State>::place(p_states, strip * groups + tile / group - 1, channels) + channel;
      Packet<State> packet;
      packet.look(place, channels);
      s_state[channel] = packet.wait(place, channels);
    } else {
      s_state[channel] = Map::identity().state();  // the first step of a row begins a sequence and replaces it
    }
  }
  __syncthreads();

  // 4
  for (int channel = threadIdx.x; channel < channels; channel += THREADS) {
    State carry = s_state[channel];
    for (int j = 0; j < place_in_group; ++j) carry = s_before[j * channels + channel](carry);
    if (last_of_group && !last_of_all) {
      const State after = s_before[place_in_group * channels + channel](carry);
      Packet<State>::publish(Packet<State>::place(p_states, strip * groups + tile / group, channels) + channel,
                             channels, after);
    }
    for (int s = 0; s < slices; ++s) {
      const Map map = s_maps[s * channels + channel];
      s_maps[s * channels + channel] = Map::held(carry);
      carry = map(carry);
    }
  }
  __syncthreads();

  // 5
  State carry[VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) carry[v] = s_maps[slice * channels + lane * VEC + v].state();
  if (inside) {
#pragma unroll 2
    for (int k = 0; k < left; ++k) operation.step(begin + k, operation.read(k), carry, -1);
  } else {
    Span span = first_span;
#pragma unroll 1
    for (int k = 0; k < left; ++k) {
      if (begin + k == span.end) span = walk.find(begin + k, b);
      if (begin + k == span.begin) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) carry[v] = operation.initial(span.n, v);
      }
      const bool last = begin + k + 1 == span.end;
      operation.step(begin + k, operation.read(k), carry, last ? span.n : -1);
      if (last) operation.finish(span.n, carry);
    }
  }

  if constexpr (Operation::SUMS > 0) {
    if (operation.sums_over_time()) {  // slices one after the other, by the threads of the first
      using Sum = typename Operation::Sum;
      constexpr int SUMS = Operation::SUMS;
      Sum* const s_sums = reinterpret_cast<Sum*>(s_maps);  // [slices][lanes][SUMS]
      __syncthreads();
#pragma unroll
      for (int v = 0; v < SUMS; ++v) s_sums[int(threadIdx.x) * SUMS + v] = operation.sum[v];
      __syncthreads();
      if (slice == 0 && active) {
        for (int s = 1; s < slices; ++s) {
#pragma unroll
          for (int v = 0; v < SUMS; ++v) operation.sum[v] = operation.sum[v] + s_sums[(s * lanes + lane) * SUMS + v];
        }
        operation.store_sums(tile * B + b, first_lane + lane, operation.sum);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ sums over lanes

// Over `width` lanes, a power of two: in a fixed order, the same in every lane.
__device__ __forceinline__ uint32_t lanes_around(int width) {
  const int lane = threadIdx.x % 32;
  return (width == 32 ? ~0u : (1u << width) - 1) << (lane & ~(width - 1));
}
template <class R>
__device__ __forceinline__ R sum_lanes(R value, int width) {
  for (int distance = 1; distance < width; distance *= 2) {
    value += __shfl_xor_sync(lanes_around(width), value, distance);
  }
  return value;
}
template <class R>
__device__ __forceinline__ Complex<R> sum_lanes(Complex<R> value, int width) {
  return {sum_lanes(value.re, width), sum_lanes(value.im, width)};
}
