// Attention over ranges on the CPU, compiled once per instruction set: the passes. See range_attention.h and walk.h.
#include "../common/erfc.h"
#include "walk.h"

namespace seqops::SEQOPS_ISA {
namespace {

constexpr double LAPLACE_MEAN = 0.70710678118654752440,
                 LAPLACE_SLOPE = 2.50662827463100050242;  // sqrt(1/2), sqrt(2 pi)

// e^x for x that are not positive, but for rounding: what is above the range of exponents gives any number.
template <class T>
SEQOPS_INLINE Vector<T> exp_down(Vector<T> x) {
  const Power<T> p = power<T>(at_least<T>(x, Constants<T>::EXP_LEAST));
  const Vector<T> value = p.scale + p.scale * p.rest;
  return x < Constants<T>::EXP_LEAST ? Vector<T>{} : value;
}

// The weight of a score without a normaliser, and its derivative.
template <Activation A, class T>
SEQOPS_INLINE Vector<T> weight_of(Vector<T> s) {
  if constexpr (A == Activation::relu2) {
    const Vector<T> positive = s < T(0) ? Vector<T>{} : s;
    return positive * positive;
  } else {
    return erfc<T>((static_cast<T>(LAPLACE_MEAN) - s) * static_cast<T>(LAPLACE_SLOPE)) * T(0.5);
  }
}

template <Activation A, class T>
SEQOPS_INLINE Vector<T> slope_of(Vector<T> s) {
  if constexpr (A == Activation::relu2) {
    return (s < T(0) ? Vector<T>{} : s) * T(2);
  } else {
    const Vector<T> z = (static_cast<T>(LAPLACE_MEAN) - s) * static_cast<T>(LAPLACE_SLOPE);
    return exp_of_minus_square<T>(z) * static_cast<T>(1.41421356237309504880);
  }
}

// ---- queries as owners: outputs, and dq

template <class S>
struct Queries {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;

  const RangeAttention& k;
  Walk<S> walk;
  T *q, *grad, *o, *dq;           // [D][N]
  T *most, *total, *lse, *delta;  // [N]
  Stream<S> streams[2];
  int64_t b = 0, h = 0;
  bool fresh = true;  // nothing was added yet

  Queries(const RangeAttention& k, T* next) : k(k), walk(k, next) {
    T** const tensors[] = {&q, &grad, &o, &dq};
    for (T** tensor : tensors) *tensor = Walk<S>::take(next, TILE * walk.padded);
    T** const lanes[] = {&most, &total, &lse, &delta};
    for (T** lane : lanes) *lane = Walk<S>::take(next, TILE);
  }

  // `then` for the queries of a tile, or for one part of them after the other; `heads` may share one, see
  // heads_at_a_time().
  template <class Then>
  void each(int64_t b_, int64_t h_, int64_t heads, int64_t tile, Then then) {
    b = b_, h = h_;
    const int64_t head = h / (k.H / k.Hk);
    for (int i = 0; i < k.sources; ++i) {
      const KeySource& source = k.source[i];
      const RangesView& view = source.ranges;
      streams[i] = {{Walk<S>::row_of(source.k, b, 0, head), Walk<S>::row_of(source.v, b, 0, head)},
                    {source.k.step, source.v.step},
                    view.data + b * view.batch + h * view.head,
                    view.parts,
                    source.steps,
                    h};
    }
    const int64_t from = tile * TILE;
    const int64_t size = heads > 1 ? TILE : walk.owners_at_a_time(streams, k.sources, from, k.Tq);
    for (int64_t first = from; first < from + TILE && first < k.Tq; first += size) {
      walk.own(first, size, k.Tq);
      walk.share(heads);
      walk.load_owners(k.q, b, h, static_cast<T>(k.scale), q);
      then();
    }
  }

  void forward(int64_t b, int64_t h, int64_t heads, int64_t tile) {
    each(b, h, heads, tile, [&] {
      attend();
      walk.store_owners(o, k.o, b, h, T(1));
      T* out = static_cast<T*>(k.lse) + (b * k.H + h) * k.Tq + walk.first;
      for (int64_t i = 0; i < walk.n; ++i) out[i / walk.each * k.Tq + i % walk.each] = lse[i];
    });
  }

  // o and lse of the tile; of a row that sees nothing 0 and -inf.
  void attend() {
    fresh = true;
    const bool softmax = k.activation == Activation::softmax;
    for (int64_t i = 0; i < walk.N; ++i) most[i] = -INFINITE<T>, total[i] = 0, lse[i] = 0;
    walk.walk(streams, k.sources, [&] {
      walk.read(0), walk.read(1);
      walk.scores_of(0, q, walk.scores);
      add_bias();
      if (softmax) {
        weigh();
      } else if (k.activation == Activation::laplace) {
        weigh_alone<Activation::laplace>();
      } else {
        weigh_alone<Activation::relu2>();
      }
      walk.add(1, walk.scores, o, fresh);
      fresh = false;
    });
    if (fresh) walk.clear(o);
    if (softmax) finish();
  }

  void finish() {
    const int64_t N = walk.N;
    for (int64_t lane = 0; lane < N; lane += L) {
      const Vector<T> sum = load(total + lane), high = load(most + lane);
      const Vector<T> factor = T(1) / (sum == T(0) ? constant<T>(1) : sum);
      for (int64_t d = 0; d < k.D; ++d) store(o + d * N + lane, load(o + d * N + lane) * factor);
      // A sum is at least 1, if only by rounding: the largest weight is 1.
      const Vector<T> shift = high == -INFINITE<T> ? Vector<T>{} : high;
      const Vector<T> value = log<T>(sum == T(0) ? constant<T>(1) : sum) + shift;
      store(lse + lane, sum == T(0) ? constant<T>(-INFINITE<T>) : value);
    }
  }

  void add_bias() {
    if (k.bias == nullptr) return;
    const T* bias = static_cast<const T*>(k.bias) + h * k.bias_head;
    for (int64_t r = 0; r < walk.rows; ++r) {
      T* row = walk.scores + r * walk.N;
      for (int64_t i = 0; i < walk.n; ++i) row[i] += bias[walk.bias_index(walk.first + i, walk.position[r])];
    }
  }

  // Scores become weights relative to the largest score so far; what was summed before is scaled to the same.
  void weigh() {
    const int64_t N = walk.N, rows = walk.rows;
    T* scores = walk.scores;
    for (int64_t r = 0; r < rows; ++r) {
      if (walk.inside[r]) continue;
      for (int64_t lane = 0; lane < N; lane += L) {
        T* at = scores + r * N + lane;
        store(at, choose<T>(walk.sees(r, lane), load(at), constant<T>(-INFINITE<T>)));
      }
    }
    for (int64_t lane = 0; lane < N; lane += L) {
      const Vector<T> before = load(most + lane);
      Vector<T> high = before;
      for (int64_t r = 0; r < rows; ++r) {
        const Vector<T> s = load(scores + r * N + lane);
        high = s > high ? s : high;
      }
      const Vector<T> shift = high == -INFINITE<T> ? Vector<T>{} : high;
      Vector<T> sum = {};
      for (int64_t r = 0; r < rows; ++r) {
        T* at = scores + r * N + lane;
        const Vector<T> p = exp_down<T>(load(at) - shift);
        store(at, p);
        sum += p;
      }
      const Vector<T> keep = exp_down<T>(before - shift);
      store(total + lane, load(total + lane) * keep + sum);
      store(most + lane, high);
      if (fresh || !Walk<S>::any_not_zero(keep - T(1))) continue;
      for (int64_t d = 0; d < k.D; ++d) store(o + d * N + lane, load(o + d * N + lane) * keep);
    }
  }

  template <Activation A>
  void weigh_alone() {
    const int64_t N = walk.N;
    for (int64_t r = 0; r < walk.rows; ++r) {
      for (int64_t lane = 0; lane < N; lane += L) {
        T* at = walk.scores + r * N + lane;
        const Vector<T> p = weight_of<A, T>(load(at));
        store(at, walk.inside[r] ? p : choose<T>(walk.sees(r, lane), p, Vector<T>{}));
      }
    }
  }

  // ---- backward

  void backward(int64_t b, int64_t h, int64_t tile) {
    each(b, h, 1, tile, [&] { differentiate_tile(); });
  }

  void differentiate_tile() {
    walk.load_owners(k.grad_o, b, h, T(1), grad);
    if (k.activation == Activation::softmax) {
      find_sums();
    } else {
      for (int64_t i = 0; i < walk.N; ++i) lse[i] = delta[i] = 0;
    }
    fresh = true;
    walk.walk(streams, k.sources, [&] {
      walk.read(0), walk.read(1);
      walk.scores_of(0, q, walk.scores);
      add_bias();
      walk.scores_of(1, grad, walk.slopes);
      switch (k.activation) {
        case Activation::softmax: differentiate<Activation::softmax>(); break;
        case Activation::laplace: differentiate<Activation::laplace>(); break;
        case Activation::relu2: differentiate<Activation::relu2>(); break;
      }
      if (k.dbias != nullptr) add_to_bias();
      walk.add(0, walk.slopes, dq, fresh);
      fresh = false;
    });
    if (fresh) walk.clear(dq);
    walk.store_owners(dq, k.dq, b, h, static_cast<T>(k.scale));
  }

  // lse (of rows that see nothing, or nothing but scores of -inf, +inf: their weights are then 0) and delta of the tile.
  // Where the o that was given has fewer digits than a sum here, the forward is done again.
  void find_sums() {
    const int64_t N = walk.N, at = (b * k.H + h) * k.Tq + walk.first;
    if constexpr (sizeof(S) == sizeof(T)) {
      walk.load_owners(k.o, b, h, T(1), o);
      for (int64_t i = 0; i < N; ++i) lse[i] = i < walk.n ? static_cast<const T*>(k.lse)[at + i] : T(0);
    } else {
      attend();
    }
    for (int64_t lane = 0; lane < N; lane += L) {
      Vector<T> sum = {};
      for (int64_t d = 0; d < k.D; ++d) sum += load(grad + d * N + lane) * load(o + d * N + lane);
      store(delta + lane, sum);
    }
    T* sums = static_cast<T*>(k.sums) + (b * k.H + h) * 2 * k.Tq + walk.first;
    for (int64_t i = 0; i < walk.n; ++i) {
      if (k.grad_lse != nullptr) delta[i] -= static_cast<const T*>(k.grad_lse)[at + i];
      if (lse[i] == -INFINITE<T>) lse[i] = INFINITE<T>;
      sums[i] = lse[i], sums[k.Tq + i] = delta[i];
    }
  }

  template <Activation A>
  void differentiate() {
    const int64_t N = walk.N;
    for (int64_t r = 0; r < walk.rows; ++r) {
      for (int64_t lane = 0; lane < N; lane += L) {
        const Vector<T> s = load(walk.scores + r * N + lane);
        T* at = walk.slopes + r * N + lane;
        Vector<T> ds;
        if constexpr (A == Activation::softmax) {
          ds = exp_down<T>(s - load(lse + lane)) * (load(at) - load(delta + lane));
        } else {
          ds = slope_of<A, T>(s) * load(at);
        }
        store(at, walk.inside[r] ? ds : choose<T>(walk.sees(r, lane), ds, Vector<T>{}));
      }
    }
  }

  void add_to_bias() {
    double* out = k.dbias + h * k.bias_size();
    for (int64_t r = 0; r < walk.rows; ++r) {
      const T* row = walk.slopes + r * walk.N;
      const int64_t j = walk.position[r];
      const auto *begins = walk.lanes + walk.slot[r] * 2 * walk.N, *ends = begins + walk.N;
      for (int64_t i = 0; i < walk.n; ++i) {
        if (begins[i] <= j && j < ends[i]) out[walk.bias_index(walk.first + i, j)] += row[i];
      }
    }
  }
};

// ---- keys as owners: dk and dv

template <class S>
struct Keys {
  using T = Compute<S>;
  static constexpr int L = LANES<T>;
  static constexpr int64_t MOST_HEADS = 16;  // streams at a time

  const RangeAttention& k;
  Walk<S> walk;
  T *key, *value, *dk, *dv;  // [D][N]
  Stream<S> streams[MOST_HEADS];
  int64_t b = 0, count = 0;
  bool fresh = true;  // nothing was added yet

  Keys(const RangeAttention& k, T* next) : k(k), walk(k, next) {
    T** const tensors[] = {&key, &value, &dk, &dv};
    for (T** tensor : tensors) *tensor = Walk<S>::take(next, TILE * walk.padded);
  }

  void backward(const KeySource& source, int64_t b_, int64_t head, int64_t tile) {
    b = b_;
    const int64_t group = k.H / k.Hk, from = tile * TILE;
    int64_t next = aim(source, head * group, (head + 1) * group);
    const int64_t size = walk.owners_at_a_time(streams, count, from, source.steps);
    for (int64_t first = from; first < from + TILE && first < source.steps; first += size) {
      if (first > from && group > MOST_HEADS) next = aim(source, head * group, (head + 1) * group);
      walk.own(first, size, source.steps);
      walk.load_owners(source.k, b, head, static_cast<T>(k.scale), key);
      walk.load_owners(source.v, b, head, T(1), value);
      fresh = true;
      walk.walk(streams, count, [&] { pass(); });
      while (next < (head + 1) * group) {
        next = aim(source, next, (head + 1) * group);
        walk.walk(streams, count, [&] { pass(); });
      }
      if (fresh) walk.clear(dk);
      if (fresh || k.grad_o.data == nullptr) walk.clear(dv);
      walk.store_owners(dk, source.dk, b, head, static_cast<T>(k.scale));
      walk.store_owners(dv, source.dv, b, head, T(1));
    }
  }

  // Streams of query heads from h on, as many as there is room for; returns the head after them.
  int64_t aim(const KeySource& source, int64_t h, int64_t end) {
    const RangesView& seen = source.seen;
    for (count = 0; count < MOST_HEADS && h < end; ++count, ++h) {
      const S* grad = k.grad_o.data == nullptr ? nullptr : Walk<S>::row_of(k.grad_o, b, 0, h);
      streams[count] = {{Walk<S>::row_of(k.q, b, 0, h), grad},
                        {k.q.step, k.grad_o.step},
                        seen.data + b * seen.batch + h * seen.head,
                        seen.parts,
                        k.Tq,
                        h};
    }
    return h;
  }

  void pass() {
    walk.read(0), walk.read(1);
    walk.scores_of(0, key, walk.scores);
    add_bias();
    walk.scores_of(1, value, walk.slopes);
    switch (k.activation) {
      case Activation::softmax: differentiate<Activation::softmax>(); break;
      case Activation::laplace: differentiate<Activation::laplace>(); break;
      case Activation::relu2: differentiate<Activation::relu2>(); break;
    }
    if (k.grad_o.data != nullptr) walk.add(1, walk.scores, dv, fresh);
    walk.add(0, walk.slopes, dk, fresh);
    fresh = false;
  }

  void add_bias() {
    if (k.bias == nullptr) return;
    for (int64_t r = 0; r < walk.rows; ++r) {
      const T* bias = static_cast<const T*>(k.bias) + walk.stream[r]->head * k.bias_head;
      T* row = walk.scores + r * walk.N;
      for (int64_t j = 0; j < walk.n; ++j) row[j] += bias[walk.bias_index(walk.position[r], walk.first + j)];
    }
  }

  // Scores become weights, slopes the gradients of scores.
  template <Activation A>
  void differentiate() {
    const int64_t N = walk.N;
    for (int64_t r = 0; r < walk.rows; ++r) {
      T lse = 0, delta = 0;
      if constexpr (A == Activation::softmax) {
        const T* sums = static_cast<const T*>(k.sums) + (b * k.H + walk.stream[r]->head) * 2 * k.Tq + walk.position[r];
        lse = sums[0], delta = sums[k.Tq];
      }
      for (int64_t lane = 0; lane < N; lane += L) {
        T *at = walk.scores + r * N + lane, *slope = walk.slopes + r * N + lane;
        const Vector<T> s = load(at);
        Vector<T> p, ds;
        if constexpr (A == Activation::softmax) {
          p = exp_down<T>(s - lse), ds = p * (load(slope) - delta);
        } else {
          p = weight_of<A, T>(s), ds = slope_of<A, T>(s) * load(slope);
        }
        if (!walk.inside[r]) {
          const Bits<T> mask = walk.sees(r, lane);
          p = choose<T>(mask, p, Vector<T>{}), ds = choose<T>(mask, ds, Vector<T>{});
        }
        store(at, p), store(slope, ds);
      }
    }
  }
};

// ---- tasks

template <class S>
void forward(const RangeAttention& k, int64_t task, void* scratch) {
  const int64_t tiles = RangeAttention::tiles(k.Tq), slices = k.slices(), group = k.H / k.Hk;
  const int64_t slice = task / tiles % slices, row = task / tiles / slices, first = slice * k.heads_at_a_time();
  const int64_t heads = group - first < k.heads_at_a_time() ? group - first : k.heads_at_a_time();
  Queries<S>(k, static_cast<Compute<S>*>(scratch)).forward(row / k.Hk, row % k.Hk * group + first, heads, task % tiles);
}

template <class S>
void queries(const RangeAttention& k, int64_t task, void* scratch) {
  Queries<S> queries(k, static_cast<Compute<S>*>(scratch));
  const int64_t tiles = RangeAttention::tiles(k.Tq), row = task / tiles;
  if (k.dbias == nullptr) return queries.backward(row / k.H, row % k.H, task % tiles);
  for (int64_t b = 0; b < k.B; ++b) {
    for (int64_t tile = 0; tile < tiles; ++tile) queries.backward(b, task, tile);
  }
}

template <class S>
void keys(const RangeAttention& k, int64_t task, void* scratch) {
  const KeySource* source = k.source;
  const int64_t rows = k.B * k.Hk;
  if (task >= rows * RangeAttention::tiles(source->steps)) task -= rows * RangeAttention::tiles(source++->steps);
  const int64_t tiles = RangeAttention::tiles(source->steps), row = task / tiles;
  Keys<S>(k, static_cast<Compute<S>*>(scratch)).backward(*source, row / k.Hk, row % k.Hk, task % tiles);
}

template <class S>
constexpr RangeAttentionKernels::Passes PASSES = {forward<S>, queries<S>, keys<S>};

}  // namespace

extern const RangeAttentionKernels range_attention_kernels = {
    {PASSES<float>, PASSES<double>, PASSES<bfloat16>, PASSES<float16>},
};

}  // namespace seqops::SEQOPS_ISA
