// What the host side of both scans shares: checks, rows, layouts, and the plan of the work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <functional>
#include <vector>

#include "../common/rows.h"
#include "scan.h"

namespace seqops::scan {

// The kernels of the instruction set in use.
const LinearScanKernels& linear_scan_kernels();
const SoftmaxScanKernels& softmax_scan_kernels();

// ---- checks

bool is_complex(ScalarType dtype);
ScalarType complex_of(ScalarType real);
ScalarType real_part_of(ScalarType dtype);  // of a complex type its parts', else itself

// ---- the work

struct Work {
  int64_t channels;
  int64_t split_at;         // channels may be shared out in multiples of this; 0: not
  int64_t bytes;            // moved for one channel and step
  double reduce_cost;       // of reducing a chunk, where computing it is 1
  int64_t bytes_of_number;  // of one channel in the sequences
};

// Rows are shared out among workers, then parts of their channels. Where that leaves workers idle, long rows are cut
// into chunks 0 .. n: chunk 0 is computed while 1 .. n - 1 are only reduced to what they do to the carried state, then
// the states at their beginnings follow, and 1 .. n are computed. So n workers take 3 / (n + 2/3) of the time that one
// takes (at a reduce_cost of 2/3), and no step is computed in an order that depends on timing.
struct Plan {
  int64_t workers = 1;
  int64_t block = 1;              // steps taken together
  int64_t slots = 0;              // buffers of the carried state
  std::vector<Task> now, reduce;  // first region
  std::vector<Task> later;        // second region, when the chunks' states are known
  struct Chunked {
    int64_t row, slot, chunks;  // chunk i has slot + i
  };
  std::vector<Chunked> chunked;
  std::vector<int64_t> last_slot;  // of each row
};

Plan make_plan(const std::vector<Row>& rows, const Work& work);

// Runs the regions. `run(tasks, reduce)` returns what one worker does with a list of tasks; `join(chunked)` turns what
// the reduced chunks say into their first states, or returns false where that overflowed: then the chunks that were
// put off are computed one after the other.
void execute(Plan& plan, const std::vector<Row>& rows, const Work& work,
             const std::function<void(const std::vector<Task>&, bool reduce, int64_t* next, int64_t worker)>& run,
             const std::function<bool(const Plan::Chunked&)>& join);

// What a walk carries, a buffer for every slot: the final states themselves, or memory that also holds those of chunks.
class Carried {
 public:
  // The slots of rows and of their first chunks start from `states`, others from zeros.
  Carried(const Plan& plan, Tensor& states);
  char* data() const { return buffer_.get() == nullptr ? rows_ : static_cast<char*>(buffer_.get()); }
  void finish() const;  // the last slot of each row becomes its state

 private:
  char* slot(int64_t i) const { return data() + i * row_bytes_; }

  const Plan& plan_;
  int64_t row_bytes_;
  char* rows_;
  Scratch buffer_;
};

// A fresh state: a copy of `initial`, or zeros.
Tensor new_state(const Tensor& like, const Sizes& sizes, ScalarType dtype, const Optional& initial);

}  // namespace seqops::scan
