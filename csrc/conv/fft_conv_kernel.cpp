// fft_conv: y_t = sum_l k_l u_{t-l}, by transforms of 2n real numbers as n complex ones (fft.h), or directly for few taps.
//
// Positions p of a segment that begins at output s are times origin + p; the product of transforms is the convolution
// modulo z^{2n} = -1, so it is right wherever nothing wraps around:
//
//   y    from u of [s - lead, s + step)     at p = lead ...      what wraps lies before lead = M - 1, or is zero
//   du   from dy of [s, s + step + M - 1)   with conj(K)         at p = 0 ... step - 1
//   dk   the same dy times conj(U), with u of [s, s + step) only   at p = 0 ... M - 1
//
// Segments share out the steps of u, so every pair of dk's sum occurs once. Values that are not finite are taken as 0, or
// a transform would spread them everywhere; what they reach becomes NaN afterwards, in the few lanes that have any.
#include "fft.h"

namespace seqops::SEQOPS_ISA {
namespace {

constexpr int64_t NEVER = INT64_MAX;

template <class T>
bool any(Bits<T> lanes) {
  int64_t all = 0;
  for (int lane = 0; lane < LANES<T>; ++lane) all |= lanes[lane];
  return all != 0;
}

template <class S>
bool is_finite(const S* p) {
  const Compute<S> value = load(p, 1)[0];
  return value - value == 0;
}

template <class S>
class Worker {
  using T = Compute<S>;
  using V = Vector<T>;
  static constexpr int64_t L = LANES<T>;

 public:
  Worker(const FftConv& a, int64_t worker, bool backward) : a_(a), n_(a.plan.n), numbers_(fft_conv_numbers(a)) {
    T* next = reinterpret_cast<T*>(static_cast<char*>(a.scratch) + worker * a.scratch_bytes);
    const auto take = [&](int64_t count) {
      T* taken = next;
      next += count * numbers_ * L;
      return taken;
    };
    const bool in_place = n_ > 0 && a.N == 1;
    taps_ = take(1);
    inputs_ = take(a.resident);
    if (backward) {
      sums_ = take(1);
      outputs_ = take(1);
      gradients_ = in_place ? outputs_ : take(a.resident);
    } else {
      outputs_ = in_place ? inputs_ : take(1);
    }
  }

  void forward(int64_t task) {
    begin(task);
    for (int64_t first = first_; first < last_; first += a_.resident) {
      const int64_t count = last_ - first < a_.resident ? last_ - first : a_.resident;
      for (int64_t r = 0; r < count; ++r) {
        const Segment at = segment(first + r);
        bad_inputs_[r] = read(input(r), a_.u, at, d0_, d_lanes_, at.s - a_.lead, numbers_);
        if (n_ > 0) transform(a_.plan, input(r), 0, 0, n_);
      }
      for (int64_t g = 0; g < outs_; ++g) {
        enter(g);
        if (a_.N > 1 || first == first_) read_taps();
        for (int64_t r = 0; r < count; ++r) {
          const Segment at = segment(first + r);
          if (n_ > 0) {
            multiply_inputs(input(r));
            restore(a_.plan, outputs_, 0, 0, n_);
          } else {
            convolve(input(r), at.steps);
          }
          write(a_.y, at, c0_, c_lanes_, outputs_, a_.lead);
          mark_outputs(at, bad_inputs_[r]);
        }
      }
    }
  }

  void backward(int64_t task) {
    begin(task);
    const bool for_u = a_.du.data != nullptr, for_k = a_.dk != nullptr;
    for (int64_t first = first_; first < last_; first += a_.resident) {
      const int64_t count = last_ - first < a_.resident ? last_ - first : a_.resident;
      for (int64_t r = 0; r < count; ++r) {
        const Segment at = segment(first + r);
        bad_gradients_[r] = Bits<T>{};
        if (for_k) {
          bad_inputs_[r] = read(input(r), a_.u, at, d0_, d_lanes_, at.s, a_.step);
          if (n_ > 0) transform(a_.plan, input(r), 0, 0, n_);
        }
        if (for_u && gradients_ != outputs_) clear(gradient(r), numbers_ * L);
      }
      for (int64_t g = 0; g < outs_; ++g) {
        enter(g);
        const bool begins = a_.N > 1 || first == first_, ends = a_.N > 1 || first + count == last_;
        if (for_u && begins) read_taps();
        if (for_k && begins) clear(sums_, numbers_ * L);
        for (int64_t r = 0; r < count; ++r) {
          const Segment at = segment(first + r);
          const Bits<T> bad = read(outputs_, a_.y, at, c0_, c_lanes_, at.s, numbers_);
          if (n_ > 0) transform(a_.plan, outputs_, 0, 0, n_);
          if (for_k) {
            n_ > 0 ? multiply_sums(input(r)) : correlate_sums(input(r), at.steps);
            reach_taps(at, bad, bad_inputs_[r]);
          }
          if (for_u) {
            n_ > 0 ? multiply_gradients(gradient(r)) : correlate_gradients(gradient(r), at.steps);
            note_gradients(bad, bad_gradients_[r]);
            if (a_.N == 1) write_gradient(at, r);
          }
        }
        if (for_k && ends) write_taps(first != first_ && a_.N > 1);
      }
      for (int64_t r = 0; for_u && a_.N > 1 && r < count; ++r) write_gradient(segment(first + r), r);
    }
  }

 private:
  struct Segment {
    int64_t b, s, steps;  // of batch row b, the outputs [s, s + steps)
  };

  Segment segment(int64_t i) const {
    const int64_t s = i % a_.segments * a_.step;
    return {i / a_.segments, s, a_.T - s < a_.step ? a_.T - s : a_.step};
  }

  // The channels and segments of a task.
  void begin(int64_t task) {
    const int64_t all = a_.B * a_.segments, chunk = task % a_.chunks;
    chunk_ = chunk;
    first_ = all * chunk / a_.chunks;
    last_ = all * (chunk + 1) / a_.chunks;
    d0_ = task / a_.chunks * L;
    d_lanes_ = a_.D - d0_ < L ? a_.D - d0_ : L;
    outs_ = (d_lanes_ * a_.N + L - 1) / L;
    for (int64_t lane = 0; lane < L; ++lane) first_tap_of_channel_[lane] = NEVER, reach_[lane] = -1;
  }

  // The output channels of group number g.
  void enter(int64_t g) {
    c0_ = d0_ * a_.N + g * L;
    c_lanes_ = d_lanes_ * a_.N - g * L < L ? d_lanes_ * a_.N - g * L : L;
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t channel = (g * L + lane) / a_.N;
      from_[lane] = static_cast<decltype(from_[0] + 0)>(channel < d_lanes_ ? channel : 0);
    }
    if (a_.N > 1) {
      for (int64_t lane = 0; lane < L; ++lane) reach_[lane] = -1;
    }
  }

  T* input(int64_t r) const { return inputs_ + r * numbers_ * L; }
  T* gradient(int64_t r) const { return gradients_ + r * numbers_ * L; }

  // Calls `each(place, p)` for positions [begin, end): the first n are real parts, the others imaginary ones.
  template <class Each>
  SEQOPS_INLINE void places(T* x, int64_t begin, int64_t end, Each each) const {
    if (n_ == 0) {
      for (int64_t p = begin; p < end; ++p) each(x + p * L, p);
      return;
    }
    const int64_t real = end < n_ ? end : n_;
    for (int64_t p = begin; p < real; ++p) each(x + p * POINT<T>, p);
    for (int64_t p = begin > n_ ? begin : n_; p < end; ++p) each(x + (p - n_) * POINT<T> + L, p);
  }

  static void clear(T* x, int64_t count) {
    for (int64_t i = 0; i < count; i += L) store<T>(x + i, V{});
  }

  const S* row(const Sequence& sequence, int64_t b, int64_t t, int64_t channel) const {
    return static_cast<const S*>(sequence.data) + b * sequence.row + t * sequence.step + channel;
  }

  // Positions [0, limit) from time `origin` on, zeros elsewhere; returns the lanes where anything was not finite.
  Bits<T> read(T* x, const Sequence& sequence, const Segment& at, int64_t channel, int64_t lanes, int64_t origin,
               int64_t limit) const {
    const int64_t begin = origin < 0 ? -origin : 0;
    const int64_t end = a_.T - origin < limit ? a_.T - origin : limit;
    const auto zero = [](T* place, int64_t) { store<T>(place, V{}); };
    places(x, 0, begin, zero);
    places(x, end, numbers_, zero);
    Bits<T> bad = {};
    const auto copy = [&](int64_t n) __attribute__((always_inline)) {
      places(x, begin, end, [&](T* place, int64_t p) __attribute__((always_inline)) {
        const V value = load(row(sequence, at.b, origin + p, channel), n);
        const Bits<T> finite = (value - value) == static_cast<T>(0);
        bad |= ~finite;
        store<T>(place, (V)((Bits<T>)value & finite));
      });
    };
    lanes == L ? copy(L) : copy(lanes);
    return bad;
  }

  // Positions from `begin` on to the outputs of a segment.
  void write(const Sequence& sequence, const Segment& at, int64_t channel, int64_t lanes, T* x, int64_t begin) const {
    S* to = const_cast<S*>(row(sequence, at.b, at.s, channel));
    const auto copy = [&](int64_t n) __attribute__((always_inline)) {
      places(x, begin, begin + at.steps, [&](T* place, int64_t p) __attribute__((always_inline)) {
        store<S>(to + (p - begin) * sequence.step, load(place), n);
      });
    };
    lanes == L ? copy(L) : copy(lanes);
  }

  // ---- taps: k [D * N, L] has time along its rows

  V load_taps(int64_t c, int64_t l, int64_t n) const {
    const int64_t at = c * a_.L + l;
    return a_.k_is_stored ? load(static_cast<const S*>(a_.k) + at, n) : load(static_cast<const T*>(a_.k) + at, n);
  }

  // The transform of the taps divided by n, and the first tap of each lane that is not finite.
  void read_taps() {
    const int64_t taps = a_.L < a_.M ? a_.L : a_.M;
    const V scale = constant<T>(n_ > 0 ? 1.0 / static_cast<double>(n_) : 1.0);
    Bits<T> bad = {};
    const auto keep = [&](T* place, V value) {
      const Bits<T> finite = (value - value) == static_cast<T>(0);
      bad |= ~finite;
      store<T>(place, (V)((Bits<T>)value & finite) * scale);
    };
    for (int64_t l = 0; l < a_.M; l += L) {
      const int64_t count = a_.M - l < L ? a_.M - l : L, there = taps - l < count ? taps - l : count;
      V rows[L] = {};
      for (int64_t lane = 0; lane < c_lanes_ && there > 0; ++lane) rows[lane] = load_taps(c0_ + lane, l, there);
      transpose<T>(rows);
      if (l == 0 && a_.skip != nullptr) {
        const T* skip = static_cast<const T*>(a_.skip) + d0_;
        for (int64_t lane = 0; lane < c_lanes_; ++lane) rows[0][lane] += skip[from_[lane]];
      }
      places(taps_, l, l + count, [&](T* place, int64_t p) { keep(place, rows[p - l]); });
    }
    places(taps_, a_.M, numbers_, [](T* place, int64_t) { store<T>(place, V{}); });
    for (int64_t lane = 0; lane < L; ++lane) first_tap_[lane] = NEVER;
    if (any<T>(bad)) find_bad_taps(taps);
    if (n_ > 0) transform(a_.plan, taps_, 0, 0, n_);
  }

  void find_bad_taps(int64_t taps) {
    for (int64_t lane = 0; lane < c_lanes_; ++lane) {
      const T skip = a_.skip == nullptr ? 0 : static_cast<const T*>(a_.skip)[d0_ + from_[lane]];
      for (int64_t l = 0; l < a_.M && first_tap_[lane] == NEVER; ++l) {
        const T value = (l < taps ? load_taps(c0_ + lane, l, 1)[0] : 0) + (l == 0 ? skip : 0);
        if (!(value - value == 0)) first_tap_[lane] = l;
      }
      int64_t& first = first_tap_of_channel_[from_[lane]];
      if (first_tap_[lane] < first) first = first_tap_[lane];
    }
  }

  // The sums of this group, to dk's chunk; `add`: to what segments before these gave.
  void write_taps(bool add) {
    if (n_ > 0) restore(a_.plan, sums_, 0, 0, n_);
    const V scale = constant<T>(n_ > 0 ? 1.0 / static_cast<double>(n_) : 1.0);
    T* to = static_cast<T*>(a_.dk) + (chunk_ * a_.D * a_.N + c0_) * a_.M;
    for (int64_t l = 0; l < a_.M; l += L) {
      const int64_t count = a_.M - l < L ? a_.M - l : L;
      V rows[L] = {};
      places(sums_, l, l + count, [&](T* place, int64_t p) { rows[p - l] = load(place) * scale; });
      transpose<T>(rows);
      for (int64_t lane = 0; lane < c_lanes_; ++lane) {
        T* at = to + lane * a_.M + l;
        store<T>(at, add ? load(at, count) + rows[lane] : rows[lane], count);
      }
    }
    const T nan = static_cast<T>(__builtin_nan(""));
    for (int64_t lane = 0; lane < c_lanes_; ++lane) {
      for (int64_t l = 0; l < a_.M && l <= reach_[lane]; ++l) to[lane * a_.M + l] = nan;
    }
  }

  // ---- products of transforms

  // The values of input channels, for the lanes of output channels.
  template <bool SPREAD>
  SEQOPS_INLINE Complex<T> spread(Complex<T> value) const {
    if constexpr (SPREAD) return {permute<T>(value.re, from_), permute<T>(value.im, from_)};
    return value;
  }

  template <class Run>
  SEQOPS_INLINE void each_point(Run run) const {
    for (int64_t i = 0; i < n_; ++i) run(i * POINT<T>);
  }

  void multiply_inputs(const T* input) {
    const auto run = [&]<bool SPREAD>() {
      each_point([&](int64_t i) {
        const Complex<T> u = spread<SPREAD>(load_point(input + i));
        store_point(outputs_ + i, multiply<false>(u, load_point(taps_ + i)));
      });
    };
    a_.N > 1 ? run.template operator()<true>() : run.template operator()<false>();
  }

  void multiply_sums(const T* input) {
    const auto run = [&]<bool SPREAD>() {
      each_point([&](int64_t i) {
        const Complex<T> u = spread<SPREAD>(load_point(input + i));
        store_point(sums_ + i, load_point(sums_ + i) + multiply<true>(load_point(outputs_ + i), u));
      });
    };
    a_.N > 1 ? run.template operator()<true>() : run.template operator()<false>();
  }

  void multiply_gradients(T* gradient) {
    each_point([&](int64_t i) {
      const Complex<T> product = multiply<true>(load_point(outputs_ + i), load_point(taps_ + i));
      if (a_.N == 1) return store_point(gradient + i, product);
      gather(gradient + i, product.re);
      gather(gradient + i + L, product.im);
    });
  }

  // Adds to each input channel what its output channels have.
  void gather(T* to, V value) const {
    if (from_[0] == from_[c_lanes_ - 1]) {
      T sum = value[0];
      for (int64_t lane = 1; lane < c_lanes_; ++lane) sum += value[lane];
      to[from_[0]] += sum;
      return;
    }
    for (int64_t lane = 0; lane < c_lanes_; ++lane) to[from_[lane]] += value[lane];
  }

  // ---- the same without transforms: a few results at a time stay in registers

  static constexpr int64_t TOGETHER = 8;

  void convolve(const T* input, int64_t steps) {
    for (int64_t p = 0; p < steps; p += TOGETHER) {
      const int64_t count = steps - p < TOGETHER ? steps - p : TOGETHER;
      V sums[TOGETHER] = {};
      // Position p of the outputs is p + M - 1 of the inputs.
      const auto run = [&](int64_t results) __attribute__((always_inline)) {
        for (int64_t l = 0; l < a_.M; ++l) {
          const V tap = load(taps_ + l * L);
          const T* u = input + (p + a_.M - 1 - l) * L;
          for (int64_t i = 0; i < results; ++i) sums[i] += tap * spread_one(load(u + i * L));
        }
      };
      count == TOGETHER ? run(TOGETHER) : run(count);
      for (int64_t i = 0; i < count; ++i) store<T>(outputs_ + (p + i + a_.lead) * L, sums[i]);
    }
  }

  SEQOPS_INLINE V spread_one(V value) const { return a_.N == 1 ? value : permute<T>(value, from_); }

  void correlate_gradients(T* gradient, int64_t steps) {
    for (int64_t p = 0; p < steps; p += TOGETHER) {
      const int64_t count = steps - p < TOGETHER ? steps - p : TOGETHER;
      V sums[TOGETHER] = {};
      const auto run = [&](int64_t results) __attribute__((always_inline)) {
        for (int64_t l = 0; l < a_.M; ++l) {
          const V tap = load(taps_ + l * L);
          const T* dy = outputs_ + (p + l) * L;
          for (int64_t i = 0; i < results; ++i) sums[i] += tap * load(dy + i * L);
        }
      };
      count == TOGETHER ? run(TOGETHER) : run(count);
      for (int64_t i = 0; i < count; ++i) {
        T* to = gradient + (p + i) * L;
        a_.N == 1 ? store<T>(to, sums[i]) : gather(to, sums[i]);
      }
    }
  }

  void correlate_sums(const T* input, int64_t steps) {
    for (int64_t l = 0; l < a_.M; l += TOGETHER) {
      const int64_t count = a_.M - l < TOGETHER ? a_.M - l : TOGETHER;
      V sums[TOGETHER] = {};
      const auto run = [&](int64_t results) __attribute__((always_inline)) {
        for (int64_t p = 0; p < steps; ++p) {
          const V u = spread_one(load(input + p * L));
          const T* dy = outputs_ + (p + l) * L;
          for (int64_t i = 0; i < results; ++i) sums[i] += u * load(dy + i * L);
        }
      };
      count == TOGETHER ? run(TOGETHER) : run(count);
      for (int64_t i = 0; i < count; ++i) store<T>(sums_ + (l + i) * L, load(sums_ + (l + i) * L) + sums[i]);
    }
  }

  // ---- what is not finite: everything in its reach becomes NaN

  static void mark(S* at) { store<S>(at, constant<T>(__builtin_nan("")), 1); }

  void mark_outputs(const Segment& at, Bits<T> bad) const {
    for (int64_t lane = 0; lane < c_lanes_; ++lane) {
      if (bad[from_[lane]]) {
        int64_t ends = 0;  // of the reach of the last one
        for (int64_t t = at.s < a_.M ? 0 : at.s - (a_.M - 1); t < at.s + at.steps; ++t) {
          if (!is_finite(row(a_.u, at.b, t, d0_ + from_[lane]))) ends = t + a_.M;
          if (t >= at.s && t < ends) mark(const_cast<S*>(row(a_.y, at.b, t, c0_ + lane)));
        }
      }
      if (first_tap_[lane] == NEVER) continue;
      for (int64_t t = at.s > first_tap_[lane] ? at.s : first_tap_[lane]; t < at.s + at.steps; ++t) {
        mark(const_cast<S*>(row(a_.y, at.b, t, c0_ + lane)));
      }
    }
  }

  // dy at t meets u_{t - l}, u at s meets dy_{s + l}: taps l <= t, and l < T - s.
  void reach_taps(const Segment& at, Bits<T> bad, Bits<T> bad_input) {
    for (int64_t lane = 0; lane < c_lanes_; ++lane) {
      const int64_t end = a_.T - at.s < numbers_ ? a_.T : at.s + numbers_;
      int64_t& reach = reach_[lane];
      for (int64_t t = end - 1; bad[lane] && t >= at.s; --t) {
        if (is_finite(row(a_.y, at.b, t, c0_ + lane))) continue;
        if (t > reach) reach = t;
        break;
      }
      for (int64_t t = at.s; bad_input[from_[lane]] && t < at.s + at.steps; ++t) {
        if (is_finite(row(a_.u, at.b, t, d0_ + from_[lane]))) continue;
        if (a_.T - 1 - t > reach) reach = a_.T - 1 - t;
        break;
      }
    }
  }

  void note_gradients(Bits<T> bad, Bits<T>& of_channels) const {
    if (!any<T>(bad)) return;
    for (int64_t lane = 0; lane < c_lanes_; ++lane) of_channels[from_[lane]] |= bad[lane];
  }

  void write_gradient(const Segment& at, int64_t r) {
    T* gradients = gradient(r);
    if (n_ > 0) restore(a_.plan, gradients, 0, 0, n_);
    write(a_.du, at, d0_, d_lanes_, gradients, 0);
    for (int64_t lane = 0; lane < d_lanes_; ++lane) {
      const auto place = [&](int64_t t) { return const_cast<S*>(row(a_.du, at.b, t, d0_ + lane)); };
      if (bad_gradients_[r][lane]) {
        int64_t begins = NEVER;  // of the reach of the one before
        const int64_t end = a_.T - at.s < at.steps + a_.M - 1 ? a_.T : at.s + at.steps + a_.M - 1;
        for (int64_t t = end - 1; t >= at.s; --t) {
          for (int64_t n = 0; n < a_.N; ++n) {
            if (!is_finite(row(a_.y, at.b, t, (d0_ + lane) * a_.N + n))) begins = t - a_.M + 1;
          }
          if (t < at.s + at.steps && t >= begins) mark(place(t));
        }
      }
      const int64_t tap = first_tap_of_channel_[lane];
      for (int64_t t = at.s; tap != NEVER && t < at.s + at.steps && t < a_.T - tap; ++t) mark(place(t));
    }
  }

  const FftConv& a_;
  const int64_t n_, numbers_;
  T *taps_, *inputs_, *outputs_, *sums_ = nullptr, *gradients_ = nullptr;
  int64_t chunk_, first_, last_, d0_, d_lanes_, outs_, c0_, c_lanes_;
  Bits<T> from_;  // the input channel of each lane of an output group
  Bits<T> bad_inputs_[MOST_RESIDENT], bad_gradients_[MOST_RESIDENT];
  int64_t first_tap_[LANES<T>], first_tap_of_channel_[LANES<T>], reach_[LANES<T>];
};

template <class S>
void fft_conv_forward(const FftConv& a, int64_t worker) {
  Worker<S> run(a, worker, false);
  for (int64_t task; (task = __atomic_fetch_add(a.next, 1, __ATOMIC_RELAXED)) < a.groups * a.chunks;) run.forward(task);
}

template <class S>
void fft_conv_backward(const FftConv& a, int64_t worker) {
  Worker<S> run(a, worker, true);
  for (int64_t task; (task = __atomic_fetch_add(a.next, 1, __ATOMIC_RELAXED)) < a.groups * a.chunks;) {
    run.backward(task);
  }
}

// Channels [begin, end): chunks are added in their order.
template <class S>
void fft_conv_taps(const FftConvTaps& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t L = LANES<T>;
  const int64_t rows = a.D * a.N;
  for (int64_t d = begin; d < end; ++d) {
    T skip = 0;
    for (int64_t c = d * a.N; c < (d + 1) * a.N; ++c) {
      for (int64_t l = 0; l < a.L || l < a.M; l += L) {
        Vector<T> sum = {};
        const int64_t there = a.M - l < L ? a.M - l : L, count = a.L - l < L ? a.L - l : L;
        for (int64_t chunk = 0; chunk < a.chunks && there > 0; ++chunk) {
          sum += load(static_cast<const T*>(a.partial) + (chunk * rows + c) * a.M + l, there);
        }
        if (l == 0) skip += sum[0];
        if (a.dk == nullptr || count <= 0) continue;
        if (a.k_is_stored) {
          store<S>(static_cast<S*>(a.dk) + c * a.L + l, sum, count);
        } else {
          store<T>(static_cast<T*>(a.dk) + c * a.L + l, sum, count);
        }
      }
    }
    if (a.dskip != nullptr) static_cast<T*>(a.dskip)[d] = skip;
  }
}

}  // namespace

#define SEQOPS_TYPES(function) {function<float>, function<double>, function<bfloat16>, function<float16>}

extern const FftConvKernels fft_conv_kernels = {{LANES<float>, LANES<double>, LANES<float>, LANES<float>},
                                                SEQOPS_VECTOR_BYTES == 64 ? 8 : 4,
                                                32,
                                                SEQOPS_TYPES(fft_conv_forward),
                                                SEQOPS_TYPES(fft_conv_backward),
                                                SEQOPS_TYPES(fft_conv_taps)};

}  // namespace seqops::SEQOPS_ISA
