// Who does what: see Plan in host.h.
#include <algorithm>
#include <cmath>

#include "host.h"

namespace seqops::scan {
namespace {

constexpr int64_t BYTES_OF_WORKER = 256 << 10;  // less is not worth waking another thread
constexpr int64_t BYTES_OF_PART = 16 << 10;     // of a step: shorter pieces of it waste what the processor prefetches
constexpr int64_t STEPS_OF_CHUNK = 64;
constexpr int64_t BYTES_OF_BLOCK = 512;  // more at a time are too many streams of memory

// The fewest parts of the channels with which workers are about equally busy.
int64_t parts_for(int64_t rows, int64_t workers, const Work& work) {
  if (work.split_at == 0 || rows == 0) return 1;
  const int64_t most = std::min(work.channels / work.split_at, work.channels * work.bytes_of_number / BYTES_OF_PART);
  int64_t best = 1;
  double least = HUGE_VAL;
  for (int64_t parts = 1; parts <= std::min(most, workers); ++parts) {
    const int64_t tasks = rows * parts;
    const double turns = static_cast<double>((tasks + workers - 1) / workers) / static_cast<double>(parts);
    if (turns < 0.9 * least) least = turns, best = parts;
  }
  return best;
}

void add(std::vector<Task>& tasks, int64_t row, int64_t begin, int64_t steps, int64_t slot, const Work& work,
         int64_t parts) {
  if (steps == 0) return;
  const int64_t units = work.split_at == 0 ? 1 : work.channels / work.split_at;
  const int64_t unit = work.split_at == 0 ? work.channels : work.split_at;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = units * part / parts * unit;
    const int64_t to = part + 1 == parts ? work.channels : units * (part + 1) / parts * unit;
    tasks.push_back({row, begin, steps, from, to - from, slot});
  }
}

}  // namespace

Plan make_plan(const std::vector<Row>& rows, const Work& work) {
  Plan plan;
  const int64_t count = static_cast<int64_t>(rows.size());
  int64_t total = 0, running = 0;
  for (const Row& row : rows) total += row.steps, running += row.steps > 0;
  const int64_t bytes = total * work.channels * work.bytes;
  plan.workers = std::clamp<int64_t>(bytes / BYTES_OF_WORKER, 1, torch::stable::get_num_threads());
  const int64_t parts = plan.workers == 1 ? 1 : parts_for(running, plan.workers, work);
  while (plan.block < STEPS && 2 * plan.block * work.channels * work.bytes_of_number <= BYTES_OF_BLOCK) plan.block *= 2;
  plan.slots = count;
  plan.last_slot.resize(count);
  for (int64_t r = 0; r < count; ++r) {
    plan.last_slot[r] = r;
    const int64_t steps = rows[r].steps;
    // Workers that this row deserves by its length, beyond those that share its channels.
    int64_t n =
        total == 0 ? 1 : std::llround(static_cast<double>(plan.workers * steps) / static_cast<double>(total * parts));
    n = std::min(n, steps / STEPS_OF_CHUNK);
    if (n < 2) {
      add(plan.now, r, 0, steps, r, work, parts);
      continue;
    }
    // Chunk 0 is to take as long as reducing one of the others.
    const double each = static_cast<double>(steps) / (static_cast<double>(n) + work.reduce_cost);
    const int64_t first = std::llround(each * work.reduce_cost), slot = plan.slots;
    add(plan.now, r, 0, first, slot, work, parts);
    for (int64_t i = 1; i <= n; ++i) {
      const int64_t begin = first + (steps - first) * (i - 1) / n, end = first + (steps - first) * i / n;
      if (i < n) add(plan.reduce, r, begin, end - begin, slot + i, work, parts);
      add(plan.later, r, begin, end - begin, slot + i, work, parts);
    }
    plan.slots += n + 1;
    plan.chunked.push_back({r, slot, n + 1});
    plan.last_slot[r] = slot + n;
  }
  // The longest first, so that no worker is left with one at the end.
  for (std::vector<Task>* tasks : {&plan.now, &plan.reduce, &plan.later}) {
    std::stable_sort(tasks->begin(), tasks->end(),
                     [](const Task& a, const Task& b) { return a.steps * a.channels > b.steps * b.channels; });
  }
  return plan;
}

void execute(Plan& plan, const std::vector<Row>& rows, const Work& work,
             const std::function<void(const std::vector<Task>&, bool reduce, int64_t* next, int64_t worker)>& run,
             const std::function<bool(const Plan::Chunked&)>& join) {
  alignas(64) int64_t next_reduce = 0;
  alignas(64) int64_t next = 0;
  const auto region = [&](const std::vector<Task>& tasks, const std::vector<Task>& reduce) {
    if (plan.workers == 1) {
      run(tasks, false, &next, 0);
      return;
    }
    torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        if (!reduce.empty()) run(reduce, true, &next_reduce, worker);
        run(tasks, false, &next, worker);
      }
    });
  };
  region(plan.now, plan.reduce);
  if (plan.chunked.empty()) return;
  for (const Plan::Chunked& chunked : plan.chunked) {
    if (join(chunked)) continue;
    std::erase_if(plan.later, [&](const Task& task) { return task.row == chunked.row; });
    int64_t begin = rows[chunked.row].steps;
    for (const Task& task : plan.reduce) {
      if (task.row == chunked.row) begin = std::min(begin, task.begin);
    }
    add(plan.later, chunked.row, begin, rows[chunked.row].steps - begin, chunked.slot + chunked.chunks - 1, work, 1);
  }
  next = 0;
  region(plan.later, {});
}

}  // namespace seqops::scan
