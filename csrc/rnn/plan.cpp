#include "plan.h"

#include <unistd.h>

#include <algorithm>

namespace seqops {
namespace {

// Cycles, of a core with one 512-bit or two 256-bit fused multiply-adds a cycle; only their ratios matter.
constexpr double FROM_L2 = 2;      // to load a vector of weights from L2 or nearer
constexpr double FROM_L3 = 6;      // from L3 or memory
constexpr double GATES_COST = 40;  // activations and states of one vector of units of one row
constexpr double BARRIER = 700;    // two threads meeting
constexpr double FORK = 10000;     // starting the other threads, once a call

constexpr int64_t FEW_ROWS = 2;              // up to here the product is a bandwidth-bound matrix-vector product
constexpr int64_t UNPACKED_ROWS_STEPS = 16;  // rows times steps below which packing r costs more than it saves

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return reported > 0 ? static_cast<int64_t>(reported) : int64_t{1} << 19;
  }();
  return bytes;
}

struct Model {
  const PlanRequest& q;
  const Tiles& tiles;
  int64_t lanes, vectors;  // vectors: of units of a head

  double head_bytes() const { return double(vectors) * lanes * q.gates * q.depth * q.input_bytes; }

  // One panel, all gates, `rows` rows; the first tile of rows brings the weights near.
  double panel(int64_t rows, int64_t width, bool fits_l2) const {
    const int64_t columns = q.gates * width;
    const int64_t tiles_of_rows = divide_up(rows, tiles.rows_of[columns]);
    const double a_tile = double(rows) / tiles_of_rows;
    const double first = std::max(a_tile, fits_l2 ? FROM_L2 : FROM_L3), others = std::max(a_tile, FROM_L2);
    return columns * q.depth * (first + others * (tiles_of_rows - 1)) + rows * width * GATES_COST;
  }
};

}  // namespace

Plan make_plan(const PlanRequest& q, const Tiles& tiles) {
  const Model model = {q, tiles, q.lanes, divide_up(q.D, q.lanes)};
  const double budget = 0.75 * l2_bytes();

  Plan plan = {};
  plan.unpacked = q.may_be_unpacked && q.B * q.T < UNPACKED_ROWS_STEPS;
  plan.narrow_weights = q.may_stay_narrow && q.B <= FEW_ROWS;
  // Wide panels give a single row enough independent sums; two vectors are enough otherwise.
  const auto width_for = [&](int64_t rows, int64_t vectors) -> int64_t {
    if (q.gates > 1) return 1;
    if (rows <= FEW_ROWS && vectors >= 4) return 4;
    return vectors >= 2 ? 2 : 1;
  };

  // whole sequences
  double best = 0;
  for (int64_t blocks = 1; blocks <= std::min(q.B, q.threads); ++blocks) {
    const int64_t rows = divide_up(q.B, blocks), tasks = q.H * blocks, workers = std::min(q.threads, tasks);
    const int64_t width = width_for(rows, model.vectors);
    const double cost = divide_up(tasks, workers) * divide_up(model.vectors, width) *
                            model.panel(rows, width, model.head_bytes() <= budget) +
                        (workers > 1 ? FORK / q.T : 0);
    if (blocks == 1 || cost < best) {
      best = cost;
      plan.workers = workers;
      plan.row_blocks = blocks;
      plan.split_units = false;
      plan.panel_width = width;
    }
  }
  // The same on one thread, without the cost of starting others.
  {
    const int64_t width = width_for(q.B, model.vectors);
    const double cost = q.H * divide_up(model.vectors, width) * model.panel(q.B, width, model.head_bytes() <= budget);
    if (cost < best) {
      best = cost;
      plan.workers = 1;
      plan.row_blocks = 1;
      plan.panel_width = width;
    }
  }
  // Units shared, one barrier a step.
  for (int64_t width = width_for(q.B, model.vectors); width >= 1; width /= 2) {
    const int64_t panels = q.H * divide_up(model.vectors, width), workers = std::min(q.threads, panels);
    if (workers < 2) continue;
    const bool fits = model.head_bytes() * q.H / workers <= budget;
    const double cost = divide_up(panels, workers) * model.panel(q.B, width, fits) + BARRIER + FORK / q.T;
    if (cost < best) {
      best = cost;
      plan.workers = workers;
      plan.row_blocks = 1;
      plan.split_units = true;
      plan.panel_width = width;
    }
  }
  return plan;
}

}  // namespace seqops
