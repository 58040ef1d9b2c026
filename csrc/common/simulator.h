// The CPU simulator for CUDA C++, as kernels see it through gpu.h: every CUDA thread is a fibre, and every barrier,
// warp exchange, tensor-core instruction and asynchronous copy a function in plain C++. The runtime is simulator.cpp,
// compiled once; this header is all that a kernel's own translation unit compiles.
//
//   scheduling   one OS thread switches between fibres where they wait. Seed 0: in order; any other seed: a new random
//                order every round, and slow warps and blocks that often miss their turn, so that a result which
//                depends on who comes first changes with the seed.
//   live blocks  all at once for a cooperative launch; else one cluster (or block) at a time, and for seeds other than
//                0 one to four in random order. A kernel whose blocks wait for each other without a cooperative launch
//                stops here, as it may on a GPU, unless each waits only for blocks that took a ticket before it.
//   memory       shared memory starts as NaN (all bits one), and every array of it ends at a protected page: reading
//                what nobody wrote shows in the result, running past the end is reported with thread and byte.
//   deadlock     when no thread can go on, the launch fails, saying which threads wait for what, at which line.
//
// Not modelled: weak memory order between unsynchronised threads, bank conflicts, registers, speed, fast-math rounding.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simulator __attribute__((visibility("default"))) {

  // ---- what a kernel's code needs to know of the launch

  struct Where {
    const char* file;
    int line;
  };
#define SIMULATOR_HERE simulator::Where where = {__builtin_FILE(), __builtin_LINE()}

  struct Slot {  // what a lane shows to the other lanes of its warp
    alignas(16) char bytes[64];
  };

  struct Thread {
    dim3 index, block_index;
    unsigned linear = 0;
    Slot* slots = nullptr;  // [32], of its warp

    unsigned lane() const { return linear % 32; }
  };

  extern Thread* current;
  extern dim3 block_size, grid_size;

  // Ends the launch with "thread .. of block ..: <what> at <file>:<line>: <message>".
  [[noreturn]] void fail(const char* what, Where where, const char* message);

  // Calls a kernel with arguments given as cuLaunchKernel gets them: an array of pointers to the values.
  template <class... Arguments>
  void call(void (*kernel)(Arguments...), void** values) {
    [&]<size_t... I>(std::index_sequence<I...>) {
      kernel(*static_cast<std::decay_t<Arguments>*>(values[I])...);
    }(std::index_sequence_for<Arguments...>());
  }

  // The C entry of an exported kernel: null, or what went wrong. `threads` and `cluster` are the kernel's own bounds
  // (cluster 0: any), `shape` is what the launch asks for: grid x y z, block x y z, cluster.
  const char* run_exported(void (*body)(void**), void** values, unsigned threads, unsigned cluster,
                           const unsigned* shape, size_t shared, bool cooperative, unsigned seed);

  // ---- memory

  void* dynamic_shared();
  void* static_shared(const void* key, size_t bytes);
  void* cluster_address(const void* own, unsigned rank, const char* what, Where where);

  // Reports an address that is not `bytes` bytes of this block's shared memory, or not aligned to as many.
  void check_shared(const void* address, size_t bytes, const char* what, Where where);

  void copy_async(void* shared, const void* global, size_t bytes, size_t present, Where where);
  void copy_async_commit();
  void copy_async_wait(unsigned newer);

  // ---- waiting

  void block_barrier(Where where);
  bool block_barrier_any(bool predicate, Where where);
  unsigned block_barrier_count(bool predicate, Where where);
  void named_barrier(int id, unsigned threads, bool wait, Where where);
  void cluster_arrive(Where where);
  void cluster_wait(Where where);
  unsigned cluster_rank();
  unsigned cluster_size();
  void mbarrier_init(uint64_t* barrier, unsigned count, Where where);
  void mbarrier_arrive(uint64_t* barrier, unsigned bytes, Where where);  // bytes: still to come in this phase
  void mbarrier_complete(uint64_t* barrier, unsigned bytes, Where where);
  bool mbarrier_test(const uint64_t* barrier, unsigned parity, Where where);
  void mbarrier_wait(const uint64_t* barrier, unsigned parity, Where where);
  void spin(const char* what, Where where);
  void made_progress();

  // ---- warps

  // Returns when every lane of `mask` has called with the same mask for the same instruction; gives the lanes present.
  uint32_t meet(uint32_t mask, const char* what, Where where);

  template <class Value>
  const Value& shown(unsigned lane) {
    return *reinterpret_cast<const Value*>(current->slots[lane].bytes);
  }

  // Every lane shows `value`; `read(present)` sees all of them through shown<Value>(lane).
  template <class Value, class Read>
  auto exchange(uint32_t mask, const char* what, Where where, const Value& value, Read read) {
    static_assert(sizeof(Value) <= sizeof(Slot::bytes));
    memcpy(current->slots[current->lane()].bytes, &value, sizeof value);
    const uint32_t present = meet(mask, what, where);
    auto result = read(present);
    meet(mask, what, where);  // nobody shows something new before all have read
    return result;
  }

  // `lane` is the one to read, or -1 for the caller's own.
  template <class Value>
  Value from_lane(uint32_t mask, const char* what, Where where, Value value, int lane) {
    static_assert(std::is_arithmetic_v<Value>, "shuffles move single numbers");
    return exchange(mask, what, where, value, [&](uint32_t present) {
      if (lane < 0) return value;
      if (!(present >> lane & 1)) fail(what, where, "reads a lane that takes no part");
      return shown<Value>(lane);
    });
  }

  template <class Value, class Combine>
  Value over_lanes(uint32_t mask, const char* what, Where where, Value value, Combine combine) {
    return exchange(mask, what, where, value, [&](uint32_t present) {
      Value result = value;
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (present >> lane & 1 && lane != current->lane()) result = combine(result, shown<Value>(lane));
      }
      return result;
    });
  }

  void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, const char* what, Where where);

  enum class Format { bf16, f16, tf32 };
  // d += a b with the fragments of mma.m16n8k16 (16-bit formats) or m16n8k8 (tf32), summed in float32.
  void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Format format, Where where);

}  // namespace simulator

// ------------------------------------------------------------------------------------------------ CUDA's own names

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define threadIdx (simulator::current->index)
#define blockIdx (simulator::current->block_index)
#define blockDim (simulator::block_size)
#define gridDim (simulator::grid_size)
#define warpSize 32

// ---- barriers and fences

inline void __syncthreads(SIMULATOR_HERE) { simulator::block_barrier(where); }
inline int __syncthreads_or(int predicate, SIMULATOR_HERE) { return simulator::block_barrier_any(predicate, where); }
inline int __syncthreads_and(int predicate, SIMULATOR_HERE) { return !simulator::block_barrier_any(!predicate, where); }
inline int __syncthreads_count(int predicate, SIMULATOR_HERE) {
  return int(simulator::block_barrier_count(predicate, where));
}
inline void __syncwarp(uint32_t mask = ~0u, SIMULATOR_HERE) { simulator::meet(mask, "__syncwarp", where); }
inline void __threadfence_block() {}
inline void __threadfence() {}

inline void __nanosleep(unsigned, SIMULATOR_HERE) { simulator::spin("__nanosleep", where); }
[[noreturn]] inline void __trap(SIMULATOR_HERE) { simulator::fail("__trap", where, "reached"); }

// ---- shuffles and votes

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int lane, int width = 32, SIMULATOR_HERE) {
  const int own = int(simulator::current->lane());
  return simulator::from_lane(mask, "__shfl_sync", where, value, (own & ~(width - 1)) | (lane & (width - 1)));
}
template <class Value>
Value __shfl_up_sync(uint32_t mask, Value value, unsigned delta, int width = 32, SIMULATOR_HERE) {
  const int own = int(simulator::current->lane()), lane = own - int(delta);
  return simulator::from_lane(mask, "__shfl_up_sync", where, value, lane >= (own & ~(width - 1)) ? lane : -1);
}
template <class Value>
Value __shfl_down_sync(uint32_t mask, Value value, unsigned delta, int width = 32, SIMULATOR_HERE) {
  const int own = int(simulator::current->lane()), lane = own + int(delta);
  return simulator::from_lane(mask, "__shfl_down_sync", where, value, lane <= (own | (width - 1)) ? lane : -1);
}
template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int bits, int width = 32, SIMULATOR_HERE) {
  const int own = int(simulator::current->lane()), lane = own ^ bits;
  return simulator::from_lane(mask, "__shfl_xor_sync", where, value, lane <= (own | (width - 1)) ? lane : -1);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMULATOR_HERE) {
  const uint32_t own = uint32_t(predicate != 0) << simulator::current->lane();
  return simulator::over_lanes(mask, "__ballot_sync", where, own, [](uint32_t x, uint32_t y) { return x | y; });
}
inline int __any_sync(uint32_t mask, int predicate, SIMULATOR_HERE) {
  return simulator::over_lanes(mask, "__any_sync", where, int(predicate != 0), [](int x, int y) { return x | y; });
}
inline int __all_sync(uint32_t mask, int predicate, SIMULATOR_HERE) {
  return simulator::over_lanes(mask, "__all_sync", where, int(predicate != 0), [](int x, int y) { return x & y; });
}
#define SIMULATOR_REDUCE(name, type, combined)                                                        \
  inline type name(uint32_t mask, type value, SIMULATOR_HERE) {                                       \
    return simulator::over_lanes(mask, #name, where, value, [](type x, type y) { return combined; }); \
  }
SIMULATOR_REDUCE(__reduce_add_sync, unsigned, x + y)
SIMULATOR_REDUCE(__reduce_add_sync, int, int(unsigned(x) + unsigned(y)))
SIMULATOR_REDUCE(__reduce_min_sync, unsigned, x < y ? x : y)
SIMULATOR_REDUCE(__reduce_min_sync, int, x < y ? x : y)
SIMULATOR_REDUCE(__reduce_max_sync, unsigned, x > y ? x : y)
SIMULATOR_REDUCE(__reduce_max_sync, int, x > y ? x : y)
SIMULATOR_REDUCE(__reduce_and_sync, unsigned, x& y)
SIMULATOR_REDUCE(__reduce_or_sync, unsigned, x | y)
SIMULATOR_REDUCE(__reduce_xor_sync, unsigned, x ^ y)
#undef SIMULATOR_REDUCE

// ---- atomics: plain, since one thread runs; a spin that another thread's atomic ends has made progress

#define SIMULATOR_ATOMIC(name, changed)                           \
  template <class Value>                                          \
  Value name(Value* address, std::type_identity_t<Value> value) { \
    const Value old = *address;                                   \
    *address = changed;                                           \
    if (*address != old) simulator::made_progress();              \
    return old;                                                   \
  }
SIMULATOR_ATOMIC(atomicAdd, Value(old + value))
SIMULATOR_ATOMIC(atomicSub, Value(old - value))
SIMULATOR_ATOMIC(atomicMax, old > value ? old : value)
SIMULATOR_ATOMIC(atomicMin, old < value ? old : value)
SIMULATOR_ATOMIC(atomicExch, value)
SIMULATOR_ATOMIC(atomicAnd, Value(old& value))
SIMULATOR_ATOMIC(atomicOr, Value(old | value))
SIMULATOR_ATOMIC(atomicXor, Value(old ^ value))
SIMULATOR_ATOMIC(atomicInc, old >= value ? Value(0) : Value(old + 1))
SIMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : Value(old - 1))
#undef SIMULATOR_ATOMIC

template <class Value>
Value atomicCAS(Value* address, std::type_identity_t<Value> expected, std::type_identity_t<Value> value) {
  const Value old = *address;
  if (old == expected) {
    *address = value;
    simulator::made_progress();
  }
  return old;
}

// ---- vectors

#define SIMULATOR_VECTOR(type, name)                                                     \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMULATOR_VECTOR(float, float)
SIMULATOR_VECTOR(int, int)
SIMULATOR_VECTOR(unsigned, uint)
SIMULATOR_VECTOR(unsigned short, ushort)
#undef SIMULATOR_VECTOR
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- loads and stores with a hint for the caches

template <class Value>
Value __ldg(const Value* address) {
  return *address;
}
template <class Value>
Value __ldcs(const Value* address) {
  return *address;
}
template <class Value>
Value __ldcg(const Value* address) {
  return *address;
}
template <class Value>
void __stcs(Value* address, std::type_identity_t<Value> value) {
  *address = value;
}
template <class Value>
void __stcg(Value* address, std::type_identity_t<Value> value) {
  *address = value;
}

// ---- arithmetic: what NVRTC knows without a header and math.h does not

template <class Left, class Right>
constexpr std::common_type_t<Left, Right> max(Left a, Right b) {
  using Value = std::common_type_t<Left, Right>;
  if constexpr (std::is_floating_point_v<Value>)
    return Value(a) > Value(b) || Value(b) != Value(b) ? Value(a) : Value(b);
  return Value(a) > Value(b) ? Value(a) : Value(b);
}
template <class Left, class Right>
constexpr std::common_type_t<Left, Right> min(Left a, Right b) {
  using Value = std::common_type_t<Left, Right>;
  if constexpr (std::is_floating_point_v<Value>)
    return Value(a) < Value(b) || Value(b) != Value(b) ? Value(a) : Value(b);
  return Value(a) < Value(b) ? Value(a) : Value(b);
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int __float2int_rn(float x) { return int(rintf(x)); }

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
