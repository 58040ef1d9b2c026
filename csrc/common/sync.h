// Waiting for other threads: named barriers, clusters and their shared memory, mbarriers, other blocks of the grid.
// Each is here twice, as PTX and for the simulator, which checks its use.
#pragma once

// ---- barriers among some threads of a block: `id` 1 to 15 (0 is __syncthreads), `threads` a multiple of 32

#if defined(SIMULATE)
inline void named_barrier_arrive(int id, unsigned threads, SIMULATOR_HERE) {
  simulator::named_barrier(id, threads, false, where);
}
inline void named_barrier_sync(int id, unsigned threads, SIMULATOR_HERE) {
  simulator::named_barrier(id, threads, true, where);
}
#else
__device__ __forceinline__ void named_barrier_arrive(int id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_sync(int id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// ---- clusters: blocks that read and write each other's shared memory, for sm_90 and later
//
// Every thread of every block of the cluster arrives, then waits. No block may touch another's memory before the first
// barrier, nor leave while others may still touch its own.

#if defined(SIMULATE)
inline unsigned cluster_rank() { return simulator::cluster_rank(); }
inline unsigned cluster_size() { return simulator::cluster_size(); }
inline void cluster_arrive(SIMULATOR_HERE) { simulator::cluster_arrive(where); }
inline void cluster_wait(SIMULATOR_HERE) { simulator::cluster_wait(where); }
inline void cluster_barrier(SIMULATOR_HERE) {
  simulator::cluster_arrive(where);
  simulator::cluster_wait(where);
}
template <class Value>
Value* cluster_map(Value* own, unsigned rank, SIMULATOR_HERE) {  // the same place in the shared memory of block `rank`
  return static_cast<Value*>(simulator::cluster_address(own, rank, "cluster_map", where));
}
inline void cluster_store(float* own, unsigned rank, float value, SIMULATOR_HERE) {
  *static_cast<float*>(simulator::cluster_address(own, rank, "cluster_store", where)) = value;
}
inline void cluster_store(uint32_t* own, unsigned rank, uint32_t value, SIMULATOR_HERE) {
  *static_cast<uint32_t*>(simulator::cluster_address(own, rank, "cluster_store", where)) = value;
}
inline float cluster_load(const float* own, unsigned rank, SIMULATOR_HERE) {
  return *static_cast<const float*>(simulator::cluster_address(own, rank, "cluster_load", where));
}
inline void cluster_store_flag(uint32_t* own, unsigned rank, uint32_t value, SIMULATOR_HERE) {
  *static_cast<volatile uint32_t*>(simulator::cluster_address(own, rank, "cluster_store_flag", where)) = value;
  simulator::made_progress();
}
inline void cluster_wait_for_flag(const uint32_t* own, uint32_t value, SIMULATOR_HERE) {
  while (*static_cast<const volatile uint32_t*>(own) != value) simulator::spin("a flag from the cluster", where);
}
#else
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}
template <class Value>
__device__ __forceinline__ Value* cluster_map(Value* own, unsigned rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(own), "r"(rank));
  return reinterpret_cast<Value*>(mapped);
}
__device__ __forceinline__ unsigned cluster_address(const void* own, unsigned rank) {
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(own)), "r"(rank));
  return mapped;
}
__device__ __forceinline__ void cluster_store(float* own, unsigned rank, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(cluster_address(own, rank)), "f"(value) : "memory");
}
__device__ __forceinline__ void cluster_store(uint32_t* own, unsigned rank, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(own, rank)), "r"(value) : "memory");
}
__device__ __forceinline__ float cluster_load(const float* own, unsigned rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(cluster_address(own, rank)) : "memory");
  return value;
}
// A word that others wait for, and that orders nothing but itself.
__device__ __forceinline__ void cluster_store_flag(uint32_t* own, unsigned rank, uint32_t value) {
  asm volatile("st.relaxed.cluster.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(own, rank)), "r"(value)
               : "memory");
}
__device__ __forceinline__ void cluster_wait_for_flag(const uint32_t* own, uint32_t value) {
  uint32_t seen;
  do {
    asm volatile("ld.relaxed.cluster.shared::cta.u32 %0, [%1];" : "=r"(seen) : "r"(shared_address(own)) : "memory");
  } while (seen != value);
}
#endif

// ---- mbarrier, for sm_90 and later: 8 bytes of shared memory at which this block, or others of the cluster, arrive
//
// A phase ends when `count` arrivals have come and every byte they announced. Waiting for parity p returns once the
// phase of that parity has ended: phases count 0, 1, 0, ..; waiting for parity 1 on a fresh barrier returns at once.
// After mbarrier_init the block needs a barrier, the cluster mbarrier_init_fence and a cluster barrier, before use.

#if defined(SIMULATE)
inline void mbarrier_init(uint64_t* barrier, unsigned count, SIMULATOR_HERE) {
  simulator::mbarrier_init(barrier, count, where);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier, SIMULATOR_HERE) { simulator::mbarrier_arrive(barrier, 0, where); }
inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, SIMULATOR_HERE) {
  simulator::mbarrier_arrive(barrier, bytes, where);
}
inline void mbarrier_arrive_cluster(uint64_t* barrier, unsigned rank, SIMULATOR_HERE) {
  void* there = simulator::cluster_address(barrier, rank, "mbarrier_arrive_cluster", where);
  simulator::mbarrier_arrive(static_cast<uint64_t*>(there), 0, where);
}
inline bool mbarrier_test(uint64_t* barrier, unsigned parity, SIMULATOR_HERE) {
  return simulator::mbarrier_test(barrier, parity, where);
}
inline void mbarrier_wait(uint64_t* barrier, unsigned parity, SIMULATOR_HERE) {
  simulator::mbarrier_wait(barrier, parity, where);
}
inline void cluster_store_async(float* own, uint64_t* barrier, unsigned rank, float value, SIMULATOR_HERE) {
  cluster_store(own, rank, value, where);
  void* there = simulator::cluster_address(barrier, rank, "cluster_store_async", where);
  simulator::mbarrier_complete(static_cast<uint64_t*>(there), sizeof value, where);
}
template <class Value>  // of 8 or 16 bytes: uint2, uint4
void cluster_store_async(void* own, uint64_t* barrier, unsigned rank, Value value, SIMULATOR_HERE) {
  static_assert(sizeof value == 8 || sizeof value == 16);
  simulator::check_shared(own, sizeof value, "cluster_store_async", where);
  *static_cast<Value*>(simulator::cluster_address(own, rank, "cluster_store_async", where)) = value;
  void* there = simulator::cluster_address(barrier, rank, "cluster_store_async", where);
  simulator::mbarrier_complete(static_cast<uint64_t*>(there), sizeof value, where);
}
#else
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces `bytes` that cluster_store_async will bring in this phase. It releases to this block only: for
// the cluster it would be a fence of all memory.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, unsigned rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
               : "memory");
}
__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, unsigned parity) {
  unsigned done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  while (!mbarrier_test(barrier, parity)) {
  }
}
// Stores to block `rank`, whose own copy of `barrier` counts the bytes when they have arrived.
__device__ __forceinline__ void cluster_store_async(float* own, uint64_t* barrier, unsigned rank, float value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   cluster_address(own, rank)),
               "r"(__float_as_uint(value)), "r"(cluster_address(barrier, rank))
               : "memory");
}
__device__ __forceinline__ void cluster_store_async(void* own, uint64_t* barrier, unsigned rank, uint2 value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   cluster_address(own, rank)),
               "r"(value.x), "r"(value.y), "r"(cluster_address(barrier, rank))
               : "memory");
}
__device__ __forceinline__ void cluster_store_async(void* own, uint64_t* barrier, unsigned rank, uint4 value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   cluster_address(own, rank)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(cluster_address(barrier, rank))
               : "memory");
}
#endif

// ---- waiting for other blocks through global memory: in cooperative launches, or on a block whose number came from an
// ---- earlier atomic ticket. Every spin calls spin_pause.
//
// What another block writes during the launch is never read through __ldg or a const __restrict__ pointer: those loads
// are not coherent. With the constant SEQOPS_DEBUG, a wait that has polled 2^26 times traps.

#if defined(SIMULATE)
inline unsigned load_acquire(const unsigned* address) { return *static_cast<const volatile unsigned*>(address); }
inline void store_release(unsigned* address, unsigned value) {
  *static_cast<volatile unsigned*>(address) = value;
  simulator::made_progress();
}
inline unsigned atomic_add_release(unsigned* address, unsigned value) { return atomicAdd(address, value); }
inline void spin_pause(SIMULATOR_HERE) { simulator::spin("a value in global memory", where); }
// Returns when *address >= value, counted upwards modulo 2^32.
inline void wait_for_count(const unsigned* address, unsigned value, SIMULATOR_HERE) {
  while (int(load_acquire(address) - value) < 0) simulator::spin("a count in global memory", where);
}
// Waits for all blocks of a cooperative launch. `arrived` is a word of workspace, zeroed on the stream before the
// launch; `total` is the thread's own count and starts at 0. Counting upwards, nobody waits for the word to be reset.
inline void grid_barrier(unsigned* arrived, unsigned& total, SIMULATOR_HERE) {
  total += gridDim.x * gridDim.y * gridDim.z;
  simulator::block_barrier(where);
  if (simulator::current->linear == 0) {
    atomicAdd(arrived, 1u);
    while (int(load_acquire(arrived) - total) < 0) simulator::spin("the grid barrier", where);
  }
  simulator::block_barrier(where);
}
inline uint64_t load_packet(const uint64_t* address) { return *static_cast<const volatile uint64_t*>(address); }
inline void store_packet(uint64_t* address, uint32_t data, uint32_t tag) {
  *static_cast<volatile uint64_t*>(address) = uint64_t(tag) << 32 | data;
  simulator::made_progress();
}
inline uint32_t wait_for_packet(const uint64_t* address, uint64_t seen, uint32_t tag, SIMULATOR_HERE) {
  while (seen >> 32 != tag) {
    simulator::spin("a packet in global memory", where);
    seen = load_packet(address);
  }
  return uint32_t(seen);
}
#else
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned atomic_add_release(unsigned* address, unsigned value) {
  unsigned old;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}
__device__ __forceinline__ void spin_pause() { __nanosleep(20); }
__device__ __forceinline__ void wait_for_count(const unsigned* address, unsigned value) {
#if defined(SEQOPS_DEBUG)
  unsigned polls = 0;
#endif
  while (int(load_acquire(address) - value) < 0) {
    spin_pause();
#if defined(SEQOPS_DEBUG)
    if (++polls == 1u << 26) __trap();
#endif
  }
}
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned& total) {
  total += gridDim.x * gridDim.y * gridDim.z;
  __syncthreads();
  if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
    atomic_add_release(arrived, 1);
    wait_for_count(arrived, total);
  }
  __syncthreads();
}
// Packets of 4 bytes of data and a tag, moved as one: whoever sees the tag has the data, so that they order nothing but
// themselves. `seen` is what an earlier load_packet gave.
__device__ __forceinline__ uint64_t load_packet(const uint64_t* address) {
  uint64_t packet;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(packet) : "l"(address) : "memory");
  return packet;
}
__device__ __forceinline__ void store_packet(uint64_t* address, uint32_t data, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(uint64_t(tag) << 32 | data) : "memory");
}
__device__ __forceinline__ uint32_t wait_for_packet(const uint64_t* address, uint64_t seen, uint32_t tag) {
#if defined(SEQOPS_DEBUG)
  unsigned polls = 0;
#endif
  while (uint32_t(seen >> 32) != tag) {
    seen = load_packet(address);
#if defined(SEQOPS_DEBUG)
    if (++polls == 1u << 26) __trap();
#endif
  }
  return uint32_t(seen);
}
#endif
