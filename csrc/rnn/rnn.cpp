// Recurrent networks on the CPU: schemas, checks, allocation, and the choice of kernel. See rnn.h for the notation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "host.h"
#include "plan.h"
#include "rnn.h"

namespace seqops {
namespace {

// ---- cells

struct CellFacts {
  const char* name;
  int64_t gates;
  const char* state_names[MOST_STATES];
  double state_defaults[MOST_STATES];
  int64_t caches;     // values a unit and step in `cache`
  bool caches_state;  // and in `cache_state`
};

constexpr CellFacts FACTS[] = {
    {"lstm", 4, {"h0", "c0"}, {0, 0}, 4, true},
    {"gru", 3, {"h0"}, {0}, 3, true},
    {"slstm", 4, {"h0", "c0", "n0", "m0"}, {0, 0, 0, -HUGE_VAL}, 7, false},
    {"elman", 1, {"h0"}, {0}, 0, false},
};

const CellFacts& facts(Cell cell) { return FACTS[static_cast<int>(cell)]; }

const CellKernels& kernels(Cell cell) { return *kernels_in_use().cells[static_cast<int>(cell)]; }

// ---- checks

Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: return Storage::float32;
  }
}

struct Shape {
  int64_t B, T, H, D;
};

// Biases and states: wx's dtype or, for 16-bit wx, float32.
void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  const ScalarType got = t.scalar_type(), real = real_of(dtype);
  check(got == dtype || got == real, op, ": ", name, ": expected ", dtype_text(dtype),
        real == dtype ? "" : " or float32", ", got ", dtype_text(got));
}

Shape check_inputs(const char* op, int64_t gates, const Tensor& wx, const Tensor& r) {
  check(wx.dim() == 5, op, ": wx: expected 5 dimensions [B, T, G, H, D], got shape ", shape_text(wx));
  const ScalarType dtype = wx.scalar_type();
  check(is_storage(dtype), op, ": wx: expected float32, float64, bfloat16 or float16, got ", dtype_text(dtype));
  check(wx.size(2) == gates, op, ": wx: expected ", gates, gates == 1 ? " gate" : " gates",
        " (dimension 2), got shape ", shape_text(wx));
  const Shape s = {wx.size(0), wx.size(1), wx.size(3), wx.size(4)};
  check(s.H >= 1 && s.D >= 1, op, ": wx: expected at least 1 head and 1 unit, got shape ", shape_text(wx));
  check_device(op, "r", r, "wx", wx);
  check_shape(op, "r", r, "[G, H, D, D]", {gates, s.H, s.D, s.D});
  check(r.scalar_type() == dtype, op, ": r: expected wx's dtype ", dtype_text(dtype), ", got ",
        dtype_text(r.scalar_type()));
  return s;
}

void check_state(const char* op, const char* name, const Optional& t, const Tensor& wx, const Shape& s) {
  if (!t) return;
  check_device(op, name, *t, "wx", wx);
  check_shape(op, name, *t, "[B, H, D]", {s.B, s.H, s.D});
  check_dtype(op, name, *t, wx.scalar_type());
}

std::vector<int64_t> check_lengths(const char* op, const Optional& lengths, const Tensor& wx, const Shape& s) {
  std::vector<int64_t> values(s.B, s.T);
  if (!lengths) return values;
  check_device(op, "lengths", *lengths, "wx", wx);
  const ScalarType dtype = lengths->scalar_type();
  check(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": lengths: expected int32 or int64, got ",
        dtype_text(dtype));
  check_shape(op, "lengths", *lengths, "[B]", {s.B});
  for (int64_t i = 0; i < s.B; ++i) {
    const int64_t at = i * lengths->stride(0);
    values[i] = dtype == ScalarType::Int ? static_cast<const int32_t*>(lengths->const_data_ptr())[at]
                                         : static_cast<const int64_t*>(lengths->const_data_ptr())[at];
    check(values[i] >= 0 && values[i] <= s.T, op, ": lengths: expected values in [0, T] = [0, ", s.T, "], got ",
          values[i], " at index ", i);
  }
  return values;
}

void check_grad_clip(const char* op, std::optional<double> grad_clip) {
  if (!grad_clip || *grad_clip >= 0) return;
  check(false, op, ": grad_clip: expected a number >= 0, got ", std::isnan(*grad_clip) ? "nan" : "", [&] {
    std::ostringstream text;
    if (!std::isnan(*grad_clip)) text << *grad_clip;
    return text.str();
  }());
}

bool is_relu(const std::string& nonlinearity) {
  check(nonlinearity == "tanh" || nonlinearity == "relu", "elman: nonlinearity: expected 'tanh' or 'relu', got '",
        nonlinearity, "'");
  return nonlinearity == "relu";
}

// ---- layout: sequences are batch first or, when wx is a transposed view of a time-first tensor, time first in memory,
// so that neither side of a time-first model copies

bool time_first(const Tensor& t) { return t.stride(0) < t.stride(1); }

Tensor new_sequence(const Tensor& like, bool time_is_first, Sizes sizes) {
  if (time_is_first) std::swap(sizes[0], sizes[1]);
  Tensor t = torch::stable::new_empty(like, sizes);
  prefer_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return time_is_first ? torch::stable::transpose(t, 0, 1) : t;
}

// `t` itself where it is contiguous in that order, else a copy that is.
Tensor in_order(const Tensor& t, bool time_is_first) {
  if (!time_is_first) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 0, 1)), 0, 1);
}

Tensor last_dimension_dense(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) == 1 ? t : torch::stable::contiguous(t);
}

// A fresh state tensor: a copy of `initial`, or filled with `otherwise`. Small, so filled without calling torch.
Tensor new_state(const Tensor& wx, const Shape& s, ScalarType real, const Optional& initial, double otherwise) {
  const int64_t sizes[] = {s.B, s.H, s.D}, count = s.B * s.H * s.D;
  Tensor state = torch::stable::new_empty(wx, sizes, real);
  if (initial) {
    torch::stable::copy_(state, *initial);
  } else if (real == ScalarType::Double) {
    std::fill_n(static_cast<double*>(state.mutable_data_ptr()), count, otherwise);
  } else {
    std::fill_n(static_cast<float*>(state.mutable_data_ptr()), count, static_cast<float>(otherwise));
  }
  return state;
}

// Bytes past a row's length, in every one of these sequences: zero.
void clear_padding(std::initializer_list<Tensor> sequences, const std::vector<int64_t>& lengths) {
  for (const Tensor& t : sequences) {
    const int64_t T = t.size(1), pair = t.numel() / (t.size(0) * T) * t.element_size();
    const int64_t row = t.stride(0) * t.element_size(), step = t.stride(1) * t.element_size();
    for (int64_t b = 0; b < t.size(0); ++b) {
      char* p = static_cast<char*>(t.mutable_data_ptr()) + b * row;
      if (step == pair) {
        std::memset(p + lengths[b] * step, 0, (T - lengths[b]) * pair);
      } else {
        for (int64_t i = lengths[b]; i < T; ++i) std::memset(p + i * step, 0, pair);
      }
    }
  }
}

// ---- running a recurrence

// What both passes set up: the shape, rows sorted by length, the plan, the packed weights and the product's input.
class Run {
 public:
  Run(Cell cell, const Tensor& like, const Shape& s, const Tensor& r, const std::vector<int64_t>& lengths,
      bool backward)
      : weights_(last_dimension_dense(r)), rows_(s.B), lengths_(s.B) {
    std::iota(rows_.begin(), rows_.end(), 0);
    std::stable_sort(rows_.begin(), rows_.end(), [&](int64_t i, int64_t j) { return lengths[i] > lengths[j]; });
    for (int64_t i = 0; i < s.B; ++i) lengths_[i] = lengths[rows_[i]];

    const int64_t G = facts(cell).gates, gates = backward ? 1 : G, depth = backward ? G * s.D : s.D;
    const Tiles& tiles = *kernels_in_use().tiles;
    const ScalarType dtype = like.scalar_type();
    const bool pairs = tiles.bfloat16_pairs && dtype == ScalarType::BFloat16;
    const int64_t lanes = dtype == ScalarType::Double ? tiles.lanes_double : tiles.lanes_float;
    const int64_t input_bytes = pairs ? 2 : (dtype == ScalarType::Double ? 8 : 4);
    plan_ = make_plan({facts(cell).name, cell, backward, storage_of(dtype), s.B, s.T, s.H, s.D, gates, lanes,
                       /*may_stay_narrow=*/like.element_size() == 2 && !pairs, team_size()});
    if (!plan_.unpacked) {
      const Panels panels = {s.D, lanes, plan_.panel_width, gates, packed_depth(depth, pairs)};
      packed_ = Scratch(s.H * panels.head_size() * (plan_.narrow_weights ? 2 : input_bytes));
    }
    product_input_ = Scratch(2 * s.H * s.B * product_stride(depth, input_bytes) * input_bytes);
  }

  void fill(Recurrence& a, const Shape& s, bool reverse, bool time_is_first) {
    a.B = s.B, a.T = s.T, a.H = s.H, a.D = s.D;
    a.lengths = lengths_.data();
    a.rows = rows_.data();
    a.reverse = reverse;
    a.plan = plan_;
    a.arrived = &arrived_;
    a.r = weights_.const_data_ptr();
    for (int i = 0; i < 4; ++i) a.stride_r[i] = weights_.stride(i);
    a.packed = packed_.get();
    a.steps = time_is_first ? Steps{1, s.B} : Steps{s.T, 1};
  }

  void* product_input() const { return product_input_.get(); }

  template <class Arguments, class Kernel>
  void start(const Arguments& a, Kernel kernel) const {
    torch::stable::parallel_for(0, plan_.workers, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }

 private:
  Tensor weights_;
  std::vector<int64_t> rows_, lengths_;  // by position
  Plan plan_;
  Scratch packed_, product_input_;
  alignas(64) int64_t arrived_ = 0;
};

struct ForwardResult {
  Tensor h;
  std::vector<Tensor> states;
  Optional cache, cache_state;
};

ForwardResult forward(Cell cell, const Tensor& wx, const Tensor& r, const Optional& b,
                      std::initializer_list<const Optional*> initial, const Optional& lengths, bool reverse,
                      std::optional<double> grad_clip, bool train, const std::string& nonlinearity = "tanh") {
  const CellFacts& cell_facts = facts(cell);
  const char* op = cell_facts.name;
  const int64_t G = cell_facts.gates;
  const Shape s = check_inputs(op, G, wx, r);
  const ScalarType real = real_of(wx.scalar_type());
  if (b) {
    check_device(op, "b", *b, "wx", wx);
    check_shape(op, "b", *b, "[G, H, D]", {G, s.H, s.D});
    check_dtype(op, "b", *b, wx.scalar_type());
  }
  int index = 0;
  for (const Optional* state : initial) check_state(op, cell_facts.state_names[index++], *state, wx, s);
  const std::vector<int64_t> row_lengths = check_lengths(op, lengths, wx, s);
  check_grad_clip(op, grad_clip);
  const bool relu = is_relu(nonlinearity);

  const Tensor x = last_dimension_dense(wx);
  const bool time_is_first = time_first(wx);
  ForwardResult out;
  out.h = new_sequence(wx, time_is_first, {s.B, s.T, s.H, s.D});
  index = 0;
  for (const Optional* state : initial) {
    out.states.push_back(new_state(wx, s, real, *state, cell_facts.state_defaults[index++]));
  }
  if (train && cell_facts.caches > 0) {
    out.cache = new_sequence(wx, time_is_first, {s.B, s.T, cell_facts.caches, s.H, s.D});
    if (cell_facts.caches_state) out.cache_state = new_sequence(wx, time_is_first, {s.B, s.T, s.H, s.D});
  }
  if (s.B == 0 || s.T == 0) return out;

  const Optional bias = dense(b, real);
  Run run(cell, wx, s, r, row_lengths, /*backward=*/false);
  Forward a = {};
  run.fill(a, s, reverse, time_is_first);
  a.relu = relu;
  a.wx = x.const_data_ptr();
  const int64_t dims[] = {0, 1, 2, 3};
  for (const int64_t d : dims) a.stride_wx[d] = x.stride(d);
  a.b = data(bias);
  a.h = out.h.mutable_data_ptr();
  for (size_t i = 0; i < out.states.size(); ++i) a.state[i] = out.states[i].mutable_data_ptr();
  a.cache = out.cache ? out.cache->mutable_data_ptr() : nullptr;
  a.cache_state = out.cache_state ? out.cache_state->mutable_data_ptr() : nullptr;
  a.product_input = run.product_input();
  run.start(a, kernels(cell).forward[static_cast<int>(storage_of(wx.scalar_type()))]);

  if (lengths) {
    clear_padding({out.h}, row_lengths);
    if (out.cache) clear_padding({*out.cache}, row_lengths);
    if (out.cache_state) clear_padding({*out.cache_state}, row_lengths);
  }
  return out;
}

struct BackwardInputs {
  const Optional& dh;
  std::vector<Optional> dstates;  // of the final states; a missing one is zero
  const Tensor& r;
  const Tensor& like;  // [B, T, ..., H, D]: gives shape, dtype and layout
  Optional cache, cache_state, h;
  std::vector<Optional> initial, final;
};

// The backward operators are called by our own formulas, yet must not crash for others either.
Shape check_backward(const CellFacts& cell, const BackwardInputs& in) {
  const std::string name = std::string(cell.name) + "_backward";
  const char* op = name.c_str();
  const int64_t dims = cell.caches > 0 ? 5 : 4;
  const char* like_name = cell.caches == 0 ? "h" : (cell.caches_state ? "p" : "cache");
  check(in.like.dim() == dims, op, ": ", like_name, ": expected ", dims, " dimensions, got shape ",
        shape_text(in.like));
  const ScalarType dtype = in.like.scalar_type();
  check(is_storage(dtype), op, ": ", like_name, ": expected float32, float64, bfloat16 or float16, got ",
        dtype_text(dtype));
  const Shape s = {in.like.size(0), in.like.size(1), in.like.size(dims - 2), in.like.size(dims - 1)};
  const auto sequence = [&](const char* argument, const Optional& t) {
    if (!t) return;
    check_device(op, argument, *t, like_name, in.like);
    check_shape(op, argument, *t, "[B, T, H, D]", {s.B, s.T, s.H, s.D});
    check(t->scalar_type() == dtype, op, ": ", argument, ": expected ", dtype_text(dtype), ", got ",
          dtype_text(t->scalar_type()));
  };
  if (dims == 5) check_shape(op, like_name, in.like, "[B, T, G, H, D]", {s.B, s.T, cell.caches, s.H, s.D});
  check(s.H >= 1 && s.D >= 1, op, ": ", like_name, ": expected at least 1 head and 1 unit, got shape ",
        shape_text(in.like));
  check_device(op, "r", in.r, like_name, in.like);
  check_shape(op, "r", in.r, "[G, H, D, D]", {cell.gates, s.H, s.D, s.D});
  check(in.r.scalar_type() == dtype, op, ": r: expected ", dtype_text(dtype), ", got ", dtype_text(in.r.scalar_type()));
  sequence("dh", in.dh);
  sequence(cell.gates == 3 ? "y" : "c", in.cache_state);
  sequence("h", in.h);
  const auto states = [&](const std::vector<Optional>& tensors, const char* argument) {
    for (const Optional& t : tensors) check_state(op, argument, t, in.like, s);
  };
  states(in.dstates, "gradient of a final state");
  states(in.initial, "initial state");
  states(in.final, "final state");
  return s;
}

struct BackwardResult {
  Tensor dwx;
  std::vector<Tensor> dstates;
  Optional dy;
};

BackwardResult backward(Cell cell, const BackwardInputs& in, const Optional& lengths, bool reverse,
                        std::optional<double> grad_clip, bool relu = false) {
  check_grad_clip(facts(cell).name, grad_clip);
  const CellFacts& cell_facts = facts(cell);
  const Tensor& like = in.like;
  const Shape s = check_backward(cell_facts, in);
  const ScalarType real = real_of(like.scalar_type());
  const bool time_is_first = time_first(like);
  const std::vector<int64_t> row_lengths = check_lengths(cell_facts.name, lengths, like, s);

  BackwardResult out;
  out.dwx = new_sequence(like, time_is_first, {s.B, s.T, cell_facts.gates, s.H, s.D});
  if (cell == Cell::gru) out.dy = new_sequence(like, time_is_first, {s.B, s.T, s.H, s.D});
  for (const Optional& dstate : in.dstates) out.dstates.push_back(new_state(like, s, real, dstate, 0));
  if (s.B == 0 || s.T == 0) return out;

  const auto ordered = [&](const Optional& t) { return t ? Optional(in_order(*t, time_is_first)) : t; };
  const Optional cache = ordered(in.cache), cache_state = ordered(in.cache_state), h = ordered(in.h);
  const Optional dh = in.dh ? Optional(last_dimension_dense(*in.dh)) : in.dh;
  Run run(cell, like, s, in.r, row_lengths, /*backward=*/true);
  Backward a = {};
  run.fill(a, s, reverse, time_is_first);
  a.relu = relu;
  a.dh = data(dh);
  if (dh) {
    for (int i = 0; i < 3; ++i) a.stride_dh[i] = dh->stride(i);
  }
  std::vector<Optional> states;  // keeps what the pointers below point to
  states.reserve(in.initial.size() + in.final.size());
  for (size_t i = 0; i < in.initial.size(); ++i) {
    a.initial[i] = data(states.emplace_back(dense(in.initial[i], real)));
  }
  for (size_t i = 0; i < in.final.size(); ++i) a.final[i] = data(states.emplace_back(dense(in.final[i], real)));
  for (size_t i = 0; i < out.dstates.size(); ++i) a.dstate[i] = out.dstates[i].mutable_data_ptr();
  a.cache = data(cache);
  a.cache_state = data(cache_state);
  a.h = data(h);
  a.grad_clip = grad_clip.value_or(-1);
  a.dwx = out.dwx.mutable_data_ptr();
  a.dy = out.dy ? out.dy->mutable_data_ptr() : nullptr;
  a.product_input = run.product_input();
  run.start(a, kernels(cell).backward[static_cast<int>(storage_of(like.scalar_type()))]);

  if (lengths) {
    clear_padding({out.dwx}, row_lengths);
    if (out.dy) clear_padding({*out.dy}, row_lengths);
  }
  return out;
}

// ---- operators

std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& wx, const Tensor& r, Optional b, Optional h0, Optional c0,
                                        Optional lengths, bool reverse, std::optional<double> grad_clip) {
  auto out = forward(Cell::lstm, wx, r, b, {&h0, &c0}, lengths, reverse, grad_clip, false);
  return {out.h, out.states[0], out.states[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& wx, const Tensor& r, Optional b,
                                                                Optional h0, Optional c0, Optional lengths,
                                                                bool reverse, std::optional<double> grad_clip) {
  auto out = forward(Cell::lstm, wx, r, b, {&h0, &c0}, lengths, reverse, grad_clip, true);
  return {out.h, out.states[0], out.states[1], *out.cache, *out.cache_state};
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward(Optional dh, Optional dh_n, Optional dc_n, const Tensor& r,
                                                 const Tensor& p, const Tensor& c, Optional c0, Optional lengths,
                                                 bool reverse, std::optional<double> grad_clip) {
  auto out = backward(Cell::lstm, {dh, {dh_n, dc_n}, r, p, p, c, {}, {{}, c0}, {}}, lengths, reverse, grad_clip);
  return {out.dwx, out.dstates[0], out.dstates[1]};
}

std::tuple<Tensor, Tensor> gru(const Tensor& wx, const Tensor& r, Optional b, Optional h0, Optional lengths,
                               bool reverse, std::optional<double> grad_clip) {
  auto out = forward(Cell::gru, wx, r, b, {&h0}, lengths, reverse, grad_clip, false);
  return {out.h, out.states[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_forward(const Tensor& wx, const Tensor& r, Optional b, Optional h0,
                                                       Optional lengths, bool reverse,
                                                       std::optional<double> grad_clip) {
  auto out = forward(Cell::gru, wx, r, b, {&h0}, lengths, reverse, grad_clip, true);
  return {out.h, out.states[0], *out.cache, *out.cache_state};
}

std::tuple<Tensor, Tensor, Tensor> gru_backward(Optional dh, Optional dh_n, const Tensor& r, const Tensor& p,
                                                const Tensor& y, const Tensor& h, Optional h0, Optional lengths,
                                                bool reverse, std::optional<double> grad_clip) {
  auto out = backward(Cell::gru, {dh, {dh_n}, r, p, p, y, h, {h0}, {}}, lengths, reverse, grad_clip);
  return {out.dwx, *out.dy, out.dstates[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> slstm(const Tensor& wx, const Tensor& r, Optional b, Optional h0,
                                                         Optional c0, Optional n0, Optional m0, Optional lengths,
                                                         bool reverse, std::optional<double> grad_clip) {
  auto out = forward(Cell::slstm, wx, r, b, {&h0, &c0, &n0, &m0}, lengths, reverse, grad_clip, false);
  return {out.h, out.states[0], out.states[1], out.states[2], out.states[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> slstm_forward(const Tensor& wx, const Tensor& r, Optional b,
                                                                         Optional h0, Optional c0, Optional n0,
                                                                         Optional m0, Optional lengths, bool reverse,
                                                                         std::optional<double> grad_clip) {
  auto out = forward(Cell::slstm, wx, r, b, {&h0, &c0, &n0, &m0}, lengths, reverse, grad_clip, true);
  return {out.h, out.states[0], out.states[1], out.states[2], out.states[3], *out.cache};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> slstm_backward(Optional dh, Optional dh_n, Optional dc_n,
                                                                  Optional dn_n, Optional dm_n, const Tensor& r,
                                                                  const Tensor& cache, const Tensor& c_n,
                                                                  const Tensor& n_n, Optional c0, Optional n0,
                                                                  Optional lengths, bool reverse,
                                                                  std::optional<double> grad_clip) {
  auto out =
      backward(Cell::slstm, {dh, {dh_n, dc_n, dn_n, dm_n}, r, cache, cache, {}, {}, {{}, c0, n0}, {{}, c_n, n_n}},
               lengths, reverse, grad_clip);
  return {out.dwx, out.dstates[0], out.dstates[1], out.dstates[2], out.dstates[3]};
}

std::tuple<Tensor, Tensor> elman(const Tensor& wx, const Tensor& r, Optional b, Optional h0, std::string nonlinearity,
                                 Optional lengths, bool reverse, std::optional<double> grad_clip) {
  auto out = forward(Cell::elman, wx, r, b, {&h0}, lengths, reverse, grad_clip, false, nonlinearity);
  return {out.h, out.states[0]};
}

std::tuple<Tensor, Tensor> elman_backward(Optional dh, Optional dh_n, const Tensor& r, const Tensor& h,
                                          std::string nonlinearity, Optional lengths, bool reverse,
                                          std::optional<double> grad_clip) {
  auto out = backward(Cell::elman, {dh, {dh_n}, r, h, {}, {}, h, {{}}, {}}, lengths, reverse, grad_clip,
                      is_relu(nonlinearity));
  return {out.dwx, out.dstates[0]};
}

}  // namespace
}  // namespace seqops

#define OPTIONS "Tensor? lengths=None, bool reverse=False, float? grad_clip=None"
#define LSTM_INPUTS "(Tensor wx, Tensor r, Tensor? b=None, Tensor? h0=None, Tensor? c0=None, *, " OPTIONS ")"
#define GRU_INPUTS "(Tensor wx, Tensor r, Tensor? b=None, Tensor? h0=None, *, " OPTIONS ")"
#define SLSTM_INPUTS                                                                                           \
  "(Tensor wx, Tensor r, Tensor? b=None, Tensor? h0=None, Tensor? c0=None, Tensor? n0=None, Tensor? m0=None, " \
  "*, " OPTIONS ")"

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("lstm" LSTM_INPUTS " -> (Tensor h, Tensor h_n, Tensor c_n)");
  m.def("lstm_forward" LSTM_INPUTS " -> (Tensor h, Tensor h_n, Tensor c_n, Tensor p, Tensor c)");
  m.def("lstm_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor r, Tensor p, Tensor c, Tensor? c0, *, " OPTIONS
        ") -> (Tensor dwx, Tensor dh0, Tensor dc0)");
  m.def("gru" GRU_INPUTS " -> (Tensor h, Tensor h_n)");
  m.def("gru_forward" GRU_INPUTS " -> (Tensor h, Tensor h_n, Tensor p, Tensor y)");
  m.def("gru_backward(Tensor? dh, Tensor? dh_n, Tensor r, Tensor p, Tensor y, Tensor h, Tensor? h0, *, " OPTIONS
        ") -> (Tensor dwx, Tensor dy, Tensor dh0)");
  m.def("slstm" SLSTM_INPUTS " -> (Tensor h, Tensor h_n, Tensor c_n, Tensor n_n, Tensor m_n)");
  m.def("slstm_forward" SLSTM_INPUTS " -> (Tensor h, Tensor h_n, Tensor c_n, Tensor n_n, Tensor m_n, Tensor cache)");
  m.def(
      "slstm_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor? dn_n, Tensor? dm_n, Tensor r, Tensor cache, "
      "Tensor c_n, Tensor n_n, Tensor? c0, Tensor? n0, *, " OPTIONS
      ") -> (Tensor dwx, Tensor dh0, Tensor dc0, Tensor dn0, Tensor dm0)");
  m.def("elman(Tensor wx, Tensor r, Tensor? b=None, Tensor? h0=None, *, str nonlinearity=\"tanh\", " OPTIONS
        ") -> (Tensor h, Tensor h_n)");
  m.def("elman_backward(Tensor? dh, Tensor? dh_n, Tensor r, Tensor h, *, str nonlinearity=\"tanh\", " OPTIONS
        ") -> (Tensor dwx, Tensor dh0)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("lstm", TORCH_BOX(&seqops::lstm));
  m.impl("lstm_forward", TORCH_BOX(&seqops::lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&seqops::lstm_backward));
  m.impl("gru", TORCH_BOX(&seqops::gru));
  m.impl("gru_forward", TORCH_BOX(&seqops::gru_forward));
  m.impl("gru_backward", TORCH_BOX(&seqops::gru_backward));
  m.impl("slstm", TORCH_BOX(&seqops::slstm));
  m.impl("slstm_forward", TORCH_BOX(&seqops::slstm_forward));
  m.impl("slstm_backward", TORCH_BOX(&seqops::slstm_backward));
  m.impl("elman", TORCH_BOX(&seqops::elman));
  m.impl("elman_backward", TORCH_BOX(&seqops::elman_backward));
}
