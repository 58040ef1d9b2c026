// The recurrence that all cells share. Each step is, panel by panel and tile by tile of rows,
//
//   forward    y[row, gate, unit] = sum_k r[gate, unit, k] h[row, k]                      then Cell::forward
//   backward   a[row, unit]       = sum_{gate, k} r[gate, k, unit] dy[row, gate, k]       then Cell::backward
//
// The product keeps a tile of sums in registers (rows x vectors); the cell's own part follows while they are in L1.
#pragma once

#include "../common/team.h"
#include "product.h"

namespace seqops::SEQOPS_ISA {
namespace {

// ---- where a cell's units of one row and one step lie

template <class Real>
struct Place {
  int64_t row, time;
  int64_t pair;    // index of (row, time) in contiguous sequences
  int64_t before;  // the same of the step before, in the order of the recurrence (if there is one)
  int64_t head;
  int64_t unit;      // first unit, of the head
  int64_t lane0;     // head * D + unit
  int64_t values;    // H * D
  int64_t n;         // valid lanes
  int64_t state;     // index in [B, H, D]
  bool first, last;  // of this row's steps
  int64_t ahead;     // times from here to the step that comes next, +1 or -1: what it reads is prefetched
  int64_t pair_ahead;
  void* product_input;  // of this step, in Input<S>: what the next product reads
};

template <class Real>
SEQOPS_INLINE Place<Real> place(const Recurrence& a, int64_t position, int64_t step, int64_t head, int64_t unit,
                                bool backward) {
  Place<Real> at;
  const int64_t length = a.lengths[position];
  at.row = a.rows[position];
  at.time = a.reverse ? length - 1 - step : step;
  at.pair = at.row * a.steps.row + at.time * a.steps.step;
  at.before = at.pair - (a.reverse ? -a.steps.step : a.steps.step);
  at.head = head;
  at.unit = unit;
  at.lane0 = head * a.D + unit;
  at.values = a.H * a.D;
  const int64_t left = a.D - unit;
  at.n = left < LANES<Real> ? left : LANES<Real>;
  at.state = at.row * at.values + at.lane0;
  at.first = step == 0;
  at.last = step == length - 1;
  at.ahead = a.reverse == backward ? 1 : -1;
  at.pair_ahead = at.ahead * a.steps.step;
  at.product_input = nullptr;
  return at;
}

// Rows lie far apart, more of them than a processor follows on its own: bring near what the next step reads.
template <class S>
SEQOPS_INLINE Vector<Compute<S>> load_and_prefetch(const S* p, int64_t n, int64_t ahead) {
  __builtin_prefetch(p + ahead, /*write=*/0, /*locality=*/2);
  return load(p, n);
}

// Rows still running at a step: they are a prefix, and `rows` only shrinks as steps go up (grows as they go down).
SEQOPS_INLINE int64_t running(const Recurrence& a, int64_t first, int64_t last, int64_t step) {
  while (last > first && a.lengths[last - 1] <= step) --last;
  return last;
}

// Calls body(head, panel, first row, last row, step) for every step of the work of workers [begin, end). Every other
// step goes through the panels backwards: where the weights exceed a cache, those read last are still in it.
template <class F>
void for_each_step(const Recurrence& a, const Panels& panels, Team& team, int64_t begin, int64_t end, bool backward,
                   const F& body) {
  const auto sweep = [&](int64_t first, int64_t last, const auto& at_step) {
    const int64_t length = last > first ? a.lengths[first] : 0;  // the longest
    if (backward) {
      for (int64_t step = length - 1; step >= -1; --step) at_step(step);
    } else {
      for (int64_t step = 0; step < length; ++step) at_step(step);
    }
  };
  const int64_t workers = a.plan.workers;
  if (a.plan.split_units) {
    const int64_t items = a.H * panels.count();
    const int64_t from = items * begin / workers, to = items * end / workers;
    sweep(0, a.B, [&](int64_t step) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t item = step & 1 ? from + to - 1 - i : i;
        body(item / panels.count(), item % panels.count(), 0, a.B, step);
      }
      team.wait();
    });
    return;
  }
  const int64_t tasks = a.H * a.plan.row_blocks;
  for (int64_t task = tasks * begin / workers; task < tasks * end / workers; ++task) {
    const int64_t head = task / a.plan.row_blocks, block = task % a.plan.row_blocks;
    const int64_t first = a.B * block / a.plan.row_blocks, last = a.B * (block + 1) / a.plan.row_blocks;
    sweep(first, last, [&](int64_t step) {
      for (int64_t i = 0; i < panels.count(); ++i) {
        body(head, step & 1 ? panels.count() - 1 - i : i, first, last, step);
      }
    });
  }
}

// ---- forward

template <class Cell, class S>
void run_forward(const Forward& a, int64_t begin, int64_t end) {
  using Real = Compute<S>;
  constexpr int L = LANES<Real>, G = Cell::GATES;
  const Panels panels = panels_of<S>(a, G, a.D);
  const Packed<S> weights = {a.packed, a.plan.narrow_weights};
  Team team(a.arrived, a.plan.workers, end - begin);

  if (!a.plan.unpacked) pack<S, G, false>(a, panels, begin, end);
  Input<S>* buffers = static_cast<Input<S>*>(a.product_input);
  const int64_t stride = product_stride(a.D, sizeof(Input<S>));
  if (begin == 0) clear_odd_end<S>(buffers, 2 * a.H * a.B, stride, a.D);
  for (int64_t item = a.H * a.B * begin / a.plan.workers; item < a.H * a.B * end / a.plan.workers; ++item) {
    const int64_t head = item / a.B, position = item % a.B;
    const Real* h0 = static_cast<const Real*>(a.state[0]) + (a.rows[position] * a.H + head) * a.D;
    for (int64_t k = 0; k < a.D; k += L) {
      store(buffers + item * stride + k, rounded<S>(load(h0 + k, a.D - k)), a.D - k);
    }
  }
  team.wait();

  for_each_step(
      a, panels, team, begin, end, false, [&](int64_t head, int64_t panel, int64_t first, int64_t last, int64_t step) {
        const int64_t width = panels.width_of(panel), vectors = G * width, unit0 = panel * panels.width * L;
        const Input<S>* input = buffers + ((step & 1) * a.H + head) * a.B * stride;
        Input<S>* output = buffers + (((step + 1) & 1) * a.H + head) * a.B * stride;
        for_each_tile(first, running(a, first, last, step), weights.most_rows(vectors), [&](int64_t from, int64_t to) {
          alignas(SEQOPS_VECTOR_BYTES) Real sums[MOST_SUMS * L];
          const int64_t offset = head * panels.head_size() + panels.offset(panel);
          const Input<S>* x = input + from * stride;
          if (a.plan.unpacked) {
            dot_products<S, G>(a, head, unit0, width, to - from, x, stride, sums);
          } else if constexpr (G > 1) {
            weights.template multiply<G>(offset, to - from, x, stride, a.D, sums);
          } else if (width == 1) {
            weights.template multiply<1>(offset, to - from, x, stride, a.D, sums);
          } else if (width == 2) {
            weights.template multiply<2>(offset, to - from, x, stride, a.D, sums);
          } else {
            weights.template multiply<4>(offset, to - from, x, stride, a.D, sums);
          }
          for (int64_t position = from; position < to; ++position) {
            for (int64_t w = 0; w < width && unit0 + w * L < a.D; ++w) {
              const int64_t unit = unit0 + w * L;
              Place<Real> at = place<Real>(a, position, step, head, unit, /*backward=*/false);
              at.product_input = output + position * stride + unit;
              Cell::template forward<S>(a, at, sums + ((position - from) * vectors + w) * L);
            }
          }
        });
      });
}

// What every cell does with its new h.
template <class S>
SEQOPS_INLINE void emit_h(const Forward& a, const Place<Compute<S>>& at, Vector<Compute<S>> h) {
  store(static_cast<Compute<S>*>(a.state[0]) + at.state, h, at.n);
  store(static_cast<S*>(a.h) + at.pair * at.values + at.lane0, h, at.n);
  store(static_cast<Input<S>*>(at.product_input), rounded<S>(h), at.n);
}

// Entry `index` of `count` in a cache [B, T, count, H, D].
template <class S>
SEQOPS_INLINE void emit_cache(void* cache, const Place<Compute<S>>& at, int count, int index,
                              Vector<Compute<S>> value) {
  store(static_cast<S*>(cache) + (at.pair * count + index) * at.values + at.lane0, value, at.n);
}

template <class S>
SEQOPS_INLINE Vector<Compute<S>> cached(const void* cache, const Place<Compute<S>>& at, int count, int index) {
  return load_and_prefetch(static_cast<const S*>(cache) + (at.pair * count + index) * at.values + at.lane0, at.n,
                           at.pair_ahead * count * at.values);
}

template <class S>
SEQOPS_INLINE Vector<Compute<S>> input_projection(const Forward& a, const Place<Compute<S>>& at, int gate) {
  const S* wx = static_cast<const S*>(a.wx) + at.row * a.stride_wx[0] + at.time * a.stride_wx[1];
  return load_and_prefetch(wx + gate * a.stride_wx[2] + at.head * a.stride_wx[3] + at.unit, at.n,
                           at.ahead * a.stride_wx[1]);
}

template <class S>
SEQOPS_INLINE Vector<Compute<S>> bias(const Forward& a, const Place<Compute<S>>& at, int gate) {
  if (a.b == nullptr) return Vector<Compute<S>>{};
  return load(static_cast<const Compute<S>*>(a.b) + gate * at.values + at.lane0, at.n);
}

template <class Real>
SEQOPS_INLINE Vector<Real> state(void* const* states, int index, const Place<Real>& at) {
  return load(static_cast<const Real*>(states[index]) + at.state, at.n);
}

template <class Real>
SEQOPS_INLINE void set_state(void* const* states, int index, const Place<Real>& at, Vector<Real> value) {
  store(static_cast<Real*>(states[index]) + at.state, value, at.n);
}

// ---- backward

template <class Cell, class S>
void run_backward(const Backward& a, int64_t begin, int64_t end) {
  using Real = Compute<S>;
  constexpr int L = LANES<Real>, G = Cell::GATES;
  const Panels panels = panels_of<S>(a, 1, G * a.D);
  const Packed<S> weights = {a.packed, a.plan.narrow_weights};
  Team team(a.arrived, a.plan.workers, end - begin);

  pack<S, G, true>(a, panels, begin, end);
  Input<S>* buffers = static_cast<Input<S>*>(a.product_input);
  const int64_t depth = G * a.D, stride = product_stride(depth, sizeof(Input<S>));
  if (begin == 0) clear_odd_end<S>(buffers, 2 * a.H * a.B, stride, depth);
  team.wait();

  for_each_step(
      a, panels, team, begin, end, true, [&](int64_t head, int64_t panel, int64_t first, int64_t last, int64_t step) {
        const int64_t width = panels.width_of(panel), unit0 = panel * panels.width * L;
        const Input<S>* following = buffers + (((step + 1) & 1) * a.H + head) * a.B * stride;
        Input<S>* current = buffers + ((step & 1) * a.H + head) * a.B * stride;
        const int64_t summed = running(a, first, last, step + 1);  // rows that have a step after this one
        const int64_t present = step < 0 ? summed : running(a, first, last, step);
        for_each_tile(first, present, weights.most_rows(width), [&](int64_t from, int64_t to) {
          alignas(SEQOPS_VECTOR_BYTES) Real sums[MOST_SUMS * L];
          const int64_t offset = head * panels.head_size() + panels.offset(panel);
          const int64_t rows = (to < summed ? to : summed) - from;
          const Input<S>* x = following + from * stride;
          if (rows > 0) {
            if (width == 1) {
              weights.template multiply<1>(offset, rows, x, stride, depth, sums);
            } else if (width == 2) {
              weights.template multiply<2>(offset, rows, x, stride, depth, sums);
            } else {
              weights.template multiply<4>(offset, rows, x, stride, depth, sums);
            }
          }
          for (int64_t position = from; position < to; ++position) {
            for (int64_t w = 0; w < width && unit0 + w * L < a.D; ++w) {
              const int64_t unit = unit0 + w * L;
              Place<Real> at = place<Real>(a, position, step, head, unit, /*backward=*/true);
              at.product_input = current + position * stride + unit;
              // dstate[0] holds the final h's gradient until the row's last step, then what skips the product (GRU)
              Vector<Real> e = {};
              if (at.last) {
                e = state<Real>(a.dstate, 0, at);
              } else {
                e = load(sums + ((position - from) * width + w) * L);
                if constexpr (Cell::CARRIES) e += state<Real>(a.dstate, 0, at);
                if (a.grad_clip >= 0) e = clamp<Real>(e, static_cast<Real>(a.grad_clip));
              }
              if (step < 0) {
                set_state<Real>(a.dstate, 0, at, e);
                Cell::template finish<S>(a, at);
                continue;
              }
              if (a.dh != nullptr) {
                const S* dh = static_cast<const S*>(a.dh) + at.row * a.stride_dh[0] + at.time * a.stride_dh[1];
                e += load_and_prefetch(dh + head * a.stride_dh[2] + unit, at.n, at.ahead * a.stride_dh[1]);
              }
              Cell::template backward<S>(a, at, e);
            }
          }
        });
      });
}

template <class S>
SEQOPS_INLINE void emit_dwx(const Backward& a, const Place<Compute<S>>& at, int gates, int gate,
                            Vector<Compute<S>> value) {
  store(static_cast<S*>(a.dwx) + (at.pair * gates + gate) * at.values + at.lane0, value, at.n);
}

// The gradient of gate `gate` of the product y.
template <class S>
SEQOPS_INLINE void emit_dy(const Backward& a, const Place<Compute<S>>& at, int gate, Vector<Compute<S>> value) {
  store(static_cast<Input<S>*>(at.product_input) + gate * a.D, value, at.n);
}

// A state before this step: from the cache of the step before, or the initial one.
template <class S>
SEQOPS_INLINE Vector<Compute<S>> previous(const Place<Compute<S>>& at, const void* cache, int count, int index,
                                          const void* initial) {
  if (!at.first) {
    return load_and_prefetch(static_cast<const S*>(cache) + (at.before * count + index) * at.values + at.lane0, at.n,
                             at.pair_ahead * count * at.values);
  }
  return initial == nullptr ? Vector<Compute<S>>{} : load(static_cast<const Compute<S>*>(initial) + at.state, at.n);
}

}  // namespace

#define SEQOPS_CELL_KERNELS(Cell)                                                                                      \
  {                                                                                                                    \
    {run_forward<Cell, float>, run_forward<Cell, double>, run_forward<Cell, bfloat16>, run_forward<Cell, float16>}, {  \
      run_backward<Cell, float>, run_backward<Cell, double>, run_backward<Cell, bfloat16>, run_backward<Cell, float16> \
    }                                                                                                                  \
  }

}  // namespace seqops::SEQOPS_ISA
