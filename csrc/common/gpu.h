// The one header that kernels include: the seam between them and the machine they run on.
//
// The same source is compiled by NVRTC for a GPU and, with -DSIMULATE, by a C++ compiler for the simulator. A kernel
// file reads
//
//   #include "common/gpu.h"
//   KERNEL(linear_scan_forward, THREADS)(const float* p_a, const float* p_x, float* p_h, int64_t T) { ... }
//   EXPORT(linear_scan_forward)
//
// Arguments are pointers, int64_t, float and bool only: seqops/core/launch.py packs them. Constants such as THREADS
// come as -D. Shared memory is declared through the macros below, first thing in the kernel or in a function it calls.
// Instructions have names in ptx.h, waiting in sync.h, storage types in dtype.h.
#pragma once

#if defined(SIMULATE)

#include "common/simulator.h"

#define KERNEL(name, threads)                         \
  inline constexpr unsigned name##_threads = threads; \
  inline constexpr unsigned name##_cluster = 0;       \
  inline void name
#define CLUSTER_KERNEL(name, threads, cluster)        \
  inline constexpr unsigned name##_threads = threads; \
  inline constexpr unsigned name##_cluster = cluster; \
  inline void name
#define EXPORT(name)                                                                                           \
  extern "C" __attribute__((visibility("default"))) const char* simulate_##name(                               \
      const unsigned* shape, size_t shared, int cooperative, unsigned seed, void** values) {                   \
    return simulator::run_exported([](void** given) { simulator::call(name, given); }, values, name##_threads, \
                                   name##_cluster, shape, shared, cooperative != 0, seed);                     \
  }
#define SHARED_DYNAMIC(type, name) type* name = static_cast<type*>(simulator::dynamic_shared())
#define SHARED_STATIC(type, name, size) \
  static const char name##_key = 0;     \
  type* name = static_cast<type*>(simulator::static_shared(&name##_key, sizeof(type) * (size)))

#else  // NVRTC or nvcc

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INFINITY __builtin_bit_cast(float, 0x7f800000u)
#define NAN __builtin_bit_cast(float, 0x7fffffffu)
#else
#include <cmath>
#include <cstdint>
#endif

#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
// cluster: how many blocks along x share their memory; more than 8 needs an attribute, which the launcher sets
#define CLUSTER_KERNEL(name, threads, cluster) \
  extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads) name
// The simulator's entry for Python; a GPU needs none.
#define EXPORT(name)
// All dynamic shared memory is one array: a kernel declares it once and divides it itself. The simulator promises an
// alignment of 16 bytes only, so that the end of the array meets a protected page.
#define SHARED_DYNAMIC(type, name)                               \
  extern __shared__ __align__(128) unsigned char shared_bytes[]; \
  type* name = reinterpret_cast<type*>(shared_bytes)
#define SHARED_STATIC(type, name, size) __shared__ __align__(16) type name[size]

#endif

#include "common/dtype.h"
#include "common/ptx.h"
#include "common/sync.h"
