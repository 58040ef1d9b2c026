// causal_conv1d on the CPU: schema, checks, allocation, and who does what. See conv.h for the notation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../common/rows.h"
#include "conv.h"

namespace seqops::conv {
namespace {

const CausalConv1dKernels& kernels() {
#define SEQOPS_CASE(name) \
  case Isa::name: return name::causal_conv1d_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_CASE)
    default: throw std::runtime_error("causal_conv1d: no kernels for this instruction set");
  }
#undef SEQOPS_CASE
}

// ---- checks

struct Arguments {
  const Tensor& x;
  const Tensor& weight;
  const Optional& bias;
  const Optional& initial_state;
  int64_t dilation;
  const std::optional<std::string>& activation;
  const Optional& cu_seqlens;

  int64_t B() const { return x.size(0); }
  int64_t T() const { return x.size(1); }
  int64_t D() const { return x.size(2); }
  int64_t W() const { return weight.size(1); }
  int64_t S() const { return (W() - 1) * dilation; }
};

void check_like_x(const char* op, const char* name, const Tensor& t, const Tensor& x, const char* letters,
                  std::initializer_list<int64_t> sizes, bool may_be_wide) {
  check_device(op, name, t, "x", x);
  check_shape(op, name, t, letters, sizes);
  const ScalarType dtype = x.scalar_type();
  check_type(op, name, t, {dtype, may_be_wide ? real_of(dtype) : dtype});
}

std::vector<Row> check_arguments(const char* op, const Arguments& a) {
  using enum ScalarType;
  check(a.x.dim() == 3, op, ": x: expected 3 dimensions [B, T, D], got shape ", shape_text(a.x));
  check_type(op, "x", a.x, {Float, Double, BFloat16, Half});
  check(a.x.size(2) >= 1, op, ": x: expected at least 1 channel, got shape ", shape_text(a.x));
  check_device(op, "weight", a.weight, "x", a.x);
  check(a.weight.dim() == 2 && a.weight.size(0) == a.D() && a.W() >= 1, op,
        ": weight: expected [D, W] with D = ", a.D(), " and W >= 1, got ", shape_text(a.weight));
  check_type(op, "weight", a.weight, {a.x.scalar_type(), real_of(a.x.scalar_type())});
  if (a.bias) check_like_x(op, "bias", *a.bias, a.x, "[D]", {a.D()}, true);
  check(a.dilation >= 1, op, ": dilation: expected an integer >= 1, got ", a.dilation);
  check(a.dilation <= (int64_t{1} << 40) / a.W(), op, ": dilation: expected (W - 1) * dilation below 2**40, got ",
        a.dilation);
  check(!a.activation || *a.activation == "silu", op, ": activation: expected None or 'silu', got '",
        a.activation.value_or(""), "'");
  std::vector<Row> rows = rows_of(op, "x", a.x, a.cu_seqlens);
  if (a.initial_state) {
    check_like_x(op, "initial_state", *a.initial_state, a.x,
                 a.cu_seqlens ? "[N, (W - 1) * dilation, D]" : "[B, (W - 1) * dilation, D]",
                 {static_cast<int64_t>(rows.size()), a.S(), a.D()}, false);
  }
  return rows;
}

// ---- who does what

constexpr int64_t BYTES_OF_WORKER = 256 << 10;  // less is not worth waking another thread
constexpr int64_t CACHE = 384 << 10;            // of what a task goes back to: most of a second-level cache
constexpr int64_t BYTES_OF_PIECE = 256;         // of a step, the least that is read at a time
constexpr int64_t STEPS_OF_TASK = 256;

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// How tasks go through steps and channels.
struct March {
  int64_t run;       // see CausalConv1d
  int64_t channels;  // of a task
};

// `rows` of `bytes` a channel and a run of `time` steps are what a task reads again; the fewest channels are a piece.
int64_t channels_for(const Arguments& a, int64_t bytes, int64_t rows, int64_t piece) {
  const int64_t size = a.x.element_size(), unit = std::max<int64_t>(piece / size, 1);
  const int64_t each = bytes * rows + 2 * 8 * a.W();  // and the taps and their gradients
  return std::clamp<int64_t>(CACHE / each / unit * unit, std::min(unit, a.D()), a.D());
}

March march_of(const Arguments& a, int64_t steps) {
  const int64_t size = a.x.element_size(), block = kernels().outputs * a.dilation;
  const int64_t span = std::min(a.S() + 2 * block, steps);
  const int64_t piece = BYTES_OF_PIECE / size;
  if (span * std::min(piece, a.D()) * size <= CACHE) return {block, channels_for(a, size, span, BYTES_OF_PIECE)};
  // What lies between two steps of a class does not fit: one class at a time, whose rows do.
  return {rounded_up(std::max(steps, int64_t{1}), a.dilation),
          channels_for(a, size, a.W() + 2 * kernels().outputs, BYTES_OF_PIECE)};
}

struct Plan {
  int64_t workers = 1;
  int64_t most_channels = 0;
  int64_t slots = 0;
  std::vector<ConvTask> tasks;
  std::vector<int64_t> units = {0};
};

int64_t workers_for(const Arguments& a) {
  const int64_t bytes = 2 * a.x.numel() * a.x.element_size() * (1 + a.W() / 16);
  return std::clamp<int64_t>(bytes / BYTES_OF_WORKER, 1, torch::stable::get_num_threads());
}

// Every task by itself, of any length: steps do not depend on each other.
Plan plan_forward(const Arguments& a, const std::vector<Row>& rows, const March& march) {
  Plan plan;
  plan.workers = workers_for(a);
  plan.most_channels = march.channels;
  const int64_t parts = (a.D() + march.channels - 1) / march.channels;
  const int64_t share = (a.T() * a.B() * parts + 4 * plan.workers - 1) / (4 * plan.workers);
  const int64_t least = std::max(STEPS_OF_TASK, 2 * std::min(a.S(), march.run));
  const int64_t most = std::max(plan.workers == 1 ? a.T() : share, least);
  for (int64_t r = 0; r < static_cast<int64_t>(rows.size()); ++r) {
    for (int64_t c = 0; c < a.D(); c += march.channels) {
      for (int64_t t = 0; t < rows[r].steps; t += most) {
        plan.tasks.push_back({r, t, std::min(most, rows[r].steps - t), c, std::min(march.channels, a.D() - c), 0});
        plan.units.push_back(static_cast<int64_t>(plan.tasks.size()));
      }
    }
  }
  return plan;
}

// Gradients of the taps are summed by slot, a piece of work of about so many steps, then slot by slot. Slots depend on
// sizes alone, so that sums do not depend on the number of threads.
Plan plan_backward(const Arguments& a, const std::vector<Row>& rows, const March& march) {
  Plan plan;
  plan.workers = workers_for(a);
  plan.most_channels = march.channels;
  const int64_t steps = std::max({4 * STEPS_OF_TASK, 4 * a.W(), 4 * std::min(a.S(), a.T())});
  std::vector<std::vector<ConvTask>> slots;
  int64_t left = 0;
  for (int64_t r = 0; r < static_cast<int64_t>(rows.size()); ++r) {
    const int64_t pieces = std::max<int64_t>((rows[r].steps + steps / 2) / steps, 1);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = rows[r].steps * i / pieces, to = rows[r].steps * (i + 1) / pieces;
      if (left <= 0) slots.emplace_back(), left = steps;
      left -= std::max<int64_t>(2 * (to - from), 1);
      slots.back().push_back({r, from, to - from, 0, 0, static_cast<int64_t>(slots.size()) - 1});
    }
  }
  plan.slots = static_cast<int64_t>(slots.size());
  for (const std::vector<ConvTask>& slot : slots) {
    for (int64_t c = 0; c < a.D(); c += march.channels) {
      for (ConvTask task : slot) {
        task.channel = c, task.channels = std::min(march.channels, a.D() - c);
        plan.tasks.push_back(task);
      }
      plan.units.push_back(static_cast<int64_t>(plan.tasks.size()));
    }
  }
  return plan;
}

void run(CausalConv1d& k, const Plan& plan, const std::vector<Row>& rows, CausalConv1dKernel kernel, int64_t real,
         bool backward) {
  alignas(64) int64_t next = 0;
  k.rows = rows.data(), k.tasks = plan.tasks.data(), k.units = plan.units.data();
  k.count = static_cast<int64_t>(plan.units.size()) - 1, k.next = &next;
  k.most_channels = rounded_up(plan.most_channels, 64);
  const int64_t pointers = rounded_up((k.W + kernels().outputs) * sizeof(void*), 64);
  k.scratch_bytes =
      k.most_channels * real + pointers + (backward ? pointers + k.kept * k.most_channels * real : 0) + 64;
  k.scratch_bytes = rounded_up(k.scratch_bytes, 64);
  const Scratch scratch(plan.workers * k.scratch_bytes);
  k.scratch = scratch.get();
  if (plan.workers == 1) return kernel(k, 0);
  torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) kernel(k, worker);
  });
}

int storage_of(ScalarType dtype) {
  using enum ScalarType;
  return static_cast<int>(
      dtype == Float
          ? Storage::float32
          : (dtype == Double ? Storage::float64 : (dtype == BFloat16 ? Storage::bfloat16 : Storage::float16)));
}

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

// The arguments of a kernel, and what they point into.
struct Prepared {
  Tensor x, weight, bias;
  Optional initial;
  CausalConv1d k = {};
};

Prepared prepare(const Arguments& a) {
  const ScalarType dtype = a.x.scalar_type(), real = real_of(dtype);
  Prepared p{with_dense_steps(a.x), torch::stable::contiguous(as_type(torch::stable::transpose(a.weight, 0, 1), real)),
             a.bias ? *dense(a.bias, real) : zeros(a.x, {a.D()}, real), dense(a.initial_state, dtype)};
  p.k.D = a.D(), p.k.W = a.W(), p.k.dilation = a.dilation, p.k.silu = a.activation.has_value();
  p.k.x = sequence(p.x, a.B(), a.T());
  p.k.weight = p.weight.const_data_ptr(), p.k.bias = p.bias.const_data_ptr(), p.k.initial = data(p.initial);
  return p;
}

// The last S rows of the state and x one after the other, a row as it is stored.
Tensor final_state(const Arguments& a, const Prepared& p, const std::vector<Row>& rows) {
  const int64_t S = a.S(), size = a.x.element_size(), bytes = a.D() * size, N = static_cast<int64_t>(rows.size());
  Tensor state = new_output(a.x, {N, S, a.D()}, a.x.scalar_type());
  char* out = static_cast<char*>(state.mutable_data_ptr());
  for (int64_t r = 0; r < N && S > 0; ++r) {
    const int64_t kept = std::max<int64_t>(S - rows[r].steps, 0), first = rows[r].steps - (S - kept);
    if (p.k.initial == nullptr) {
      std::memset(out, 0, kept * bytes);
    } else {
      std::memcpy(out, static_cast<const char*>(p.k.initial) + ((r + 1) * S - kept) * bytes, kept * bytes);
    }
    out += kept * bytes;
    for (int64_t t = first; t < rows[r].steps; ++t, out += bytes) {
      const int64_t at = rows[r].batch * p.k.x.row + (rows[r].first + t) * p.k.x.step;
      std::memcpy(out, static_cast<const char*>(p.k.x.data) + at * size, bytes);
    }
  }
  return state;
}

// ---- forward

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, Optional bias, Optional initial_state,
                                         int64_t dilation, std::optional<std::string> activation, Optional cu_seqlens) {
  const Arguments a = {x, weight, bias, initial_state, dilation, activation, cu_seqlens};
  const std::vector<Row> rows = check_arguments("causal_conv1d", a);
  Prepared p = prepare(a);
  Tensor y = new_output(x, {a.B(), a.T(), a.D()}, x.scalar_type());
  if (y.numel() > 0) {
    const March march = march_of(a, a.T());
    p.k.run = march.run;
    p.k.y = sequence(y, a.B(), a.T());
    run(p.k, plan_forward(a, rows, march), rows, kernels().forward[storage_of(x.scalar_type())],
        p.weight.element_size(), false);
  }
  return {y, final_state(a, p, rows)};
}

// ---- backward

// [slots, W + 1, D] summed in order: the gradients of the weights [D, W] and of the bias [D].
template <class Real>
void add_slots(Real* sums, int64_t slots, int64_t size) {
  for (int64_t slot = 1; slot < slots; ++slot) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[slot * size + i];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(Optional dy, Optional dfinal_state, const Tensor& x,
                                                                  const Tensor& weight, Optional bias,
                                                                  Optional initial_state, int64_t dilation,
                                                                  std::optional<std::string> activation,
                                                                  Optional cu_seqlens) {
  const char* op = "causal_conv1d_backward";
  const Arguments a = {x, weight, bias, initial_state, dilation, activation, cu_seqlens};
  const std::vector<Row> rows = check_arguments(op, a);
  const int64_t B = a.B(), T = a.T(), D = a.D(), W = a.W(), S = a.S(), N = static_cast<int64_t>(rows.size());
  if (dy) check_like_x(op, "dy", *dy, x, "[B, T, D]", {B, T, D}, false);
  if (dfinal_state) {
    check_like_x(op, "dfinal_state", *dfinal_state, x,
                 cu_seqlens ? "[N, (W - 1) * dilation, D]" : "[B, (W - 1) * dilation, D]", {N, S, D}, false);
  }
  const ScalarType dtype = x.scalar_type(), real = real_of(dtype);
  Prepared p = prepare(a);
  const Optional grad = dy ? Optional(with_dense_steps(*dy)) : dy, dfinal = dense(dfinal_state, dtype);
  Tensor dx = new_output(x, {B, T, D}, dtype);
  Tensor dinitial = new_output(x, initial_state ? Sizes{N, S, D} : Sizes{0}, dtype);

  // Steps of a run stay in the cache together with what is kept of them: runs are short.
  March march = march_of(a, T);
  const bool keeps = p.k.silu;
  const int64_t block = kernels().outputs * dilation;
  if (keeps) {
    march.run = std::min(march.run, block);
    p.k.kept = std::max<int64_t>(std::min(S + march.run, T), 1);
    march.channels = channels_for(a, real == dtype ? 2 * x.element_size() : 8, p.k.kept + block, 64);
  }
  p.k.run = march.run;
  const Plan plan = plan_backward(a, rows, march);
  Tensor sums = zeros(x, {std::max<int64_t>(plan.slots, 1), W + 1, D}, real);
  p.k.dy = sequence(grad, B, T);
  p.k.dx = sequence(dx, B, T);
  p.k.dfinal = data(dfinal);
  p.k.dinitial = initial_state ? dinitial.mutable_data_ptr() : nullptr;
  p.k.sums = sums.mutable_data_ptr();
  run(p.k, plan, rows, kernels().backward[storage_of(dtype)], p.weight.element_size(), true);
  if (real == ScalarType::Double) {
    add_slots(static_cast<double*>(p.k.sums), plan.slots, (W + 1) * D);
  } else {
    add_slots(static_cast<float*>(p.k.sums), plan.slots, (W + 1) * D);
  }
  Tensor total = torch::stable::select(sums, 0, 0);
  Tensor dweight = torch::stable::new_empty(weight, {D, W}, weight.scalar_type());
  torch::stable::copy_(dweight, torch::stable::transpose(torch::stable::narrow(total, 0, 0, W), 0, 1));
  Tensor dbias = torch::stable::new_empty(x, bias ? Sizes{D} : Sizes{0}, bias ? bias->scalar_type() : real);
  if (bias) torch::stable::copy_(dbias, torch::stable::select(total, 0, W));
  return {dx, dweight, dbias, dinitial};
}

}  // namespace
}  // namespace seqops::conv

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, *, int dilation=1, "
      "str? activation=None, Tensor? cu_seqlens=None) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, *, int dilation=1, str? activation=None, Tensor? cu_seqlens=None) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&seqops::conv::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&seqops::conv::causal_conv1d_backward));
}
