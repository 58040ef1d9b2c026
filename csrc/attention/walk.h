// A tile of owners (lanes) and the rows that are streamed past it.
//
// Rows come in tiles of up to 64, put together from as many ranges as it takes: of all parts of a pattern, both sources
// of keys, all query heads of a group. A row that every lane sees is *inside*; of the others each lane's own first and
// end are compared. Layouts: [D][N] is an owners' tensor, transposed; [rows][N] are scores and weights.
#pragma once

#include "../common/product.h"
#include "range_attention.h"

namespace seqops::SEQOPS_ISA {
namespace {

constexpr int64_t TILE = RangeAttention::TILE;

template <class T>
constexpr T INFINITE = __builtin_inf();

template <class T>
SEQOPS_INLINE Vector<T> choose(Bits<T> mask, Vector<T> yes, Vector<T> no) {
  return (Vector<T>)((mask & (Bits<T>)yes) | (~mask & (Bits<T>)no));
}

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

// Rows of two tensors, and who sees them.
template <class S>
struct Stream {
  const S* tensor[2];     // row 0; null: zeros
  int64_t step[2];        // stride of rows
  const int32_t* ranges;  // [parts][2][owners]
  int64_t parts, steps;
  int64_t head;
};

struct Hull {  // of ranges
  int64_t begin = 0, end = 0;

  SEQOPS_INLINE void add(int64_t from, int64_t to) {
    if (from >= to) return;
    if (begin == end) begin = from, end = to;
    begin = from < begin ? from : begin, end = to > end ? to : end;
  }
  int64_t size() const { return end - begin; }
};

template <class S>
struct Walk {
  using T = Compute<S>;
  using Integer = typename IntegerOf<T>::type;
  static constexpr int L = LANES<T>;

  const RangeAttention& k;
  int64_t D, padded;
  int64_t first = 0, n = 0, N = 0;  // owners first .. first + n - 1; lanes
  int64_t each = 0;                 // owners of a head: n, or less where several heads share the tile
  int64_t owners = 0;               // of the whole tensor

  // The tile of rows.
  int64_t rows = 0;
  const Stream<S>* stream[TILE];
  int64_t position[TILE];
  int slot[TILE];
  bool inside[TILE];
  bool one_piece = true;
  const T* operand[2];  // [rows][D], rows `operand_row` apart
  int64_t operand_row[2];

  T *packed[2], *stage, *zeros, *scores, *slopes;
  Integer* lanes;  // [slots][2][N]: first and end

  Walk(const RangeAttention& k, T*& next) : k(k), D(k.D), padded(RangeAttention::padded(k.D)) {
    packed[0] = take(next, TILE * padded), packed[1] = take(next, TILE * padded), stage = take(next, TILE * padded);
    zeros = take(next, padded), scores = take(next, TILE * TILE), slopes = take(next, TILE * TILE);
    lanes = reinterpret_cast<Integer*>(take(next, 2 * TILE * TILE));
    for (int64_t d = 0; d < padded; ++d) zeros[d] = 0;
  }

  static T* take(T*& next, int64_t count) {
    T* p = next;
    next += (count + 15) / 16 * 16;
    return p;
  }

  void own(int64_t from, int64_t most, int64_t all) {
    owners = all, first = from;
    n = each = all - from < most ? all - from : most;
    N = (n + L - 1) / L * L;
  }

  void share(int64_t heads) {
    n = each * heads;
    N = (n + L - 1) / L * L;
  }

  // How many owners of a tile to take at a time: 64, 32 or 16. Fewer meet fewer rows that only others see (a tile walks
  // from the first to the last row that any of its owners sees), many make longer products.
  int64_t owners_at_a_time(const Stream<S>* streams, int64_t count, int64_t from, int64_t all) {
    constexpr int64_t PARTS = 4, WIDTH = TILE / PARTS;
    int64_t cost[3] = {};
    for (const Stream<S>* s = streams; s < streams + count; ++s) {
      for (int64_t part = 0; part < s->parts; ++part) {
        const int32_t *begins = s->ranges + part * 2 * all, *ends = begins + all;
        Hull hulls[PARTS];
        for (int64_t i = from; i < all && i < from + TILE; ++i) {
          hulls[(i - from) / WIDTH].add(begins[i] < 0 ? 0 : begins[i], ends[i] < s->steps ? ends[i] : s->steps);
        }
        for (int step = 0, size = 1; size <= PARTS; ++step, size *= 2) {
          for (int64_t at = 0; at < PARTS; at += 2 * size) {
            cost[step] += hulls[at].size() + (size < PARTS ? hulls[at + size].size() : 0);
            if (size < PARTS) hulls[at].add(hulls[at + size].begin, hulls[at + size].end);
          }
        }
      }
    }
    // Rows of 16 lanes take 16 / 64 of the time of 64, and a third more.
    const int64_t by_16 = 16 * 4 * cost[0] / 3, by_32 = 32 * 9 * cost[1] / 8, by_64 = 64 * cost[2];
    return by_64 <= by_32 && by_64 <= by_16 ? 64 : by_32 <= by_16 ? 32 : 16;
  }

  // ---- the owners' tensors

  static S* row_of(const HeadView& view, int64_t b, int64_t t, int64_t h) {
    return static_cast<S*>(view.data) + b * view.batch + t * view.step + h * view.head;
  }

  // Asks for a row of a tensor before it is read. Rows lie apart, which the machine does not foresee.
  SEQOPS_INLINE void expect_row(const S* in) const {
    for (int64_t c = 0; c < D; c += 64 / sizeof(S)) __builtin_prefetch(in + c, 0, 2);
  }

  void expect_rows(const Stream<S>& s, int64_t from, int64_t end) const {
    for (int64_t j = from; j < end && j < from + TILE; ++j) {
      for (int which = 0; which < 2; ++which) {
        if (s.tensor[which] != nullptr) expect_row(s.tensor[which] + j * s.step[which]);
      }
    }
  }

  // Rows of a tensor as [D][N], times `factor`.
  void load_owners(const HeadView& view, int64_t b, int64_t h, T factor, T* out) {
    if (view.data != nullptr) {
      for (int64_t i = 0; i < n; ++i) expect_row(row_of(view, b, first + i % each, h + i / each));
    }
    for (int64_t i = 0; i < n; ++i)
      load_row(view.data == nullptr ? nullptr : row_of(view, b, first + i % each, h + i / each), factor,
               stage + i * padded);
    transpose_rows(stage, padded, n, D, out, N);
  }

  void store_owners(const T* in, const HeadView& view, int64_t b, int64_t h, T factor) {
    transpose_rows(in, N, D, n, stage, padded);
    for (int64_t i = 0; i < n; ++i) {
      S* out = row_of(view, b, first + i % each, h + i / each);
      const T* row = stage + i * padded;
      for (int64_t c = 0; c < D; c += L) store(out + c, load(row + c) * factor, D - c < L ? D - c : L);
    }
  }

  void load_row(const S* in, T factor, T* out) const {
    for (int64_t c = 0; c < padded; c += L) {
      const int64_t valid = D - c < L ? D - c : L;
      store(out + c, in == nullptr || valid <= 0 ? Vector<T>{} : load(in + c, valid) * factor);
    }
  }

  void clear(T* out) const {
    for (int64_t i = 0; i < D * N; i += L) store(out + i, Vector<T>{});
  }

  // ---- the rows that pass

  template <class Process>
  void walk(const Stream<S>* streams, int64_t count, Process process) {
    int slots = 0;
    rows = 0, one_piece = true;
    for (const Stream<S>* s = streams; s < streams + count; ++s) {
      for (int64_t part = 0; part < s->parts; ++part) {
        const Span span = take_lanes(*s, part, slots);
        if (rows == 0) expect_rows(*s, span.begin, span.end);
        for (int64_t j = span.begin; j < span.end;) {
          const int64_t more = span.end - j < TILE - rows ? span.end - j : TILE - rows;
          one_piece = rows == 0;
          for (int64_t r = rows; r < rows + more; ++r, ++j) {
            stream[r] = s, position[r] = j, slot[r] = slots, inside[r] = span.inside_begin <= j && j < span.inside_end;
          }
          rows += more;
          if (rows < TILE) continue;
          expect_rows(*s, j, span.end);
          process();
          rows = 0;
          if (slots > 0 && j < span.end) __builtin_memcpy(lanes, lanes + slots * 2 * N, 2 * N * sizeof(Integer));
          slots = 0;
        }
        if (rows > 0 && span.begin < span.end) ++slots;
      }
    }
    if (rows > 0) process();
  }

  struct Span {
    int64_t begin, end, inside_begin, inside_end;
  };

  // The lanes' ranges of a part, cut to what there is.
  Span take_lanes(const Stream<S>& s, int64_t part, int slots) {
    const int32_t* from = s.ranges + part * 2 * owners + first;
    Integer *begins = lanes + slots * 2 * N, *ends = begins + N;
    Span span = {s.steps, 0, 0, s.steps};
    for (int64_t lane = 0; lane < N; ++lane) {
      const int64_t owner = lane < n ? lane : n - 1, i = each == n ? owner : owner % each;
      const int64_t begin = from[i] < 0 ? 0 : from[i], end = from[i + owners] < s.steps ? from[i + owners] : s.steps;
      begins[lane] = static_cast<Integer>(begin), ends[lane] = static_cast<Integer>(end);
      if (begin < end && begin < span.begin) span.begin = begin;
      if (begin < end && end > span.end) span.end = end;
      if (begin > span.inside_begin) span.inside_begin = begin;
      if (end < span.inside_end) span.inside_end = end;
    }
    return span;
  }

  SEQOPS_INLINE Bits<T> sees(int64_t r, int64_t lane) const {
    const Integer* at = lanes + slot[r] * 2 * N + lane;
    Bits<T> begin, end;
    __builtin_memcpy(&begin, at, sizeof begin);
    __builtin_memcpy(&end, at + N, sizeof end);
    const Bits<T> j = Bits<T>{} + static_cast<Integer>(position[r]);
    return (Bits<T>)(begin <= j) & (Bits<T>)(j < end);
  }

  const S* row(int which, int64_t r) const {
    const Stream<S>& s = *stream[r];
    return s.tensor[which] == nullptr ? nullptr : s.tensor[which] + position[r] * s.step[which];
  }

  // The rows as the products read them: where they are, or packed.
  void read(int which) {
    const Stream<S>& s = *stream[0];
    if constexpr (sizeof(S) == sizeof(T)) {
      if (one_piece) {
        const bool none = s.tensor[which] == nullptr;
        operand[which] = none ? zeros : reinterpret_cast<const T*>(row(which, 0));
        operand_row[which] = none ? 0 : s.step[which];
        return;
      }
    }
    pack(which);
  }

  void pack(int which) {
    for (int64_t r = 0; r < rows; ++r) load_row(row(which, r), T(1), packed[which] + r * padded);
    operand[which] = packed[which], operand_row[which] = padded;
  }

  // out [rows][N] = rows of a tensor times an owners' tensor [D][N]
  void scores_of(int which, const T* owner, T* out) {
    product<T>(rows, N, D, {operand[which], operand_row[which], 1}, owner, N, out, N, Keep<T>::nothing());
  }

  bool is_odd(int which, int64_t r) const {
    if (inside[r]) return false;  // every lane sees it
    const S* in = row(which, r);
    if (in == nullptr) return false;
    Vector<T> sum = {};
    for (int64_t c = 0; c < D; c += L) sum += load(in + c, D - c < L ? D - c : L) * T(0);
    return any_not_zero(sum);
  }

  static bool any_not_zero(Vector<T> v) {  // NaN is not zero
    T lane[L];
    store(lane, v);
    bool any = false;
    for (int i = 0; i < L; ++i) any = any || !(lane[i] == 0);
    return any;
  }

  // out [D][N] += the sum over rows of row times weight, or, where out is fresh, replaced by it. Rows that are not finite and that not every lane sees are
  // left out of the product, where 0 times them would be NaN, and added to the lanes that see them.
  void add(int which, const T* weights, T* out, bool fresh) {
    int64_t odd[TILE], count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (is_odd(which, r)) odd[count++] = r;
    }
    if (count > 0 && operand[which] != packed[which]) pack(which);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < D; ++d) packed[which][odd[i] * padded + d] = 0;
    }
    product<T>(D, N, rows, {operand[which], 1, operand_row[which]}, weights, N, out, N,
               fresh ? Keep<T>::nothing() : added<T>());
    for (int64_t i = 0; i < count; ++i) {
      load_row(row(which, odd[i]), T(1), stage);
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t lane = 0; lane < N; lane += L) {
          T* at = out + d * N + lane;
          const Vector<T> sum = load(at) + load(weights + odd[i] * N + lane) * stage[d];
          store(at, choose<T>(sees(odd[i], lane), sum, load(at)));
        }
      }
    }
  }

  // ---- bias

  int64_t bias_index(int64_t i, int64_t j) const {
    const int64_t C = k.bias_places, most = C - 1;
    const auto cut = [](int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; };
    if (k.bias_by_distance) return cut(most + j - i, 2 * most);
    const int64_t start = k.bias_start[i];
    return cut(i - start, most) * C + cut(j - start, most);
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
