// How the work of a recurrence is shared. Python decides, by the cost model of seqops/rnn/tiles.py and what was measured;
// the first call of a kind asks it, and the answer is remembered here. Where nobody is there to be asked, as in a process
// without Python, one rule serves. Every plan gives the same bits.
#pragma once

#include "rnn.h"

namespace seqops {

struct PlanRequest {
  const char* op;
  Cell cell;
  bool backward;
  Storage storage;
  int64_t B, T, H, D;
  int64_t gates;  // whose weights one panel interleaves: G forward, 1 backward
  int64_t lanes;
  bool may_stay_narrow;  // 16-bit weights that the product can widen as it reads them
  int64_t threads;
};

Plan make_plan(const PlanRequest& request);

// ---- what Python sees through ctypes: seqops/rnn/cpu.py has the same layouts

struct PlanQuestion {
  int64_t cell, backward, storage;  // as the enumerations in rnn.h count
  int64_t H, D;
  int64_t B, T;  // the upper edges of their buckets, or one more than the last edge
  int64_t threads;
  int64_t unpacked;
};

struct PlanAnswer {
  enum Status : int64_t { none, answered, failed, interrupted };
  int64_t status;  // starts as none
  int64_t workers, row_blocks, split_units, panel_width, narrow_weights;
  char error[1024];  // of a failure: what went wrong, ends with 0
};

using Planner = void (*)(const PlanQuestion*, PlanAnswer*);

}  // namespace seqops

#define SEQOPS_EXPORTED __attribute__((visibility("default")))

extern "C" {

// From now on calls ask `planner`; null: nobody. Edges ascend, and are copied.
SEQOPS_EXPORTED void seqops_rnn_set_planner(seqops::Planner planner, const int64_t* row_edges, int64_t row_count,
                                            const int64_t* step_edges, int64_t step_count);

// Every remembered plan is asked for again.
SEQOPS_EXPORTED void seqops_rnn_forget_plans();
}
