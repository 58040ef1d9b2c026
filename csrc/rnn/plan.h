// How a recurrence is shared among threads, and which register tiles it uses: a cost in processor cycles a step for each
// way, and the cheapest. Nothing depends on measurements of the run, so equal calls give equal bits.
#pragma once

#include "rnn.h"

namespace seqops {

struct PlanRequest {
  int64_t B, T, H, D;
  int64_t gates;         // gates whose weights one panel interleaves: G forward, 1 backward
  int64_t depth;         // length of the product's sums: D forward, G * D backward
  int64_t weight_bytes;  // of one weight as stored; 2 allows narrow weights
  int64_t real_bytes;
  int64_t threads;
  bool allow_unpacked;  // forward
};

Plan make_plan(const PlanRequest& request, const Tiles& tiles);

}  // namespace seqops
