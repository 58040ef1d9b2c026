// The forward of one item, chunk by chunk.
#pragma once

#include "memory_tile.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class S>
struct MemoryForward {
  using T = Compute<S>;
  static constexpr int64_t ROWS = Memory::ROWS;

  const Memory& k;
  Arena<T> arena;
  Layers<S> layers;
  Chunk<S> chunk;
  T *m, *c;      // [column_row], [ROWS][column_row]: m_t, and c of the rows of a block
  T *q, *h, *o;  // [ROWS] rows

  MemoryForward(const Memory& k, void* buffers)
      : k(k), arena{static_cast<T*>(buffers)}, layers(k, arena), chunk(k, layers, arena, false) {
    const int64_t row = chunk.column_row, D = whole<T>(k.D);
    m = arena.take(row), c = arena.take(ROWS * row);
    q = arena.take(ROWS * D), h = arena.take(ROWS * layers[1].in_row), o = arena.take(ROWS * D);
  }

  static int64_t buffers_size(const Memory& k) { return MemoryForward(k, nullptr).arena.taken * sizeof(T); }

  static void run(const Memory& k, int64_t number, void* buffers) { MemoryForward(k, buffers).march({k, number}); }

  void march(const MemoryItem<S>& item) {
    layers.load_state(item.item, k.w, k.s);
    for (int64_t i = 0; i < k.chunks(); ++i) {
      if (k.states != nullptr && i % k.segment == 0) layers.save(item.item, i / k.segment);
      chunk.load_chunk(item, i);
      const T* last = outputs(item);
      chunk.update(layers, m, last, i + 1 == k.chunks());
    }
    layers.store_state(item.item, k.w_out, k.s_out);
  }

  // Of the chunk's tokens; returns the last row of c.
  const T* outputs(const MemoryItem<S>& item) {
    const int64_t row = chunk.column_row, columns = whole<T>(chunk.n), D = whole<T>(k.D);
    const T* before = c;
    clear(columns, m), clear(columns, c);
    for (int64_t first = 0; first < chunk.n; first += ROWS) {
      const int64_t rows = chunk.n - first < ROWS ? chunk.n - first : ROWS;
      for (int64_t t = 0; t < rows; ++t) {
        chunk.coefficients.next(first + t, columns, m, before, m, c + t * row);
        before = c + t * row;
      }
      item.load_rows(k.q, chunk.start + first, rows, q, D);
      if (k.linear()) {
        chunk.tile(0, first, rows, q, c, o, false);
        item.store_rows(k.o, chunk.start + first, rows, o, D);
      } else {
        chunk.tile(0, first, rows, q, c, h, false);
        for_each(rows, layers[1].in_row, h, layers[1].in_row, [](Vector<T> x) { return silu<T>(x); });
        chunk.tile(1, first, rows, h, c, q, true);
        item.store_rows(k.o, chunk.start + first, rows, q, D);
      }
    }
    return before;
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
