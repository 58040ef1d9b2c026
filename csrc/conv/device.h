// What the CUDA kernels of causal_conv1d share: sequences, what the taps read, and who does what.
//
//   z_t = bias + sum_k w_k x_{t-(W-1-k)d}, k = 0 the oldest tap; x_{-S} .. x_{-1}, S = (W-1)d, are the state
//   dx_t = sum_k w_k dz_{t+(W-1-k)d}          dw_k = sum_t dz_t x_{t-(W-1-k)d}
//
// The steps t, t + d, t + 2d, ... are a *class*, a convolution without dilation. A thread owns VEC neighbouring channels
// (a *lane*) and a *run*: up to RUN steps of one class. LANES neighbouring lanes of a block read whole lines; the other
// threads of the block are its GROUPS, with a run each. Times are counted in the batch row, whose sequences, when packed,
// lie one after the other.
//
// Constants: STORAGE of x · VEC · LANES · THREADS a block · PACKED: cu_seqlens are given · SILU: the activation
// Letters: B batch, T time, D channels, W taps, N sequences, d dilation.
#pragma once

#include "common/gpu.h"

#if defined(SIMULATE)
#define BOUNDS THREADS
#else
#define BOUNDS THREADS, 1
#endif

using E = STORAGE;
using R = Real<E>;
constexpr int GROUPS = THREADS / LANES;
static_assert(THREADS % LANES == 0, "groups of a block have all its lanes");

__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }

__device__ __forceinline__ R activated(R z) { return SILU ? z * sigmoid(z) : z; }
__device__ __forceinline__ R activated_gradient(R z, R dy) {
  if (!SILU) return dy;
  const R gate = sigmoid(z);
  return dy * (gate * multiply_add(z, 1 - gate, R(1)));
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
__device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- values of a thread's channels

struct Values {
  R v[VEC];
  __device__ __forceinline__ R& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const R& operator[](int i) const { return v[i]; }
};

__device__ __forceinline__ Values zeros() {
  Values values;
#pragma unroll
  for (int v = 0; v < VEC; ++v) values[v] = 0;
  return values;
}

template <class S>
__device__ __forceinline__ Values widened(const Pack<S, VEC>& pack) {
  Values values;
#pragma unroll
  for (int v = 0; v < VEC; ++v) values[v] = widen(pack, v);
  return values;
}

template <class S>
__device__ __forceinline__ Values load_values(const S* address) {
  return widened(load<S, VEC>(address));
}

template <class S>
__device__ __forceinline__ void store_values(S* address, const Values& values) {
  Pack<S, VEC> pack;
#pragma unroll
  for (int v = 0; v < VEC; ++v) pack[v] = narrow<S>(values[v]);
  store(address, pack);
}

// A number for each of the thread's channels, or zeros where there are none.
template <class G>
__device__ __forceinline__ Values parameters(const G* address, int64_t stride) {
  if (address == nullptr) return zeros();
  Values values;
#pragma unroll
  for (int v = 0; v < VEC; ++v) values[v] = widen(address[v * stride]);
  return values;
}

__device__ __forceinline__ void add_product(Values& sum, const Values& a, const Values& b) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) sum[v] = multiply_add(a[v], b[v], sum[v]);
}

// ---- sequences

// Steps start .. end - 1 of its batch row; n: its state.
struct Sequence {
  int64_t n, start, end;
};

// The sequence of step t. Edges that are none (the host cannot look at them) lead to no address outside of the tensors.
__device__ __forceinline__ Sequence sequence_at(const int64_t* p_cu_seqlens, int64_t N, int64_t T, int64_t t) {
  int64_t low = 0, high = N - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p_cu_seqlens[middle] <= t)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, most(least(p_cu_seqlens[low], t), 0), least(most(p_cu_seqlens[low + 1], t + 1), T)};
}

// Sequence n, as its state is asked for.
__device__ __forceinline__ Sequence sequence_of(const int64_t* p_cu_seqlens, int64_t T, int64_t n) {
  if (p_cu_seqlens == nullptr) return {n, 0, T};
  const int64_t start = most(least(p_cu_seqlens[n], T), 0);
  return {n, start, least(most(p_cu_seqlens[n + 1], start), T)};
}

// Rows of a batch row, at a thread's channels: of x, and before it of the state; else zeros.
template <class S>
struct Rows {
  const S* p_rows;   // of the batch row
  int64_t stride;    // of time
  const S* p_state;  // [N, S, D], or null
  int64_t steps, D;  // S

  __device__ __forceinline__ const S* address(const Sequence& q, int64_t t) const {
    if (t >= q.start) return t < q.end ? p_rows + t * stride : nullptr;
    const int64_t i = steps + t - q.start;
    return p_state != nullptr && i >= 0 ? p_state + (q.n * steps + i) * D : nullptr;
  }
  __device__ __forceinline__ Values at(const Sequence& q, int64_t t) const {
    const S* row = address(q, t);
    return row == nullptr ? zeros() : load_values(row);
  }
};

// ---- who does what

// This thread's lane, and its block among those of the same lanes.
struct Place {
  int64_t channel, block;
  int group;
  bool idle;  // no such lane: it only meets the others at barriers
};

__device__ __forceinline__ Place place(int64_t block, int64_t D) {
  const int64_t strips = ceil_div(D / VEC, LANES);
  const int64_t lane = block % strips * LANES + threadIdx.x % LANES;
  return {lane * VEC, block / strips, int(threadIdx.x / LANES), lane * VEC >= D};
}

// The runs of `run` steps into which the classes of B rows of T steps are cut, neighbouring classes after each other.
struct Runs {
  int64_t d, run, classes, of_row, count;

  __device__ __forceinline__ Runs(int64_t B, int64_t T, int64_t dilation, int64_t steps)
      : d(dilation),
        run(steps),
        classes(least(dilation, T)),
        of_row(classes * ceil_div(T, steps * dilation)),
        count(B * of_row) {}
  __device__ __forceinline__ int64_t row(int64_t i) const { return i / of_row; }
  __device__ __forceinline__ int64_t first(int64_t i) const {
    return i % of_row / classes * (run * d) + i % of_row % classes;
  }
};

// Adds up the values that the groups of a block have for the same lane; group 0 stores them, the thread's channels
// side by side. Always in the same order. s_sums [THREADS, VEC].
__device__ __forceinline__ void store_group_sums(R* s_sums, const Values& own, R* address, const Place& at) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) s_sums[v * THREADS + threadIdx.x] = own[v];
  __syncthreads();
  if (at.group == 0 && !at.idle) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      R sum = s_sums[v * THREADS + threadIdx.x];
      for (int group = 1; group < GROUPS; ++group) sum += s_sums[v * THREADS + group * LANES + threadIdx.x];
      address[v] = sum;
    }
  }
  __syncthreads();
}
