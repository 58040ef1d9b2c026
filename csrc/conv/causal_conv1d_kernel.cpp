// Causal convolution of every channel with its own taps, and its backward:
//
//   z_t = bias + sum_k w_k x_{t-(W-1-k)d}             y = z, or silu(z)
//   dz = dy, or dy silu'(z)                           dbias = sum_t dz_t
//   dx_t = sum_k w_k dz_{t+(W-1-k)d} + what the final state's gradient adds where it holds x_t
//   dw_k = sum_t dz_t x_{t-(W-1-k)d}
//
// All sums over taps are one routine, `convolve`: OUTPUTS steps of a class, for a vector of channels, stay in registers
// while the rows they read pass by once; for dx the class is walked backwards in time. Rows come as pointers, so that
// steps before the first may lie in the state, or be zeros. A sum adds its taps from the oldest to the newest whatever
// the outputs beside it are: a step's bits depend neither on how the work is shared out nor on the pieces it came in.
#include "../common/vector.h"
#include "conv.h"

namespace seqops::SEQOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int OUTPUTS = 8;  // sums and rows: 2 * 8 of 32 registers
#else
constexpr int OUTPUTS = 6;  // 2 * 6 of 16
#endif

// ---- one vector of channels, from `channel` on: n of its lanes count

// sums[r] += sum_k weight_k rows[r + k], for R outputs. TAPS: W, where it is known at compile time, else 0.
template <int R, int TAPS, class E>
SEQOPS_INLINE void add_taps(Vector<Compute<E>> (&sums)[R], const E* const* rows, const Compute<E>* weight, int64_t D,
                            int64_t W, int64_t channel, int64_t n) {
  using V = Vector<Compute<E>>;
  const int64_t taps = TAPS > 0 ? TAPS : W;
  if (taps == 0) return;
  V window[R];  // at tap k row i is at i % R, for k <= i < k + R
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) window[i] = load(rows[i] + channel, n);
  for (int64_t first = 0; first < taps; first += R) {
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) {
      const int64_t k = first + j;
      if (k >= taps) break;
      const V w = load(weight + k * D + channel, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r] += w * window[(r + j) % R];
      if (k + 1 < taps) window[j] = load(rows[k + R] + channel, n);
    }
  }
}

// taps_k += sum_r dz[r] rows[r + k]; bias += sum_r dz[r].
template <int R, int TAPS, class Z, class E>
SEQOPS_INLINE void add_products(const Z* const* dz, const E* const* rows, Compute<E>* sums, int64_t D, int64_t W,
                                int64_t channel, int64_t n) {
  using T = Compute<E>;
  using V = Vector<T>;
  const int64_t taps = TAPS > 0 ? TAPS : W;
  V window[R], gradient[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    window[r] = load(rows[r] + channel, n);
    gradient[r] = load(dz[r] + channel, n);
  }
  for (int64_t first = 0; first < taps; first += R) {
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) {
      const int64_t k = first + j;
      if (k >= taps) break;
      T* sum = sums + k * D + channel;
      V total = load(sum, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total += gradient[r] * window[(r + j) % R];
      store<T>(sum, total, n);
      if (k + 1 < taps) window[j] = load(rows[k + R] + channel, n);
    }
  }
  T* sum = sums + taps * D + channel;
  V total = load(sum, n);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) total += gradient[r];
  store<T>(sum, total, n);
}

// body(channel, lanes) for every vector of channels.
template <class T, class Body>
SEQOPS_INLINE void for_each_vector(int64_t channels, Body body) {
  constexpr int64_t L = LANES<T>;
  const int64_t whole = channels / L * L;
  for (int64_t channel = 0; channel < whole; channel += L) body(channel, L);
  if (whole < channels) body(whole, channels - whole);
}

// ---- R steps of a class, all channels of a task: pointers at its first channel

enum class Finish { none, silu, silu_gradient };

// Zero, not merely small, where x is far below zero: silu multiplies it by x.
template <class T>
SEQOPS_INLINE Vector<T> sigmoid_to_zero(Vector<T> x) {
  const Vector<T> e = exp<T>(x > static_cast<T>(0) ? -x : x);
  const Vector<T> share = reciprocal<T>(e + static_cast<T>(1));
  return x < static_cast<T>(0) ? e * share : share;
}

// rows[r .. r + W - 1] are what output r reads; start[r] is added, unless it is null. With silu_gradient `out` is what
// multiplies dy.
template <int R, int TAPS, Finish FINISH, class E, class A, class O>
void convolve(const CausalConv1d& k, int64_t channels, int64_t W, const E* const* rows, const Compute<E>* weight,
              const A* const* start, const E* const* dy, O* const* out) {
  using T = Compute<E>;
  using V = Vector<T>;
  for_each_vector<T>(channels, [&](int64_t channel, int64_t n) __attribute__((always_inline)) {
    V sums[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = start[r] == nullptr ? V{} : load(start[r] + channel, n);
    add_taps<R, TAPS>(sums, rows, weight, k.D, W, channel, n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V value = sums[r];
      if constexpr (FINISH != Finish::none) {
        const V gate = sigmoid_to_zero<T>(value);
        if constexpr (FINISH == Finish::silu) {
          value *= gate;
        } else {
          const V one = constant<T>(1);
          value = load(dy[r] + channel, n) * (gate * (one + value * (one - gate)));
        }
      }
      store<O>(out[r] + channel, value, n);
    }
  });
}

template <int R, int TAPS, class Z, class E>
void correlate(const CausalConv1d& k, int64_t channels, const Z* const* dz, const E* const* rows, Compute<E>* sums) {
  for_each_vector<Compute<E>>(channels, [&](int64_t channel, int64_t n) __attribute__((always_inline)) {
    add_products<R, TAPS>(dz, rows, sums, k.D, k.W, channel, n);
  });
}

// ---- a worker

template <class E>
class Worker {
 protected:
  using T = Compute<E>;

 public:
  Worker(const CausalConv1d& k, int64_t worker) : k_(k), state_((k.W - 1) * k.dilation) {
    scratch_ = static_cast<char*>(k.scratch) + worker * k.scratch_bytes;
    zeros_ = static_cast<T*>(take(k.most_channels * sizeof(T)));
    for (int64_t c = 0; c < k.most_channels; ++c) zeros_[c] = 0;
    rows_ = static_cast<const E**>(take((k.W + OUTPUTS) * sizeof(E*)));
  }

 protected:
  void begin(const ConvTask& task) {
    row_ = &k_.rows[task.row];
    task_ = &task;
    x_ = at(k_.x, 0);
    initial_ = k_.initial == nullptr ? nullptr : state(static_cast<const E*>(k_.initial));
    weight_ = static_cast<const T*>(k_.weight) + task.channel;
    bias_ = static_cast<const T*>(k_.bias) + task.channel;
  }

  // The row of step t, at the task's first channel; t is counted from the beginning of the sequence.
  E* at(const Sequence& sequence, int64_t t) const {
    return static_cast<E*>(sequence.data) + row_->batch * sequence.row + (row_->first + t) * sequence.step +
           task_->channel;
  }
  template <class P>
  P* state(P* states) const {
    return states + task_->row * state_ * k_.D + task_->channel;
  }

  const E* input(int64_t t) const {
    if (t >= 0) return x_ + t * k_.x.step;
    return initial_ == nullptr ? reinterpret_cast<const E*>(zeros_) : initial_ + (state_ + t) * k_.D;
  }

  // What outputs t, t + dilation, ... read.
  template <int R>
  const E* const* inputs(int64_t t) {
    for (int64_t i = 0; i < R + k_.W - 1; ++i) rows_[i] = input(t - state_ + i * k_.dilation);
    return rows_;
  }

  template <int R, Finish FINISH, class O>
  void convolve_inputs(int64_t t, const E* const* dy, O* const* out) {
    const T* start[R];
    for (int r = 0; r < R; ++r) start[r] = bias_;
    run_taps([&](auto taps) {
      convolve<R, taps.value, FINISH>(k_, task_->channels, k_.W, inputs<R>(t), weight_, start, dy, out);
    });
  }

  template <int N>
  struct Number {
    static constexpr int value = N;
  };

  // The most common width has code of its own.
  template <class Run>
  SEQOPS_INLINE void run_taps(Run run) const {
    if (k_.W == 4) {
      run(Number<4>{});
    } else {
      run(Number<0>{});
    }
  }

  // run(Number<R>, t) for steps t, t + dilation, ..., t + (R - 1) dilation, until all in [from, to) had their turn.
  template <class Run>
  SEQOPS_INLINE void each_class(int64_t from, int64_t to, Run run) const {
    const int64_t d = k_.dilation;
    for (int64_t first = from; first < from + d && first < to; ++first) {
      int64_t t = first;
      for (; t + (OUTPUTS - 1) * d < to; t += OUTPUTS * d) run(Number<OUTPUTS>{}, t);
      for (; t < to; t += d) run(Number<1>{}, t);
    }
  }

  void* take(int64_t bytes) {
    void* part = scratch_;
    scratch_ += (bytes + 63) / 64 * 64;
    return part;
  }

  const CausalConv1d& k_;
  const int64_t state_;  // S
  const Row* row_;
  const ConvTask* task_;
  const E *x_, *initial_;
  const T *weight_, *bias_;
  T* zeros_;
  const E** rows_;
  char* scratch_;
};

template <bool FIRST, class A, class B>
struct Either {
  using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using type = B;
};

template <class E, bool SILU>
class Forward : Worker<E> {
  using Base = Worker<E>;
  using Base::k_;

 public:
  using Base::Base;

  void operator()(const ConvTask& task) {
    this->begin(task);
    const int64_t end = task.first + task.steps;
    for (int64_t from = task.first; from < end; from += k_.run) {
      this->each_class(from, from + k_.run < end ? from + k_.run : end, [&](auto outputs, int64_t t) {
        constexpr int R = outputs.value;
        E* out[R];
        for (int r = 0; r < R; ++r) out[r] = this->at(k_.y, t + r * k_.dilation);
        this->template convolve_inputs<R, SILU ? Finish::silu : Finish::none>(t, nullptr, out);
      });
    }
  }
};

// A task goes backwards in time, a run at a time. With an activation the dz that later steps of the walk read are kept,
// those of step t at t % kept; the first of them belong to steps behind the task.
template <class E, bool SILU>
class Backward : Worker<E> {
  using Base = Worker<E>;
  using Base::k_;
  using T = typename Base::T;
  using Z = typename Either<SILU, T, E>::type;  // of dz

 public:
  Backward(const CausalConv1d& k, int64_t worker) : Base(k, worker) {
    gradients_ = static_cast<const Z**>(this->take((k.W + OUTPUTS) * sizeof(Z*)));
    if (SILU) kept_ = static_cast<T*>(this->take(k.kept * k.most_channels * sizeof(T)));
  }

  void operator()(const ConvTask& task) {
    this->begin(task);
    const int64_t steps = this->row_->steps, S = this->state_, end = task.first + task.steps;
    sums_ = static_cast<T*>(k_.sums) + task.slot * (k_.W + 1) * k_.D + task.channel;
    if constexpr (SILU) keep(end, end + S < steps ? end + S : steps);
    for (int64_t to = end; to > task.first; to -= k_.run) {
      const int64_t from = to - k_.run > task.first ? to - k_.run : task.first;
      if constexpr (SILU) keep(from, to);
      inputs_gradient(from, to);
      weights_gradient(from, to);
    }
    if (task.first == 0 && k_.dinitial != nullptr) inputs_gradient(-S, 0);
  }

 private:
  const Z* gradient(int64_t t) const {
    if constexpr (SILU) {
      return kept_ + t % k_.kept * k_.most_channels;
    } else {
      return output_gradient(t);
    }
  }

  const E* output_gradient(int64_t t) const {
    return k_.dy.data == nullptr ? reinterpret_cast<const E*>(this->zeros_) : this->at(k_.dy, t);
  }

  void keep(int64_t from, int64_t to) {
    this->each_class(from, to, [&](auto outputs, int64_t t) {
      constexpr int R = outputs.value;
      const E* dy[R];
      T* out[R];
      for (int r = 0; r < R; ++r) {
        dy[r] = output_gradient(t + r * k_.dilation);
        out[r] = kept_ + (t + r * k_.dilation) % k_.kept * k_.most_channels;
      }
      this->template convolve_inputs<R, Finish::silu_gradient>(t, dy, out);
    });
  }

  // dx and, before the first step, the gradient of the state.
  void inputs_gradient(int64_t from, int64_t to) {
    const int64_t inner = this->row_->steps - this->state_;  // all that read an earlier x are steps of the row
    const int64_t middle = from < 0 || inner < from ? from : (inner < to ? inner : to);
    this->each_class(from, middle, [&](auto outputs, int64_t t) {
      this->run_taps([&](auto taps) { inputs_gradient<outputs.value, taps.value>(t, 0, k_.W); });
    });
    for (int64_t t = middle; t < to; ++t) {
      // Only taps that meet a step: an infinite weight times a dz that does not exist is no NaN.
      const int64_t d = k_.dilation, steps = this->row_->steps;
      const int64_t past = t + this->state_ - (steps - 1), before = t < 0 ? (-t + d - 1) / d : 0;
      const int64_t first = past > 0 ? (past + d - 1) / d : 0, last = k_.W - before;
      inputs_gradient<1, 0>(t, first, last > first ? last : first);
    }
  }

  // The steps t, t + dilation, ..., the latest first, from the taps first .. last - 1.
  template <int R, int TAPS>
  void inputs_gradient(int64_t t, int64_t first, int64_t last) {
    const int64_t d = k_.dilation, S = this->state_,
                  lost = this->row_->steps - S;  // x before is not in the final state
    const E* dfinal = k_.dfinal == nullptr ? nullptr : this->state(static_cast<const E*>(k_.dfinal));
    const int64_t latest = t + (R - 1) * d;
    const E* start[R];
    E* out[R];
    for (int r = 0; r < R; ++r) {
      const int64_t now = latest - r * d;
      start[r] = dfinal != nullptr && now >= lost ? dfinal + (now - lost) * k_.D : nullptr;
      out[r] = now >= 0 ? this->at(k_.dx, now) : this->state(static_cast<E*>(k_.dinitial)) + (S + now) * k_.D;
    }
    for (int64_t i = first; i < R + last - 1; ++i) gradients_[i] = gradient(latest + S - i * d);
    convolve<R, TAPS, Finish::none>(k_, this->task_->channels, last - first, gradients_ + first,
                                    this->weight_ + first * k_.D, start, static_cast<const Z* const*>(nullptr), out);
  }

  void weights_gradient(int64_t from, int64_t to) {
    this->each_class(from, to, [&](auto outputs, int64_t t) {
      constexpr int R = outputs.value;
      const Z* dz[R];
      for (int r = 0; r < R; ++r) dz[r] = gradient(t + r * k_.dilation);
      this->run_taps([&](auto taps) {
        correlate<R, taps.value>(k_, this->task_->channels, dz, this->template inputs<R>(t), sums_);
      });
    });
  }

  const Z** gradients_;
  T *kept_ = nullptr, *sums_;
};

template <class Pass>
void run_units(const CausalConv1d& k, int64_t worker) {
  Pass pass(k, worker);
  for (;;) {
    const int64_t unit = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED);
    if (unit >= k.count) return;
    for (int64_t i = k.units[unit]; i < k.units[unit + 1]; ++i) pass(k.tasks[i]);
  }
}

template <template <class, bool> class Pass, class E>
void run(const CausalConv1d& k, int64_t worker) {
  k.silu ? run_units<Pass<E, true>>(k, worker) : run_units<Pass<E, false>>(k, worker);
}

}  // namespace

const CausalConv1dKernels causal_conv1d_kernels = {
    {run<Forward, float>, run<Forward, double>, run<Forward, bfloat16>, run<Forward, float16>},
    {run<Backward, float>, run<Backward, double>, run<Backward, bfloat16>, run<Backward, float16>},
    OUTPUTS,
};

}  // namespace seqops::SEQOPS_ISA
