// Every instruction that CUDA C++ has no name for, as a named function: once as PTX and once for the simulator.
#pragma once

#if !defined(SIMULATE)
// The number by which instructions know a place in this block's shared memory.
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
#endif

// The same number, of which the compiler does not know where it comes from: what follows from it is computed anew.
#if defined(SIMULATE)
inline int computed_anew(int number) { return number; }
#else
__device__ __forceinline__ int computed_anew(int number) {
  asm volatile("" : "+r"(number));
  return number;
}
#endif

// ---- copies that the thread does not wait for: visible to it after cp_async_wait, to others after a barrier too

#if defined(SIMULATE)
inline void cp_async_4(void* shared, const void* global, SIMULATOR_HERE) {
  simulator::copy_async(shared, global, 4, 4, where);
}
inline void cp_async_8(void* shared, const void* global, SIMULATOR_HERE) {
  simulator::copy_async(shared, global, 8, 8, where);
}
inline void cp_async_16(void* shared, const void* global, SIMULATOR_HERE) {
  simulator::copy_async(shared, global, 16, 16, where);
}
// The 2 bytes at `global` go to their half of the word, whose other half is what lies beside them, or anything.
inline void cp_async_2_of_word(void* word, const void* global, SIMULATOR_HERE) {
  const size_t half = reinterpret_cast<uintptr_t>(global) % 4;
  simulator::copy_async(static_cast<char*>(word) + half, global, 2, 2, where);
}
// Only the first `present` bytes are read; the others of the 16 become zero.
inline void cp_async_16_zero_fill(void* shared, const void* global, unsigned present, SIMULATOR_HERE) {
  simulator::copy_async(shared, global, 16, present, where);
}
inline void cp_async_commit() { simulator::copy_async_commit(); }
template <int NEWER>
inline void cp_async_wait() {  // for all but the NEWER last committed groups
  simulator::copy_async_wait(NEWER);
}
#else
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// There is no copy of 2 bytes; aligned words do not leave the memory that any allocator gives.
__device__ __forceinline__ void cp_async_2_of_word(void* word, const void* global) {
  cp_async_4(word, reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(global) & ~uintptr_t(3)));
}
__device__ __forceinline__ void cp_async_16_zero_fill(void* shared, const void* global, unsigned present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(present)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int NEWER>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");
}
#endif

// ---- tensor cores

// COUNT 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets elements
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix (of its transpose, in the _transposed form).
#if defined(SIMULATE)
inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, SIMULATOR_HERE) {
  simulator::load_matrices(r, 1, false, row, "ldmatrix_x1", where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, SIMULATOR_HERE) {
  simulator::load_matrices(r, 2, false, row, "ldmatrix_x2", where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMULATOR_HERE) {
  simulator::load_matrices(r, 4, false, row, "ldmatrix_x4", where);
}
inline void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row, SIMULATOR_HERE) {
  simulator::load_matrices(r, 2, true, row, "ldmatrix_x2_transposed", where);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, SIMULATOR_HERE) {
  simulator::load_matrices(r, 4, true, row, "ldmatrix_x4_transposed", where);
}
#else
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
#endif

// d += a b. With g = lane / 4 and p = lane % 4, a register holds, low half first,
//   a[i]  row g + 8 (i % 2), columns 2 p and 2 p + 1, + 8 for i >= 2        (tf32: column p, + 4 for i >= 2)
//   b[i]  column g, rows 2 p and 2 p + 1, + 8 for i = 1                     (tf32: row p, + 4 for i = 1)
//   d[i]  row g + 8 (i / 2), column 2 p + i % 2
#if defined(SIMULATE)
inline void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMULATOR_HERE) {
  simulator::mma(d, a, b, simulator::Format::bf16, where);
}
inline void mma_f16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMULATOR_HERE) {
  simulator::mma(d, a, b, simulator::Format::f16, where);
}
inline void mma_tf32_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMULATOR_HERE) {
  simulator::mma(d, a, b, simulator::Format::tf32, where);
}
#else
#define DEFINE_MMA(name, instruction)                                                                   \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
DEFINE_MMA(mma_bf16_m16n8k16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
DEFINE_MMA(mma_f16_m16n8k16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
DEFINE_MMA(mma_tf32_m16n8k8, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef DEFINE_MMA
#endif

// ---- approximations of one instruction, exact in the simulator

#if defined(SIMULATE)
inline float exp2_approx(float x) { return exp2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
#else
__device__ __forceinline__ float exp2_approx(float x) {  // relative error 2^-22; subnormal results are flushed to zero
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {  // relative error 2^-11
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {  // 1 unit in the last place; subnormals are flushed
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// ---- global memory read or written once: kept out of the first cache, first to leave the second

#if defined(SIMULATE)
template <class Value>
Value load_streaming(const Value* address, SIMULATOR_HERE) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Value)) {
    simulator::fail("load_streaming", where, "address not aligned to its size");
  }
  return *address;
}
template <class Value>
void store_streaming(Value* address, Value value, SIMULATOR_HERE) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Value)) {
    simulator::fail("store_streaming", where, "address not aligned to its size");
  }
  *address = value;
}
#else
// Value is a type that __ldcs and __stcs take: a number, or a vector such as uint4 of up to 16 bytes.
template <class Value>
__device__ __forceinline__ Value load_streaming(const Value* address) {
  return __ldcs(address);
}
template <class Value>
__device__ __forceinline__ void store_streaming(Value* address, Value value) {
  __stcs(address, value);
}
#endif

// ---- time: cycles of this multiprocessor; in the simulator a count of the calls, which only tells before from after

#if defined(SIMULATE)
inline int64_t clock_cycles() {
  static int64_t calls = 0;
  return ++calls;
}
#else
__device__ __forceinline__ int64_t clock_cycles() {
  int64_t cycles;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  return cycles;
}
#endif
