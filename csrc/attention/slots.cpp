// Rows by index on the CPU: schemas, checks, allocation, counting sort, and copies. See slots.h.
#include "slots.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "../common/rows.h"

namespace seqops {
namespace {

const SlotKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::slot_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("gather_rows: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

int type_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    default: return 3;
  }
}

constexpr int64_t MOST = 2147483647;  // slots or rows: lists are int32

// ---- checks

void check_most(const char* op, const char* name, int64_t value) {
  check(value >= 0 && value <= MOST, op, ": ", name, ": expected 0 to ", MOST, ", got ", value);
}

void check_rows(const char* op, const char* name, const Tensor& x, const char* letters) {
  check(x.dim() == 4, op, ": ", name, ": expected 4 dimensions ", letters, ", got shape ", shape_text(x));
  check_type(op, name, x, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  check(x.size(2) >= 1 && x.size(3) >= 1, op, ": ", name, ": expected at least 1 head and 1 channel, got shape ",
        shape_text(x));
}

// Integers [1 or B, 1 or H, size].
void check_list(const char* op, const char* name, const Tensor& list, const char* like_name, const Tensor& like,
                int64_t B, int64_t H, int64_t size, ScalarType dtype) {
  check_device(op, name, list, like_name, like);
  check_type(op, name, list, {dtype});
  const bool good = list.dim() == 3 && (list.size(0) == 1 || list.size(0) == B) &&
                    (list.size(1) == 1 || list.size(1) == H) && list.size(2) == size;
  check(good, op, ": ", name, ": expected [1 or B, 1 or H, n] = [1 or ", B, ", 1 or ", H, ", ", size, "], got ",
        shape_text(list));
}

Reduce reduction(const char* op, const std::string& reduce) {
  if (reduce == "mean") return Reduce::mean;
  if (reduce == "sum") return Reduce::sum;
  check(reduce == "last", op, ": reduce: expected one of mean, sum, last, got '", reduce, "'");
  return Reduce::last;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensor dense_inside(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t); }
int64_t stride_of(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

InverseLists lists_of(const Tensor& order, const Tensor& starts) {
  return {static_cast<const int32_t*>(order.const_data_ptr()),
          static_cast<const int32_t*>(starts.const_data_ptr()),
          stride_of(order, 0),
          stride_of(order, 1),
          stride_of(starts, 0),
          stride_of(starts, 1)};
}

// Runs `work(worker)` on as many threads as are worth it for so many bytes moved.
template <class Work>
void parallel(int64_t tasks, double bytes, const Work& work) {
  constexpr double WORTH = 1 << 17;  // bytes that take as long as waking a thread
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::max<int64_t>(1, std::min({threads, tasks, static_cast<int64_t>(bytes / WORTH)}));
  if (workers == 1) return work();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work();
  });
}

// Rows of a task: about 64 KB of them.
int64_t rows_a_task(int64_t bytes_a_row) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, bytes_a_row)); }

// ---- counting_sort

template <class I>
void sort_one(const I* index, int64_t n, int64_t bins, int32_t* order, int32_t* starts, int32_t* cursors) {
  const auto bin = [&](int64_t i) { return index[i] >= 0 && index[i] < bins ? int64_t(index[i]) : bins; };
  std::memset(cursors, 0, (bins + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < n; ++i) ++cursors[bin(i)];
  int32_t before = 0;
  for (int64_t t = 0; t <= bins; ++t) {
    const int32_t count = cursors[t];
    starts[t] = cursors[t] = before;
    before += count;
  }
  for (int64_t i = 0; i < n; ++i) order[cursors[bin(i)]++] = static_cast<int32_t>(i);
}

std::tuple<Tensor, Tensor> counting_sort(const Tensor& index, int64_t bins) {
  const char* op = "counting_sort";
  check(index.dim() == 3, op, ": index: expected 3 dimensions [B, H, n], got shape ", shape_text(index));
  check_type(op, "index", index, {ScalarType::Int, ScalarType::Long});
  check_most(op, "bins", bins);
  const int64_t B = index.size(0), H = index.size(1), n = index.size(2);
  check_most(op, "n", n);
  Tensor order = new_output(index, {B, H, n}, ScalarType::Int);
  Tensor starts = new_output(index, {B, H, bins + 1}, ScalarType::Int);
  const Tensor read = dense(index);
  const int64_t rows = B * H, size = bins + 1;
  const int64_t workers = std::max<int64_t>(1, torch::stable::get_num_threads());
  const Scratch cursors(workers * size * sizeof(int32_t));
  int32_t* const p_order = static_cast<int32_t*>(order.mutable_data_ptr());
  int32_t* const p_starts = static_cast<int32_t*>(starts.mutable_data_ptr());
  alignas(64) int64_t next = 0, worker = 0;
  parallel(rows, 8.0 * rows * (n + size), [&] {
    int32_t* const mine =
        static_cast<int32_t*>(cursors.get()) + __atomic_fetch_add(&worker, 1, __ATOMIC_RELAXED) * size;
    for (int64_t row; (row = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < rows;) {
      const void* data = read.const_data_ptr();
      if (read.scalar_type() == ScalarType::Int) {
        sort_one(static_cast<const int32_t*>(data) + row * n, n, bins, p_order + row * n, p_starts + row * size, mine);
      } else {
        sort_one(static_cast<const int64_t*>(data) + row * n, n, bins, p_order + row * n, p_starts + row * size, mine);
      }
    }
  });
  return {order, starts};
}

// ---- gather_rows

// Each worker takes the next stretch of output rows (b, i).
template <class I>
void gather(const Tensor& x, const Tensor& index, Tensor& y, int64_t rows, int64_t& next) {
  const int64_t T = x.size(1), n = y.size(1), H = y.size(2), group = H / x.size(2), total = x.size(0) * n;
  const int64_t size = x.element_size(), bytes = x.size(3) * size;
  const int64_t x_b = x.stride(0) * size, x_t = x.stride(1) * size, x_h = stride_of(x, 2) * size;
  const int64_t i_b = stride_of(index, 0), i_h = stride_of(index, 1);
  // One row serves all heads alike where they lie in one piece.
  const bool whole = i_h == 0 && group == 1 && (H == 1 || x_h == bytes);
  const int64_t parts = whole ? 1 : H, length = whole ? H * bytes : bytes;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const I* indices = static_cast<const I*>(index.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t first; (first = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * rows) < total;) {
    for (int64_t row = first; row < std::min(first + rows, total); ++row) {
      const int64_t b = row / n, i = row % n;
      for (int64_t h = 0; h < parts; ++h) {
        const I t = indices[b * i_b + h * i_h + i];
        char* out = to + row * H * bytes + h * bytes;
        if (t >= 0 && t < T) {
          std::memcpy(out, from + b * x_b + int64_t(t) * x_t + h / group * x_h, length);
        } else {
          std::memset(out, 0, length);
        }
      }
    }
  }
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const char* op = "gather_rows";
  check_rows(op, "x", x, "[B, T, Hk, D]");
  check_device(op, "index", index, "x", x);
  check_type(op, "index", index, {ScalarType::Int, ScalarType::Long});
  const int64_t B = x.size(0), Hk = x.size(2), D = x.size(3);
  const bool good = index.dim() == 3 && (index.size(0) == 1 || index.size(0) == B) &&
                    (index.size(1) == 1 || (index.size(1) > 0 && index.size(1) % Hk == 0));
  check(good, op, ": index: expected [1 or B, 1 or a multiple of Hk, n] = [1 or ", B, ", 1 or a multiple of ", Hk,
        ", n], got ", shape_text(index));
  const int64_t n = index.size(2), H = std::max(Hk, index.size(1));
  Tensor y = new_output(x, {B, n, H, D}, x.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor read = dense_inside(x), indices = dense(index);
  const int64_t bytes = H * D * x.element_size(), rows = rows_a_task(bytes);
  alignas(64) int64_t next = 0;
  parallel((B * n + rows - 1) / rows, 2.0 * B * n * bytes, [&] {
    if (indices.scalar_type() == ScalarType::Int) {
      gather<int32_t>(read, indices, y, rows, next);
    } else {
      gather<int64_t>(read, indices, y, rows, next);
    }
  });
  return y;
}

Tensor gather_rows_backward(const Tensor& dy, const Tensor& order, const Tensor& starts, int64_t heads) {
  const char* op = "gather_rows_backward";
  check_rows(op, "dy", dy, "[B, n, H, D]");
  const int64_t B = dy.size(0), n = dy.size(1), H = dy.size(2), D = dy.size(3);
  check(heads >= 1 && H % heads == 0, op, ": heads: expected a divisor of dy's ", H, ", got ", heads);
  check_list(op, "order", order, "dy", dy, B, H, n, ScalarType::Int);
  check(starts.dim() == 3 && starts.size(2) >= 1, op, ": starts: expected 3 dimensions [B, H, T + 1], got shape ",
        shape_text(starts));
  check_list(op, "starts", starts, "dy", dy, B, H, starts.size(2), ScalarType::Int);
  const int64_t T = starts.size(2) - 1;
  Tensor dx = new_output(dy, {B, T, heads, D}, dy.scalar_type());
  if (dx.numel() == 0) return dx;
  const Tensor read = dense_inside(dy), by_row = dense(order), edges = dense(starts);
  SlotSums k = {};
  k.B = B, k.T = T, k.S = n, k.H = H, k.Hk = heads, k.D = D;
  k.reduce = Reduce::sum;
  k.lists = lists_of(by_row, edges);
  k.x = read.const_data_ptr();
  k.x_b = read.stride(0), k.x_s = read.stride(1), k.x_h = read.stride(2);
  k.y = dx.mutable_data_ptr();
  const int64_t bytes = heads * D * dy.element_size();
  k.rows_a_task = rows_a_task(bytes);
  alignas(64) int64_t next = 0;
  k.next = &next;
  const auto pass = kernels().sum[type_index(dy.scalar_type())];
  const double moved = static_cast<double>(B) * (n * (H / heads) + T) * bytes;
  parallel((B * T + k.rows_a_task - 1) / k.rows_a_task, moved, [&] { pass(k); });
  return dx;
}

// ---- reduce_slots

void check_slots(const char* op, const Tensor& order, const Tensor& starts, const char* like_name, const Tensor& like,
                 int64_t B, int64_t H, int64_t S) {
  check_list(op, "order", order, like_name, like, B, H, S, ScalarType::Int);
  check(starts.dim() == 3 && starts.size(2) >= 1, op, ": starts: expected 3 dimensions [B, H, T + 1], got shape ",
        shape_text(starts));
  check_list(op, "starts", starts, like_name, like, B, H, starts.size(2), ScalarType::Int);
}

std::tuple<Tensor, Tensor> reduce_slots(const Tensor& o, const Tensor& lse, const Tensor& order, const Tensor& starts,
                                        const std::string& reduce) {
  const char* op = "reduce_slots";
  check_rows(op, "o", o, "[B, S, H, D]");
  const int64_t B = o.size(0), S = o.size(1), H = o.size(2), D = o.size(3);
  check_device(op, "lse", lse, "o", o);
  check_shape(op, "lse", lse, "[B, H, S]", {B, H, S});
  check_type(op, "lse", lse, {real_of(o.scalar_type())});
  check_slots(op, order, starts, "o", o, B, H, S);
  const Reduce how = reduction(op, reduce);
  const int64_t T = starts.size(2) - 1;
  Tensor out = new_output(o, {B, T, H, D}, o.scalar_type()), total = new_output(o, {B, H, T}, lse.scalar_type());
  if (out.numel() == 0) return {out, total};
  const Tensor read = dense_inside(o), slot_lse = dense(lse), by_row = dense(order), edges = dense(starts);
  SlotSums k = {};
  k.B = B, k.T = T, k.S = S, k.H = H, k.Hk = H, k.D = D;
  k.reduce = how;
  k.lists = lists_of(by_row, edges);
  k.x = read.const_data_ptr();
  k.x_b = read.stride(0), k.x_s = read.stride(1), k.x_h = read.stride(2);
  k.y = out.mutable_data_ptr();
  k.slot_lse = slot_lse.const_data_ptr();
  k.lse = total.mutable_data_ptr();
  const int64_t bytes = H * D * o.element_size();
  k.rows_a_task = rows_a_task(bytes);
  alignas(64) int64_t next = 0;
  k.next = &next;
  const auto pass = kernels().sum[type_index(o.scalar_type())];
  parallel((B * T + k.rows_a_task - 1) / k.rows_a_task, static_cast<double>(B) * (S + T) * bytes, [&] { pass(k); });
  return {out, total};
}

std::tuple<Tensor, Tensor> reduce_slots_backward(const Optional& d_o, const Optional& dlse, const Tensor& lse,
                                                 const Tensor& order, const Tensor& starts, int64_t channels,
                                                 ScalarType dtype, const std::string& reduce) {
  const char* op = "reduce_slots_backward";
  check(lse.dim() == 3, op, ": lse: expected 3 dimensions [B, H, S], got shape ", shape_text(lse));
  check_type(op, "lse", lse, {ScalarType::Float, ScalarType::Double});
  check(channels >= 1, op, ": channels: expected 1 or more, got ", channels);
  const int64_t B = lse.size(0), H = lse.size(1), S = lse.size(2);
  check_slots(op, order, starts, "lse", lse, B, H, S);
  const int64_t T = starts.size(2) - 1;
  check(is_storage(dtype) && real_of(dtype) == lse.scalar_type(), op, ": dtype: expected one computed in ",
        dtype_text(lse.scalar_type()), ", got ", dtype_text(dtype));
  if (d_o) {
    check_device(op, "do", *d_o, "lse", lse);
    check_shape(op, "do", *d_o, "[B, T, H, D]", {B, T, H, channels});
    check_type(op, "do", *d_o, {dtype});
  }
  if (dlse) {
    check_device(op, "dlse", *dlse, "lse", lse);
    check_shape(op, "dlse", *dlse, "[B, H, T]", {B, H, T});
    check_type(op, "dlse", *dlse, {lse.scalar_type()});
  }
  const Reduce how = reduction(op, reduce);
  Tensor dx = new_output(lse, {B, S, H, channels}, dtype), dslot = new_output(lse, {B, H, S}, lse.scalar_type());
  if (dx.numel() == 0) return {dx, dslot};
  const Tensor slot_lse = dense(lse), by_row = dense(order), edges = dense(starts);
  Optional read_o, read_lse;
  if (d_o) read_o = dense_inside(*d_o);
  if (dlse) read_lse = dense(*dlse);
  SlotSpread k = {};
  k.B = B, k.T = T, k.S = S, k.H = H, k.D = channels;
  k.reduce = how;
  k.lists = lists_of(by_row, edges);
  if (read_o) {
    k.dy = read_o->const_data_ptr();
    k.dy_b = read_o->stride(0), k.dy_t = read_o->stride(1), k.dy_h = read_o->stride(2);
  }
  k.dx = dx.mutable_data_ptr();
  k.slot_lse = slot_lse.const_data_ptr();
  k.dlse = data(read_lse);
  k.dslot_lse = dslot.mutable_data_ptr();
  const int64_t bytes = H * channels * dx.element_size();
  k.rows_a_task = rows_a_task(bytes);
  alignas(64) int64_t next = 0;
  k.next = &next;
  const auto pass = kernels().spread[type_index(dtype)];
  const int64_t tasks = (B * (T + 1) + k.rows_a_task - 1) / k.rows_a_task;
  parallel(tasks, static_cast<double>(B) * (S + T) * bytes, [&] { pass(k); });
  return {dx, dslot};
}

}  // namespace
}  // namespace seqops

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("counting_sort(Tensor index, SymInt bins) -> (Tensor order, Tensor starts)");
  m.def("gather_rows(Tensor x, Tensor index) -> Tensor");
  m.def("gather_rows_backward(Tensor dy, Tensor order, Tensor starts, SymInt heads) -> Tensor dx");
  m.def("reduce_slots(Tensor o, Tensor lse, Tensor order, Tensor starts, str reduce='mean') -> (Tensor o, Tensor lse)");
  m.def(
      "reduce_slots_backward(Tensor? do, Tensor? dlse, Tensor lse, Tensor order, Tensor starts, SymInt channels, "
      "ScalarType dtype, str reduce='mean') -> (Tensor do, Tensor dlse)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("counting_sort", TORCH_BOX(&seqops::counting_sort));
  m.impl("gather_rows", TORCH_BOX(&seqops::gather_rows));
  m.impl("gather_rows_backward", TORCH_BOX(&seqops::gather_rows_backward));
  m.impl("reduce_slots", TORCH_BOX(&seqops::reduce_slots));
  m.impl("reduce_slots_backward", TORCH_BOX(&seqops::reduce_slots_backward));
}
