// grid_scan on the CPU: schema, checks, allocation, the order of the work, and the choice of kernel. See grid_scan.h.
#include "grid_scan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "host.h"

namespace seqops::scan {
namespace {

const GridScanKernels& grid_scan_kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::grid_scan_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("grid_scan: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

struct Shape {
  int64_t B, X, Y, H, D;
  Sizes nodes() const { return {B, X, Y, H, D}; }
};

struct Gates {
  Tensor rl;
  Optional ru, dl;
  Tensor du;
};

Shape check_nodes(const char* op, const char* name, const Tensor& x) {
  using enum ScalarType;
  check(x.dim() == 5, op, ": ", name, ": expected 5 dimensions [B, X, Y, H, D], got shape ", shape_text(x));
  check(x.size(3) >= 1 && x.size(4) >= 1, op, ": ", name, ": expected at least 1 head and 1 channel, got shape ",
        shape_text(x));
  check_type(op, name, x, {Float, Double, BFloat16, Half});
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
}

// A tensor like `like`, the first one.
void check_same(const char* op, const char* name, const Optional& t, const char* like_name, const Tensor& like,
                const Shape& s) {
  if (!t) return;
  check_device(op, name, *t, like_name, like);
  check_shape(op, name, *t, "[B, X, Y, H, D]", {s.B, s.X, s.Y, s.H, s.D});
  check_type(op, name, *t, {like.scalar_type()});
}

void check_gates(const char* op, const char* like_name, const Tensor& like, const Gates& gates, const Shape& s) {
  using enum ScalarType;
  const auto check_gate = [&](const char* name, const Optional& gate) {
    if (!gate) return;
    check_device(op, name, *gate, like_name, like);
    check_shape(op, name, *gate, "[B, X, Y, H]", {s.B, s.X, s.Y, s.H});
    if (like.scalar_type() == Double) {
      check_type(op, name, *gate, {BFloat16, Half, Float, Double});
    } else {
      check_type(op, name, *gate, {BFloat16, Half, Float});
    }
  };
  check_gate("t_rl", gates.rl), check_gate("t_ru", gates.ru);
  check_gate("t_dl", gates.dl), check_gate("t_du", gates.du);
}

void check_borders(const char* op, const char* like_name, const Tensor& like, const Optional& left, const Optional& top,
                   const Shape& s) {
  const auto check_border = [&](const char* name, const Optional& border, const char* letters, int64_t side) {
    if (!border) return;
    check_device(op, name, *border, like_name, like);
    check_shape(op, name, *border, letters, {s.B, side, s.H, s.D});
    check_type(op, name, *border, {like.scalar_type(), real_of(like.scalar_type())});
  };
  check_border("initial_left", left, "[B, Y, H, D]", s.Y);
  check_border("initial_top", top, "[B, X, H, D]", s.X);
}

// ---- layout

// The dtype that kernels read gates in: that of x where all of them have it.
ScalarType gate_type(const Gates& gates, ScalarType x) {
  const auto differs = [&](const Optional& gate) { return gate && gate->scalar_type() != x; };
  const bool other = differs(gates.rl) || differs(gates.ru) || differs(gates.dl) || differs(gates.du);
  return other ? real_of(x) : x;
}

Pair pair_of(ScalarType x, ScalarType gate) {
  using enum ScalarType;
  if (x == Double) return Pair::float64;
  if (x == Float) return Pair::float32;
  if (x == BFloat16) return gate == x ? Pair::bfloat16 : Pair::bfloat16_float32;
  return gate == x ? Pair::float16 : Pair::float16_float32;
}

// Which way a walk goes.
struct Directions {
  bool flip_x, flip_y;
  Directions turned() const { return {!flip_x, !flip_y}; }
};

// A tensor's strides along a walk; 0 for the dimension that it lacks.
Nodes along(const Tensor& t, const Directions& to, int64_t x_dim, int64_t y_dim, int64_t h_dim) {
  Nodes nodes = {const_cast<void*>(t.const_data_ptr()), t.stride(0), 0, 0, t.stride(h_dim)};
  int64_t offset = 0;
  const auto directed = [&](int64_t dim, bool flip) -> int64_t {
    if (dim < 0) return 0;
    if (flip && t.size(dim) > 0) offset += (t.size(dim) - 1) * t.stride(dim);
    return flip ? -t.stride(dim) : t.stride(dim);
  };
  nodes.x = directed(x_dim, to.flip_x), nodes.y = directed(y_dim, to.flip_y);
  nodes.data = static_cast<char*>(nodes.data) + offset * t.element_size();
  return nodes;
}

Nodes nodes_of(const Tensor& t, const Directions& to) { return along(t, to, 1, 2, 3); }
Nodes nodes_of(const Optional& t, const Directions& to) { return t ? nodes_of(*t, to) : Nodes{}; }
Border left_of(const Tensor& t, const Directions& to) { return along(t, to, -1, 1, 2); }
Border top_of(const Tensor& t, const Directions& to) { return along(t, to, 1, -1, 2); }

Tensor with_dense_heads(const Tensor& t) { return dense_from(t, 4) ? t : torch::stable::contiguous(t); }
Optional with_dense_heads(const Optional& t) { return t ? Optional(with_dense_heads(*t)) : t; }

Optional in_type(const Optional& t, ScalarType dtype) { return t ? Optional(as_type(*t, dtype)) : t; }

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) { return new_state(like, sizes, dtype, {}); }

// Kept while the kernel runs: what its arguments point to.
struct Held {
  Gates gates;
  Tensor nothing;  // a head of zeros
  Optional left, top;
};

// What both passes read: gates and borders.
Held place(GridScan& k, const Tensor& like, const Gates& gates, const Optional& left, const Optional& top,
           const Directions& to) {
  const ScalarType real = real_of(like.scalar_type()), gate = gate_type(gates, like.scalar_type());
  Held held = {{as_type(gates.rl, gate), in_type(gates.ru, gate), in_type(gates.dl, gate), as_type(gates.du, gate)},
               zeros(like, {k.D}, real),
               dense(left, real),
               dense(top, real)};
  k.t_rl = nodes_of(held.gates.rl, to), k.t_ru = nodes_of(held.gates.ru, to);
  k.t_dl = nodes_of(held.gates.dl, to), k.t_du = nodes_of(held.gates.du, to);
  const Border none = {const_cast<void*>(held.nothing.const_data_ptr()), 0, 0, 0, 0};
  k.left = held.left ? left_of(*held.left, to) : none;
  k.top = held.top ? top_of(*held.top, to) : none;
  return held;
}

// ---- the work

constexpr int64_t BYTES_OF_WORKER = 256 << 10;  // less is not worth waking another thread
constexpr int64_t BYTES_OF_PART = 1 << 10;   // of a node's values: shorter pieces waste what the processor prefetches
constexpr int64_t BYTES_OF_STRIP = 4 << 10;  // of a row's values: shorter ones are not worth waiting for

// Batch rows are shared out among workers, then parts of their heads, then strips of columns, which wait for each other.
void run(GridScan& k, Pair pair, bool backward, int64_t element_bytes, int64_t real_bytes) {
  const int64_t moved = (backward ? 6 : 4) * element_bytes * k.B * k.X * k.Y * k.H * k.D;
  const int64_t workers = std::clamp<int64_t>(moved / BYTES_OF_WORKER, 1, torch::stable::get_num_threads());
  const auto busy = [&](int64_t tasks) {  // the share of workers that have something to do
    return static_cast<double>(tasks) / static_cast<double>((tasks + workers - 1) / workers * workers);
  };
  const auto enough = [&](int64_t tasks) { return busy(tasks) > 0.85; };
  k.parts = k.strips = 1;
  const int64_t most_parts = std::clamp<int64_t>(k.H * k.D * element_bytes / BYTES_OF_PART, 1, k.H);
  while (!enough(k.B * k.parts) && k.parts < most_parts) ++k.parts;
  const int64_t row_bytes = k.Y * k.H * k.D / k.parts * element_bytes;
  const int64_t most_strips = std::clamp<int64_t>(row_bytes / BYTES_OF_STRIP, 1, k.Y);
  if (!enough(k.B * k.parts)) {
    k.parts = 1;
    k.strips = std::min(workers, most_strips);
  }
  const int64_t head_bytes = k.H * k.D * real_bytes, tasks = k.B * k.parts * k.strips;
  const Scratch buffer(workers * head_bytes), progress(tasks * 64);
  const Scratch hand_over(k.strips == 1 ? 0 : k.B * k.strips * k.X * head_bytes);
  std::memset(progress.get(), 0, tasks * 64);
  alignas(64) int64_t next = 0;
  k.buffer = buffer.get(), k.progress = static_cast<int64_t*>(progress.get()), k.hand_over = hand_over.get();
  k.next = &next;
  const GridScanKernels& kernels = grid_scan_kernels();
  const GridScanKernel kernel = (backward ? kernels.backward : kernels.forward)[static_cast<int>(pair)];
  if (workers == 1) return kernel(k, 0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) kernel(k, worker);
  });
}

GridScan sized(const Shape& s) {
  GridScan k = {};
  k.B = s.B, k.X = s.X, k.Y = s.Y, k.H = s.H, k.D = s.D;
  return k;
}

// ---- the operators

std::tuple<Tensor, Tensor> grid_scan(const Tensor& x_r, const Tensor& x_d, const Tensor& t_rl, Optional t_ru,
                                     Optional t_dl, const Tensor& t_du, Optional initial_left, Optional initial_top,
                                     bool flip_x, bool flip_y) {
  const char* op = "grid_scan";
  const Shape s = check_nodes(op, "x_r", x_r);
  check_same(op, "x_d", x_d, "x_r", x_r, s);
  const Gates gates = {t_rl, t_ru, t_dl, t_du};
  check_gates(op, "x_r", x_r, gates, s);
  check_borders(op, "x_r", x_r, initial_left, initial_top, s);

  const ScalarType dtype = x_r.scalar_type(), real = real_of(dtype);
  Tensor r = new_output(x_r, s.nodes(), dtype), d = new_output(x_r, s.nodes(), dtype);
  if (r.numel() == 0) return {r, d};
  const Tensor in_r = with_dense_heads(x_r), in_d = with_dense_heads(x_d);
  const Directions to = {flip_x, flip_y};
  GridScan k = sized(s);
  const Held held = place(k, x_r, gates, initial_left, initial_top, to);
  k.in_r = nodes_of(in_r, to), k.in_d = nodes_of(in_d, to), k.out_r = nodes_of(r, to), k.out_d = nodes_of(d, to);
  Optional carry;
  if (dtype != real) {
    carry = torch::stable::new_empty(x_r, Sizes{s.B, s.Y, s.H, s.D}, real);
    k.carry = left_of(*carry, to);
  }
  run(k, pair_of(dtype, held.gates.rl.scalar_type()), false, x_r.element_size(), real == ScalarType::Double ? 8 : 4);
  return {r, d};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grid_scan_backward(
    Optional dr, Optional dd, const Tensor& t_rl, Optional t_ru, Optional t_dl, const Tensor& t_du, Optional r,
    Optional d, Optional initial_left, Optional initial_top, bool flip_x, bool flip_y) {
  const char* op = "grid_scan_backward";
  check(dr || dd, op, ": dr: expected a tensor where dd is None, got None");
  const char* name = dr ? "dr" : "dd";
  const Tensor& like = dr ? *dr : *dd;
  const Shape s = check_nodes(op, name, like);
  check_same(op, "dd", dd, name, like, s);
  const Gates gates = {t_rl, t_ru, t_dl, t_du};
  check_gates(op, name, like, gates, s);
  check(!r || d, op, ": d: expected together with r, got None");
  check(!d || r, op, ": r: expected together with d, got None");
  check_same(op, "r", r, name, like, s), check_same(op, "d", d, name, like, s);
  check_borders(op, name, like, initial_left, initial_top, s);

  const ScalarType dtype = like.scalar_type(), real = real_of(dtype), gate = gate_type(gates, dtype);
  Tensor dx_r = new_output(like, s.nodes(), dtype), dx_d = new_output(like, s.nodes(), dtype);
  const auto new_gradient = [&](const Optional& of) {
    return torch::stable::new_empty(like, r && of ? Sizes{s.B, s.X, s.Y, s.H} : Sizes{0}, gate);
  };
  Tensor dt_rl = new_gradient(gates.rl), dt_ru = new_gradient(gates.ru), dt_dl = new_gradient(gates.dl),
         dt_du = new_gradient(gates.du);
  const Sizes left_sizes = {s.B, s.Y, s.H, s.D}, top_sizes = {s.B, s.X, s.H, s.D};
  const bool empty = dx_r.numel() == 0;
  const auto new_border = [&](const Sizes& sizes) {  // the walk writes all of it, if there is one
    return empty ? zeros(like, sizes, real) : torch::stable::new_empty(like, sizes, real);
  };
  Tensor dleft = new_border(left_sizes), dtop = new_border(top_sizes);
  if (!empty) {
    const Optional in_r = with_dense_heads(dr), in_d = with_dense_heads(dd), past_r = with_dense_heads(r),
                   past_d = with_dense_heads(d);
    const Directions to = Directions{flip_x, flip_y}.turned();
    GridScan k = sized(s);
    const Held held = place(k, like, gates, initial_left, initial_top, to);
    k.in_r = nodes_of(in_r, to), k.in_d = nodes_of(in_d, to);
    k.out_r = nodes_of(dx_r, to), k.out_d = nodes_of(dx_d, to);
    k.carry = left_of(dleft, to), k.end = top_of(dtop, to);
    if (r) {
      k.r = nodes_of(past_r, to), k.d = nodes_of(past_d, to);
      k.dt_rl = nodes_of(dt_rl, to), k.dt_du = nodes_of(dt_du, to);
      if (gates.ru) k.dt_ru = nodes_of(dt_ru, to);
      if (gates.dl) k.dt_dl = nodes_of(dt_dl, to);
    }
    run(k, pair_of(dtype, gate), true, like.element_size(), real == ScalarType::Double ? 8 : 4);
  }
  const auto as_given = [&](const Tensor& gradient, const Optional& of) {
    return of ? as_type(gradient, of->scalar_type()) : as_type(gradient, gates.rl.scalar_type());
  };
  return {dx_r,
          dx_d,
          as_given(dt_rl, gates.rl),
          as_given(dt_ru, gates.ru),
          as_given(dt_dl, gates.dl),
          as_given(dt_du, gates.du),
          dleft,
          dtop};
}

}  // namespace
}  // namespace seqops::scan

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "grid_scan(Tensor x_r, Tensor x_d, Tensor t_rl, Tensor? t_ru, Tensor? t_dl, Tensor t_du, *, "
      "Tensor? initial_left=None, Tensor? initial_top=None, bool flip_x=False, bool flip_y=False) "
      "-> (Tensor r, Tensor d)");
  m.def(
      "grid_scan_backward(Tensor? dr, Tensor? dd, Tensor t_rl, Tensor? t_ru, Tensor? t_dl, Tensor t_du, Tensor? r, "
      "Tensor? d, Tensor? initial_left, Tensor? initial_top, *, bool flip_x=False, bool flip_y=False) "
      "-> (Tensor dx_r, Tensor dx_d, Tensor dt_rl, Tensor dt_ru, Tensor dt_dl, Tensor dt_du, Tensor dinitial_left, "
      "Tensor dinitial_top)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("grid_scan", TORCH_BOX(&seqops::scan::grid_scan));
  m.impl("grid_scan_backward", TORCH_BOX(&seqops::scan::grid_scan_backward));
}
