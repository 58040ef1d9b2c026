#include "plan.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace seqops {
namespace {

// Rows times steps below which packing r costs more than it saves. Dot products add in another order, so this is no
// plan's choice: which calls take them is documented.
constexpr int64_t UNPACKED_ROWS_STEPS = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- without anybody to ask

constexpr int64_t FEW_ROWS = 2;               // up to here the product is a bandwidth-bound matrix-vector product
constexpr int64_t SHARED_PRODUCTS = 1 << 19;  // multiply-adds of a call that are worth starting other threads
constexpr int64_t SPLIT_PRODUCTS = 1 << 17;   // of a step, that are worth a barrier

Plan default_plan(const PlanRequest& q, bool unpacked) {
  const int64_t vectors = divide_up(q.D, q.lanes), gates = q.cell == Cell::elman ? 1 : q.cell == Cell::gru ? 3 : 4;
  const int64_t products = gates * q.H * q.B * q.D * q.D;  // of a step
  Plan plan = {1, 1, false, 1, unpacked, q.may_stay_narrow && !unpacked && q.B <= FEW_ROWS};
  if (q.gates == 1 && vectors >= 2) plan.panel_width = q.B <= FEW_ROWS && vectors >= 4 ? 4 : 2;
  if (products * q.T < SHARED_PRODUCTS) return plan;
  if (q.H * q.B >= q.threads) {
    plan.row_blocks = std::min(q.B, divide_up(q.threads, q.H));
    plan.workers = std::min(q.threads, q.H * plan.row_blocks);
  } else if (products >= SPLIT_PRODUCTS) {
    plan.split_units = true;
    plan.workers = std::min(q.threads, q.H * divide_up(vectors, plan.panel_width));
  }
  return plan;
}

// ---- whom to ask

struct Asked {
  Planner planner;
  std::vector<int64_t> rows, steps;  // edges of the buckets
};

// What it pointed to before is never freed: another thread may be reading it.
std::atomic<const Asked*> asked{nullptr};

int64_t bucket_of(int64_t value, const std::vector<int64_t>& edges) {
  return std::lower_bound(edges.begin(), edges.end(), value) - edges.begin();
}

int64_t representative(int64_t bucket, const std::vector<int64_t>& edges) {
  return bucket < static_cast<int64_t>(edges.size()) ? edges[bucket] : (edges.empty() ? 1 : edges.back() + 1);
}

// ---- remembered plans. Nobody waits: a slot that is being written counts as one that holds something else. So a fork
// at any moment leaves the child a table that works, and an answer that finds no place is asked for again.

constexpr int KEY = 4, WORDS = KEY + 2;

struct alignas(64) Slot {
  std::atomic<uint64_t> version;  // odd while it is written
  std::atomic<uint64_t> words[WORDS];
};

constexpr uint64_t SLOTS = 1024, PLACES = 8;  // places: slots that an answer may lie in
Slot table[SLOTS];
std::atomic<uint64_t> generation{1};  // of what is remembered; an empty slot has 0

struct Key {
  uint64_t words[KEY];  // D, H, generation, everything else

  Slot& slot(uint64_t place) const {
    uint64_t hash = 0;
    for (const uint64_t word : words) hash = (hash ^ word ^ (hash >> 29)) * 0x9e3779b97f4a7c15;
    return table[((hash >> 32) + place) % SLOTS];
  }
};

Key key_of(const PlanRequest& q, bool unpacked, int64_t rows, int64_t steps) {
  const uint64_t kind = static_cast<uint64_t>(q.cell) | static_cast<uint64_t>(q.storage) << 2 |
                        uint64_t{q.backward} << 4 | uint64_t{unpacked} << 5;
  const uint64_t rest = kind | uint64_t(rows) << 8 | uint64_t(steps) << 16 | uint64_t(q.threads) << 32;
  return {{uint64_t(q.D), uint64_t(q.H), generation.load(std::memory_order_acquire), rest}};
}

bool remembered(const Key& key, Plan& plan) {
  for (uint64_t place = 0; place < PLACES; ++place) {
    const Slot& slot = key.slot(place);
    const uint64_t version = slot.version.load(std::memory_order_acquire);
    uint64_t words[WORDS];
    for (int i = 0; i < WORDS; ++i) words[i] = slot.words[i].load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (version % 2 == 1 || slot.version.load(std::memory_order_relaxed) != version) continue;
    if (!std::equal(key.words, key.words + KEY, words)) continue;
    const uint64_t sizes = words[KEY], flags = words[KEY + 1];
    plan = {int64_t(sizes & 0xffffffff), int64_t(sizes >> 32), (flags & 1) != 0,
            int64_t(flags >> 8),         (flags & 2) != 0,     (flags & 4) != 0};
    return true;
  }
  return false;
}

void remember(const Key& key, const Plan& plan) {
  Plan known;
  if (remembered(key, known)) return;  // another thread asked the same
  Slot* slot = &key.slot(0);
  for (uint64_t place = 0; place < PLACES; ++place) {
    if (key.slot(place).words[2].load(std::memory_order_relaxed) != key.words[2]) {
      slot = &key.slot(place);
      break;
    }
  }
  uint64_t version = slot->version.load(std::memory_order_relaxed);
  if (version % 2 == 1 || !slot->version.compare_exchange_strong(version, version + 1)) return;
  std::atomic_thread_fence(std::memory_order_release);
  for (int i = 0; i < KEY; ++i) slot->words[i].store(key.words[i], std::memory_order_relaxed);
  const uint64_t flags = uint64_t{plan.split_units} | uint64_t{plan.unpacked} << 1 | uint64_t{plan.narrow_weights} << 2;
  slot->words[KEY].store(uint64_t(plan.workers) | uint64_t(plan.row_blocks) << 32, std::memory_order_relaxed);
  slot->words[KEY + 1].store(flags | uint64_t(plan.panel_width) << 8, std::memory_order_relaxed);
  slot->version.store(version + 2, std::memory_order_release);
}

// ---- asking

// What is wrong with a plan, or an empty text.
std::string flaw(const PlanRequest& q, bool unpacked, const PlanAnswer& a) {
  std::ostringstream text;
  const auto within = [&](const char* name, int64_t value, int64_t least, int64_t most) {
    if (text.tellp() == 0 && (value < least || value > most)) {
      text << name << ": expected " << least << " to " << most << ", got " << value;
    }
  };
  within("workers", a.workers, 1, q.threads);
  within("split_units", a.split_units, 0, 1);
  within("row_blocks", a.row_blocks, 1, a.split_units ? 1 : q.B);
  within("panel_width", a.panel_width, 1, q.gates == 1 ? 4 : 1);
  if (text.tellp() == 0 && a.panel_width == 3) text << "panel_width: expected 1, 2 or 4, got 3";
  within("narrow_weights", a.narrow_weights, 0, q.may_stay_narrow && !unpacked ? 1 : 0);
  return text.str();
}

thread_local bool asking = false;

struct WhileAsking {
  WhileAsking() { asking = true; }
  ~WhileAsking() { asking = false; }
};

PlanAnswer ask(Planner planner, const PlanQuestion& question) {
  const WhileAsking now;
  PlanAnswer answer = {};
  planner(&question, &answer);
  return answer;
}

}  // namespace

Plan make_plan(const PlanRequest& q) {
  const bool unpacked = !q.backward && q.B * q.T < UNPACKED_ROWS_STEPS;
  const Asked* whom = asked.load(std::memory_order_acquire);
  // Whoever is asked may call the operator, once more on the same thread.
  if (whom == nullptr || asking) return default_plan(q, unpacked);
  const int64_t rows = bucket_of(q.B, whom->rows), steps = bucket_of(q.T, whom->steps);
  const Key key = key_of(q, unpacked, rows, steps);
  Plan plan;
  if (remembered(key, plan) && plan.row_blocks <= q.B) return plan;

  const PlanQuestion question = {static_cast<int64_t>(q.cell),
                                 q.backward,
                                 static_cast<int64_t>(q.storage),
                                 q.H,
                                 q.D,
                                 representative(rows, whom->rows),
                                 representative(steps, whom->steps),
                                 q.threads,
                                 unpacked};
  const PlanAnswer answer = ask(whom->planner, question);
  const std::string name = std::string(q.op) + (q.backward ? "_backward" : "");
  switch (answer.status) {
    case PlanAnswer::answered: break;
    case PlanAnswer::failed: throw std::runtime_error(name + ": no plan to share the work: " + answer.error);
    case PlanAnswer::interrupted:
      std::raise(SIGINT);  // once more, for Python to see when this call is over
      return default_plan(q, unpacked);
    default: throw std::runtime_error(name + ": no plan to share the work: the planner gave no answer");
  }
  const std::string wrong = flaw(q, unpacked, answer);
  if (!wrong.empty()) throw std::runtime_error(name + ": impossible plan to share the work: " + wrong);
  plan = {answer.workers,     answer.row_blocks, answer.split_units != 0,
          answer.panel_width, unpacked,          answer.narrow_weights != 0};
  remember(key, plan);
  return plan;
}

}  // namespace seqops

void seqops_rnn_set_planner(seqops::Planner planner, const int64_t* row_edges, int64_t row_count,
                            const int64_t* step_edges, int64_t step_count) {
  using seqops::Asked, seqops::asked;
  const auto edges = [](const int64_t* first, int64_t count) {
    return std::vector<int64_t>(first, first + std::min<int64_t>(count, 255));  // the key has eight bits for each
  };
  asked.store(planner == nullptr ? nullptr
                                 : new Asked{planner, edges(row_edges, row_count), edges(step_edges, step_count)});
  seqops_rnn_forget_plans();
}

void seqops_rnn_forget_plans() { seqops::generation.fetch_add(1); }
