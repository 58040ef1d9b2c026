// How a kernel goes through its tasks.
#pragma once

#include "../common/vector.h"
#include "scan.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class T>
SEQOPS_INLINE Bits<T> lane_numbers() {
  Bits<T> lanes = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES<T>; ++lane) lanes[lane] = lane;
  return lanes;
}

// In each of the first WIDTH lanes the sum of every WIDTH-th lane from there, halves added to halves.
template <class T, int WIDTH = 1>
SEQOPS_INLINE Vector<T> lane_sums(Vector<T> v) {
#pragma GCC unroll 4
  for (int half = LANES<T> / 2; half >= WIDTH; half /= 2) v += permute<T>(v, lane_numbers<T>() ^ half);
  return v;
}

template <class Arguments, class Run>
SEQOPS_INLINE void for_each_task(const Arguments& k, Run run) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(k.next, 1, __ATOMIC_RELAXED);
    if (task >= k.count) return;
    run(k.tasks[task]);
  }
}

// Where a walk is: `step` is its first step's time, `forward` the direction.
struct Walk {
  int64_t batch, time, direction;

  Walk(const Tasks& k, const Task& task) {
    const Row& row = k.rows[task.row];
    batch = row.batch;
    direction = k.descending ? -1 : 1;
    time = k.descending ? row.first + row.steps - 1 - task.begin : row.first + task.begin;
  }

  // The element of `sequence` at the walk's i-th step from here.
  template <class E>
  SEQOPS_INLINE E* at(const Sequence& sequence, int64_t i, int64_t width) const {
    E* data = static_cast<E*>(sequence.data);
    return data == nullptr ? nullptr : data + (batch * sequence.row + (time + direction * i) * sequence.step) * width;
  }
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
