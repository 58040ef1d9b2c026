// How a recurrence is shared among threads, and which register tiles it uses: a cost in processor cycles a step for each
// way, and the cheapest. Nothing depends on measurements of the run, so equal calls give equal bits.
#pragma once

#include "rnn.h"

namespace seqops {

struct PlanRequest {
  int64_t B, T, H, D;
  int64_t gates;  // gates whose weights one panel interleaves: G forward, 1 backward
  int64_t depth;  // length of the product's sums: D forward, G * D backward
  int64_t lanes;
  int64_t input_bytes;   // of an element of the product's input, and of a packed weight unless that stays narrow
  bool may_stay_narrow;  // 16-bit weights that the product can widen as it reads them
  int64_t threads;
  bool may_be_unpacked;  // forward
};

Plan make_plan(const PlanRequest& request, const Tiles& tiles);

}  // namespace seqops
