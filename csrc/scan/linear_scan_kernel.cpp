// Linear scan:  h_t = a_t h_{t-1} + x_t,  and backward  g_t = dh_t + conj(a_{t+1}) g_{t+1},  da_t = g_t conj(h_{t-1}).
//
// A walk goes through time in order and, inside a step, through the channels: every stream of memory is sequential.
// Where steps are short several are taken together, a vector of channels staying in a register meanwhile. An exact 0 in `a` cuts the
// recurrence, whatever is on the other side: 0 * NaN is not formed.
#include "walk.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
constexpr T TINY = sizeof(T) == 4 ? static_cast<T>(1.17549435e-38) : static_cast<T>(2.2250738585072014e-308);

// ---- numbers: S what sequences store, G what gates store, both computed in T. A complex number is two lanes.

template <class S_, class G_>
struct RealNumbers {
  using S = S_;
  using G = G_;
  using T = Compute<S>;
  using V = Vector<T>;
  static constexpr int WIDTH = 1;

  static SEQOPS_INLINE V splat(const G* gate) { return V{} + load(gate, 1)[0]; }
  static SEQOPS_INLINE Bits<T> whole(Bits<T> lanes) { return lanes; }  // true where it is for all of a number
  static SEQOPS_INLINE V multiply(V a, V b) { return a * b; }
  static SEQOPS_INLINE V multiply_conjugate(V a, V b) { return a * b; }  // conj(a) b
  static SEQOPS_INLINE V squared(V a) { return a * a; }                  // of the modulus
};

template <class T_>
struct ComplexNumbers {
  using T = T_;
  using S = T;
  using G = T;
  using V = Vector<T>;
  static constexpr int WIDTH = 2;

  static SEQOPS_INLINE V real_parts(V a) { return permute<T>(a, lane_numbers<T>() & ~1); }
  static SEQOPS_INLINE V imaginary_parts(V a) { return permute<T>(a, lane_numbers<T>() | 1); }
  static SEQOPS_INLINE V swapped(V a) { return permute<T>(a, lane_numbers<T>() ^ 1); }
  static SEQOPS_INLINE V minus_plus(V v) {  // (-v0, v1, -v2, ...)
    return (lane_numbers<T>() & 1) == 0 ? -v : v;
  }

  static SEQOPS_INLINE V splat(const G* gate) { return (lane_numbers<T>() & 1) == 0 ? V{} + gate[0] : V{} + gate[1]; }
  static SEQOPS_INLINE Bits<T> whole(Bits<T> lanes) { return lanes & (Bits<T>)swapped((V)lanes); }
  static SEQOPS_INLINE V squared(V a) {
    return real_parts(a) * real_parts(a) + imaginary_parts(a) * imaginary_parts(a);
  }
  static SEQOPS_INLINE V multiply(V a, V b) { return real_parts(a) * b + minus_plus(imaginary_parts(a)) * swapped(b); }
  static SEQOPS_INLINE V multiply_conjugate(V a, V b) {
    return real_parts(a) * b - minus_plus(imaginary_parts(a)) * swapped(b);
  }
};

// By bits: without SSE4.1 GCC 12 fails on the conditional operator where masks of 64 bits have been combined.
template <class T>
SEQOPS_INLINE Vector<T> choose(Bits<T> mask, Vector<T> yes, Vector<T> no) {
  return (Vector<T>)((mask & (Bits<T>)yes) | (~mask & (Bits<T>)no));
}

template <class N>
SEQOPS_INLINE Bits<typename N::T> is_zero(Vector<typename N::T> v) {
  return N::whole(v == static_cast<typename N::T>(0));
}

// ---- a few steps of a walk for a segment of channels

// Values of consecutive steps; `step` is the distance in scalars, negative where the walk descends.
template <class E>
struct Lines {
  E* data;
  int64_t step;
  SEQOPS_INLINE E* at(int64_t i, int64_t channel) const { return data + i * step + channel; }
};

// What becomes of the gate's gradient: nothing; it is stored; it is added to what is there.
enum class Gradient { none, store, add };

// The arguments of a segment: pointers at its first channel. With SPLAT one gate serves the segment, else each channel
// has its own.
template <class N>
struct Segment {
  int64_t channels, steps;  // channels in scalars
  bool descending;          // through memory
  bool pairs;               // reals are the parts of complex numbers
  Lines<const typename N::S> x;
  Lines<const typename N::G> a;
  Lines<typename N::S> y;
  typename N::T *carry, *product;
  Lines<const typename N::S> before;  // h of the step before, for i < known
  const typename N::T* initial;       // and at i == known, or null: zeros
  int64_t known;
  Lines<typename N::G> da;
  Lines<typename N::T> da_sum;
};

template <class N, bool SPLAT>
SEQOPS_INLINE Vector<typename N::T> gate_at(const Segment<N>& k, int64_t i, int64_t channel, int64_t n) {
  if constexpr (SPLAT) return N::splat(k.a.at(i, 0));
  return load(k.a.at(i, channel), n);
}

template <class N, bool SPLAT>
SEQOPS_INLINE void forward(const Segment<N>& k, int64_t channel, int64_t n) {
  using V = Vector<typename N::T>;
  V h = load(k.carry + channel, n);
  for (int64_t i = 0; i < k.steps; ++i) {
    const V a = gate_at<N, SPLAT>(k, i, channel, n), x = load(k.x.at(i, channel), n);
    h = is_zero<N>(a) ? x : N::multiply(a, h) + x;
    store<typename N::S>(k.y.at(i, channel), h, n);
  }
  store<typename N::T>(k.carry + channel, h, n);
}

// `sums`: for one gate, the sum over channels so far of each step's gradient, by lane.
template <class N, bool SPLAT, Gradient GRADIENT>
SEQOPS_INLINE void backward(const Segment<N>& k, int64_t channel, int64_t n, Vector<typename N::T> (&sums)[STEPS]) {
  using T = typename N::T;
  using V = Vector<T>;
  V carry = load(k.carry + channel, n);
  for (int64_t i = 0; i < k.steps; ++i) {
    const V a = gate_at<N, SPLAT>(k, i, channel, n);
    const V g = k.x.data == nullptr ? carry : carry + load(k.x.at(i, channel), n);
    store<typename N::S>(k.y.at(i, channel), g, n);
    const Bits<T> cut = is_zero<N>(a);
    carry = choose<T>(cut, V{}, N::multiply_conjugate(a, g));
    if constexpr (GRADIENT != Gradient::none) {
      V before = {};
      if (i < k.known) {
        before = load(k.before.at(i, channel), n);
      } else if (k.initial != nullptr) {
        before = load(k.initial + channel, n);
      }
      V spread = before - before;  // 0 where it is finite
      if (k.pairs) spread += permute<T>(spread, lane_numbers<T>() ^ 1);
      const Bits<T> finite = N::whole(spread == static_cast<T>(0));
      const V da = choose<T>(cut & ~finite, V{}, N::multiply_conjugate(before, g));
      if constexpr (GRADIENT == Gradient::store) {
        store<typename N::G>(k.da.at(i, channel), da, n);
      } else if constexpr (SPLAT) {
        sums[i] += da;
      } else {
        T* sum = k.da_sum.at(i, channel);
        store<T>(sum, load(sum, n) + da, n);
      }
    }
  }
  store<T>(k.carry + channel, carry, n);
}

// These steps as a map of what comes in: `carry` is what comes out for 0, `product` the factor of what comes in. Only a
// reset makes the factor 0: one that underflows stays the smallest normal number, so that NaN and Inf pass, and becomes
// NaN, which asks for a walk without chunks, if a gate above 1 would make it grow again.
template <class N, bool SPLAT, bool BACKWARD>
SEQOPS_INLINE void reduce(const Segment<N>& k, int64_t channel, int64_t n) {
  using T = typename N::T;
  using V = Vector<T>;
  V carry = load(k.carry + channel, n), product = load(k.product + channel, n);
  for (int64_t i = 0; i < k.steps; ++i) {
    const V a = gate_at<N, SPLAT>(k, i, channel, n);
    const V x = k.x.data == nullptr ? V{} : load(k.x.at(i, channel), n);
    const Bits<T> cut = is_zero<N>(a);
    V factor;
    if constexpr (BACKWARD) {
      carry = choose<T>(cut, V{}, N::multiply_conjugate(a, carry + x));
      factor = N::multiply_conjugate(a, product);
    } else {
      carry = choose<T>(cut, x, N::multiply(a, carry) + x);
      factor = N::multiply(a, product);
    }
    const Bits<T> gone = N::whole(product == TINY<T>), grows = N::squared(a) > static_cast<T>(1);
    const Bits<T> underflow = N::whole((factor < TINY<T>)&(factor > -TINY<T>));
    factor = choose<T>(gone | underflow, constant<T>(TINY<T>), factor);
    factor = choose<T>(gone & grows, constant<T>(__builtin_nan("")), factor);
    product = choose<T>(cut | is_zero<N>(product), V{}, factor);
  }
  store<T>(k.carry + channel, carry, n);
  store<T>(k.product + channel, product, n);
}

enum class Pass { forward, forward_reduce, backward, backward_reduce };

template <class N, Pass PASS, bool SPLAT, Gradient GRADIENT>
void segment(const Segment<N>& k) {
  using T = typename N::T;
  constexpr int64_t L = LANES<T>;
  Vector<T> sums[STEPS] = {};
  const auto vector = [&](int64_t channel, int64_t n) __attribute__((always_inline)) {
    if constexpr (PASS == Pass::forward) {
      forward<N, SPLAT>(k, channel, n);
    } else if constexpr (PASS == Pass::backward) {
      backward<N, SPLAT, GRADIENT>(k, channel, n, sums);
    } else {
      reduce<N, SPLAT, PASS == Pass::backward_reduce>(k, channel, n);
    }
  };
  const int64_t whole = k.channels / L * L;
  if (!k.descending) {
    for (int64_t channel = 0; channel < whole; channel += L) vector(channel, L);
    if (whole < k.channels) vector(whole, k.channels - whole);
  } else {
    if (whole < k.channels) vector(whole, k.channels - whole);
    for (int64_t channel = whole - L; channel >= 0; channel -= L) vector(channel, L);
  }
  if constexpr (SPLAT && GRADIENT == Gradient::add) {
    for (int64_t i = 0; i < k.steps; ++i) {
      const Vector<T> sum = lane_sums<T, N::WIDTH>(sums[i]);
      for (int part = 0; part < N::WIDTH; ++part) *k.da_sum.at(i, part) += sum[part];
    }
  }
}

// ---- a task

// How the gates of a step lie beside the channels.
enum class Pattern {
  full,      // one for each channel
  runs,      // one for every gate_div channels
  repeated,  // a vector of gate_mod, again and again
  written,   // runs or repetitions shorter than a vector: written out beside the channels first
};

template <class N, Pass PASS>
class Worker {
  using S = typename N::S;
  using G = typename N::G;
  using T = typename N::T;
  static constexpr int64_t W = N::WIDTH;
  static constexpr bool GRADIENTS = PASS == Pass::backward;
  // Where one gate serves all steps, its gradient is first summed over so many: a long sum would lose its last digits.
  static constexpr int64_t STEPS_OF_SUM = 64 * STEPS;

 public:
  Worker(const LinearScan& k, int64_t worker) : k_(k) {
    char* scratch = static_cast<char*>(k.scratch) + worker * k.scratch_bytes;
    gates_ = reinterpret_cast<G*>(scratch);
    sums_ = reinterpret_cast<T*>(scratch + k.block * k.C * W * sizeof(T));
    folded_ = sums_ + k.block * k.C * W;
    run_ = k.gate_div > 1 || k.gate_mod == 1 ? k.gate_div : k.gate_mod;
    if (k.gate_div == 1 && k.gate_mod == k.C) {
      pattern_ = Pattern::full;
    } else if (run_ * W < 2 * LANES<T>) {
      pattern_ = Pattern::written;
    } else {
      pattern_ = k.gate_div > 1 || k.gate_mod == 1 ? Pattern::runs : Pattern::repeated;
    }
    wants_gate_ = GRADIENTS && (k.da.data != nullptr || k.da_sum != nullptr);
    per_step_ = k.da.data != nullptr;
    stores_ = per_step_ && pattern_ == Pattern::full;
  }

  void operator()(const Task& task) {
    const Walk walk(k_, task);
    const int64_t channel = task.channel, n = task.channels;
    Segment<N> whole = {};
    whole.descending = k_.descending;
    whole.pairs = k_.pairs;
    whole.carry = static_cast<T*>(k_.carry) + (task.slot * k_.C + channel) * W;
    if (k_.product != nullptr) whole.product = static_cast<T*>(k_.product) + (task.slot * k_.C + channel) * W;
    if (k_.initial != nullptr) whole.initial = static_cast<const T*>(k_.initial) + (task.row * k_.C + channel) * W;
    if (k_.a.step == 0 && pattern_ == Pattern::written) write_out(walk.at<const G>(k_.a, 0, W), gates_, channel, n);
    const bool sums_time = wants_gate_ && !per_step_;

    for (int64_t i = 0; i < task.steps; i += k_.block) {
      if (sums_time && i % STEPS_OF_SUM == 0) zero(sums_, sum_width() * W);
      Segment<N> k = whole;
      k.steps = task.steps - i < k_.block ? task.steps - i : k_.block;
      k.x = lines<const S>(walk, k_.x, i, channel);
      k.y = lines<S>(walk, k_.y, i, channel);
      k.a = lines<const G>(walk, k_.a, i, 0);
      if (wants_gate_) {
        const int64_t left = k_.rows[task.row].steps - task.begin - i - 1;  // steps of the row after this one
        k.known = left < k.steps ? left : k.steps;
        k.before = lines<const S>(walk, k_.h, i + 1, channel);
      }
      steps(task, walk, i, k);
      if (sums_time && ((i + k_.block) % STEPS_OF_SUM == 0 || i + k_.block >= task.steps)) {
        T* total = static_cast<T*>(k_.da_sum) + task.slot * k_.gate_mod * W;
        if (pattern_ == Pattern::written) {
          fold(sums_, total, channel, n);
        } else {
          for (int64_t c = first_gate(channel) * W; c < (first_gate(channel) + gates_of(n)) * W; ++c)
            total[c] += sums_[c];
        }
      }
    }
  }

 private:
  template <class E>
  Lines<E> lines(const Walk& walk, const Sequence& sequence, int64_t i, int64_t channel) const {
    E* data = walk.at<E>(sequence, i, W);
    return {data == nullptr ? nullptr : data + channel * W, walk.direction * sequence.step * W};
  }

  // A few steps, all channels of the task: segments of one kind of gate each.
  void steps(const Task& task, const Walk& walk, int64_t i, Segment<N> k) {
    const int64_t channel = task.channel, n = task.channels;
    if (wants_gate_ && !stores_) {
      k.da_sum = {sums_, per_step_ ? sum_width() * W : 0};
      if (per_step_) zero(sums_, k.steps * k.da_sum.step);
    }
    switch (pattern_) {
      case Pattern::full:
        k.channels = n * W;
        k.a.data += channel * W;
        if (stores_) {
          k.da = lines<G>(walk, k_.da, i, channel);
          segment<N, PASS, false, GRADIENTS ? Gradient::store : Gradient::none>(k);
        } else {
          k.da_sum.data += wants_gate_ ? channel * W : 0;
          run<false>(k);
        }
        return;
      case Pattern::written:
        if (k_.a.step != 0) {
          for (int64_t j = 0; j < k.steps; ++j) write_out(k.a.at(j, 0), gates_ + j * k_.C * W, channel, n);
        }
        k.channels = n * W;
        k.a = {gates_ + channel * W, k_.a.step == 0 ? 0 : k_.C * W};
        k.da_sum.data += wants_gate_ ? channel * W : 0;
        run<false>(k);
        break;
      case Pattern::runs:
      case Pattern::repeated: segments(channel, n, k); break;
    }
    if (!wants_gate_ || !per_step_) return;
    for (int64_t j = 0; j < k.steps; ++j) {
      const T* sums = sums_ + j * k_.gate_mod * W;
      if (pattern_ == Pattern::written) {
        zero(folded_, k_.gate_mod * W);
        fold(sums_ + j * k_.C * W, folded_, channel, n);
        sums = folded_;
      }
      const int64_t first = first_gate(channel) * W, gates = gates_of(n) * W;
      G* da = walk.at<G>(k_.da, i + j, W);
      constexpr int64_t L = LANES<T>;
      for (int64_t c = 0; c < gates; c += L) {
        const int64_t valid = gates - c < L ? gates - c : L;
        store<G>(da + first + c, load(sums + first + c, valid), valid);
      }
    }
  }

  // From one end of the channels to the other, as the walk goes.
  void segments(int64_t channel, int64_t n, const Segment<N>& at) {
    const bool splat = pattern_ == Pattern::runs;
    const int64_t end = channel + n, first = channel / run_, last = (end - 1) / run_;
    for (int64_t i = 0; i <= last - first; ++i) {
      const int64_t r = at.descending ? last - i : first + i;
      const int64_t from = r * run_ > channel ? r * run_ : channel, to = (r + 1) * run_ < end ? (r + 1) * run_ : end;
      const int64_t gate = splat ? r % k_.gate_mod : from % run_, shift = (from - channel) * W;
      Segment<N> k = at;
      k.channels = (to - from) * W;
      k.a.data += gate * W;
      k.x.data += k.x.data == nullptr ? 0 : shift;
      k.y.data += k.y.data == nullptr ? 0 : shift;
      k.carry += shift;
      k.product += k.product == nullptr ? 0 : shift;
      k.initial += k.initial == nullptr ? 0 : shift;
      k.before.data += k.before.data == nullptr ? 0 : shift;
      k.da_sum.data += k.da_sum.data == nullptr ? 0 : gate * W;
      splat ? run<true>(k) : run<false>(k);
    }
  }

  template <bool SPLAT>
  void run(const Segment<N>& k) {
    if (wants_gate_) {
      segment<N, PASS, SPLAT, GRADIENTS ? Gradient::add : Gradient::none>(k);
    } else {
      segment<N, PASS, SPLAT, Gradient::none>(k);
    }
  }

  int64_t sum_width() const { return pattern_ == Pattern::written ? k_.C : k_.gate_mod; }

  // The gates of a task's channels: those of a part of the channels are a part of the gates, or all.
  int64_t first_gate(int64_t channel) const { return k_.gate_div * k_.gate_mod == k_.C ? channel / k_.gate_div : 0; }
  int64_t gates_of(int64_t channels) const {
    return k_.gate_div * k_.gate_mod == k_.C ? channels / k_.gate_div : k_.gate_mod;
  }

  static void zero(T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = 0;
  }

  // Calls `each(channel, gate)` for the channels of a task. The first case is a real gate for complex numbers that are
  // taken as pairs: written apart, since the compiler makes vectors of it.
  template <class Each>
  SEQOPS_INLINE void for_each_channel(int64_t channel, int64_t n, Each each) const {
    int64_t gate = channel / k_.gate_div % k_.gate_mod, inside = channel % k_.gate_div;
    if (k_.gate_div == 2 && inside == 0 && n % 2 == 0 && gate + n / 2 <= k_.gate_mod) {
      for (int64_t i = 0; i < n / 2; ++i) {
        each(channel + 2 * i, gate + i);
        each(channel + 2 * i + 1, gate + i);
      }
      return;
    }
    for (int64_t c = channel; c < channel + n; ++c) {
      each(c, gate);
      if (++inside == k_.gate_div) {
        inside = 0;
        if (++gate == k_.gate_mod) gate = 0;
      }
    }
  }

  // One gate for each of the channels.
  void write_out(const G* __restrict gates, G* __restrict out, int64_t channel, int64_t n) const {
    for_each_channel(channel, n, [&](int64_t c, int64_t gate) __attribute__((always_inline)) {
      for (int64_t part = 0; part < W; ++part) out[c * W + part] = gates[gate * W + part];
    });
  }

  // The reverse: sums over the channels of each gate.
  void fold(const T* __restrict values, T* __restrict sums, int64_t channel, int64_t n) const {
    for_each_channel(channel, n, [&](int64_t c, int64_t gate) __attribute__((always_inline)) {
      for (int64_t part = 0; part < W; ++part) sums[gate * W + part] += values[c * W + part];
    });
  }

  const LinearScan& k_;
  G* gates_;           // [block, C]: gates written out
  T *sums_, *folded_;  // [block, C] gradients of gates; [gate_mod] those of one step
  int64_t run_;        // channels of a segment
  Pattern pattern_;
  bool wants_gate_, per_step_, stores_;
};

template <class N, Pass PASS>
void linear_scan(const LinearScan& k, int64_t worker) {
  Worker<N, PASS> run(k, worker);
  for_each_task(k, run);
}

}  // namespace

#define SEQOPS_PASSES(pass)                                                                              \
  {linear_scan<RealNumbers<float, float>, pass>,       linear_scan<RealNumbers<double, double>, pass>,   \
   linear_scan<RealNumbers<bfloat16, bfloat16>, pass>, linear_scan<RealNumbers<float16, float16>, pass>, \
   linear_scan<RealNumbers<bfloat16, float>, pass>,    linear_scan<RealNumbers<float16, float>, pass>,   \
   linear_scan<ComplexNumbers<float>, pass>,           linear_scan<ComplexNumbers<double>, pass>}

extern const LinearScanKernels linear_scan_kernels = {SEQOPS_PASSES(Pass::forward), SEQOPS_PASSES(Pass::forward_reduce),
                                                      SEQOPS_PASSES(Pass::backward),
                                                      SEQOPS_PASSES(Pass::backward_reduce)};

}  // namespace seqops::SEQOPS_ISA
