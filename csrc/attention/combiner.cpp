// Summaries of combiner_attention on the CPU: schemas, checks, allocation, and how spans and columns are shared out
// among threads. See combiner.h.
#include "combiner.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

#include "../common/rows.h"

namespace seqops {
namespace {

const CombinerKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::combiner_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("combiner_attention: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

int type_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: return 0;
  }
}

Tensor with_dense_channels(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }

HeadRows view(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

void check_rows(const char* op, const char* name, const Tensor& x) {
  using enum ScalarType;
  check(x.dim() == 4, op, ": ", name, ": expected 4 dimensions [B, T, H, D], got shape ", shape_text(x));
  check_type(op, name, x, {Float, Double, BFloat16, Half});
  check(x.size(2) >= 1 && x.size(3) >= 1, op, ": ", name, ": expected at least 1 head and 1 channel, got shape ",
        shape_text(x));
}

void check_like(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like,
                int64_t steps, const char* letters = "[B, T, H, D]") {
  check_device(op, name, t, like_name, like);
  check_type(op, name, t, {like.scalar_type()});
  check_shape(op, name, t, letters, {like.size(0), steps, like.size(2), like.size(3)});
}

void check_at_least_one(const char* op, const char* name, int64_t value) {
  check(value >= 1, op, ": ", name, ": expected an integer >= 1, got ", value);
}

bool is_mean(const char* op, const std::string& pool) {
  check(pool == "max" || pool == "mean", op, ": pool: expected one of max, mean, got '", pool, "'");
  return pool == "mean";
}

// ---- the work

constexpr int64_t WORK_OF_THREAD = 1 << 16;  // numbers read: less is not worth waking another thread

// Each of `tasks` by one thread, which has `bytes` of scratch.
void share(int64_t tasks, int64_t work, int64_t bytes, const std::function<void(int64_t task, void* scratch)>& run) {
  if (tasks == 0) return;
  const int64_t most = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t workers = std::clamp<int64_t>(work / WORK_OF_THREAD, 1, most);
  bytes = (bytes + 63) / 64 * 64;
  const Scratch scratch(workers * bytes);
  alignas(64) int64_t next = 0;
  const auto worker = [&](int64_t number) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      run(task, static_cast<char*>(scratch.get()) + number * bytes);
    }
  };
  if (workers == 1) return worker(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) worker(number);
  });
}

// ---- summaries of spans

// The spans that some query sees, level by level; spans of one level are disjoint. As composed_combiner_attention.py counts them.
std::vector<std::vector<Span>> spans_of(int64_t T, int64_t s, bool tree, bool causal) {
  std::vector<std::vector<Span>> levels;
  int64_t blocks = (T + s - 1) / s, width = s, row = 0;
  const auto add = [&](int64_t nodes, int64_t every) {
    std::vector<Span>& level = levels.emplace_back();
    for (int64_t node = 0; node < nodes; node += every) {
      level.push_back({node * width, std::min(T, (node + 1) * width), row++});
    }
  };
  if (!tree) {
    add(causal ? std::max<int64_t>(blocks - 1, 0) : blocks, 1);
    return levels;
  }
  for (; blocks > 1; blocks = (blocks + 1) / 2, width *= 2) add(blocks / 2 * 2, causal ? 2 : 1);
  return levels;
}

struct Call {
  Tensor q, k, v;
  std::vector<std::vector<Span>> levels;
  SpanSummaries arguments = {};
  int64_t spans = 0, rows = 0, longest = 0, covered = 0;  // rows of summaries, those that no span has being zeros

  Call(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_, int64_t block_size, bool tree,
       const std::string& pool, bool causal, double scale)
      : q(q_), k(k_), v(v_) {
    check_rows(op, "q", q);
    check_like(op, "k", k, "q", q, q.size(1));
    check_like(op, "v", v, "q", q, q.size(1));
    check_at_least_one(op, "block_size", block_size);
    arguments.mean = is_mean(op, pool);
    arguments.scale = scale;
    arguments.D = q.size(3);
    q = with_dense_channels(q), k = with_dense_channels(k), v = with_dense_channels(v);
    arguments.q = view(q), arguments.k = view(k), arguments.v = view(v);
    const int64_t T = q.size(1), s = std::min(block_size, std::max<int64_t>(T, 1));
    levels = spans_of(T, s, tree, causal);
    for (const auto& level : levels) {
      spans += static_cast<int64_t>(level.size());
      for (const Span& span : level)
        longest = std::max(longest, span.end - span.first), covered += span.end - span.first;
    }
    rows = (tree ? spans : (T + s - 1) / s) + 1;
  }

  Tensor new_summaries() const {
    Tensor t = new_output(q, {q.size(0), rows, q.size(2), q.size(3)}, q.scalar_type());
    const int64_t row_bytes = q.size(2) * q.size(3) * t.element_size();
    for (int64_t b = 0; b < q.size(0); ++b) {
      char* first = static_cast<char*>(t.mutable_data_ptr()) + (b * rows + spans) * row_bytes;
      std::memset(first, 0, (rows - spans) * row_bytes);
    }
    return t;
  }

  // Zeros where the first level has no span, which writes the other positions and to which further levels add.
  Tensor new_gradient(ScalarType dtype) const {
    const int64_t B = q.size(0), T = q.size(1);
    Tensor t = new_output(q, {B, T, q.size(2), q.size(3)}, dtype);
    const int64_t row_bytes = q.size(2) * q.size(3) * t.element_size();
    const auto clear = [&](int64_t first, int64_t end) {
      for (int64_t b = 0; b < B; ++b) {
        char* row = static_cast<char*>(t.mutable_data_ptr()) + (b * T + first) * row_bytes;
        std::memset(row, 0, (end - first) * row_bytes);
      }
    };
    int64_t done = 0;
    const std::vector<Span> written = levels.empty() ? std::vector<Span>{} : levels.front();
    for (const Span& span : written) {
      clear(done, span.first);
      done = span.end;
    }
    clear(done, T);
    return t;
  }

  void run(SpanSummariesKernel kernel, int64_t real_bytes, int64_t reads) {
    const int64_t B = q.size(0), H = q.size(2);
    const int64_t bytes = SpanSummaries::scratch_size(longest, arguments.D) * real_bytes;
    for (const auto& level : levels) {
      arguments.add = &level != &levels.front();
      const int64_t count = static_cast<int64_t>(level.size());
      const int64_t work = reads * B * H * arguments.D * covered / static_cast<int64_t>(levels.size());
      share(B * H * count, work, bytes, [&](int64_t task, void* scratch) {
        kernel(arguments, task / count / H, task / count % H, level[task % count], scratch);
      });
    }
  }
};

int64_t bytes_of(ScalarType real) { return real == ScalarType::Double ? 8 : 4; }

std::tuple<Tensor, Tensor> span_summaries(const Tensor& q, const Tensor& k, const Tensor& v, int64_t block_size,
                                          bool tree, std::string pool, bool causal, double scale) {
  Call call("span_summaries", q, k, v, block_size, tree, pool, causal, scale);
  Tensor khat = call.new_summaries(), vhat = call.new_summaries();
  call.arguments.khat = view(khat), call.arguments.vhat = view(vhat);
  call.run(kernels().summaries[type_index(q.scalar_type())], bytes_of(real_of(q.scalar_type())), 4);
  return {khat, vhat};
}

std::tuple<Tensor, Tensor, Tensor> span_summaries_backward(const Tensor& dkhat, const Tensor& dvhat, const Tensor& q,
                                                           const Tensor& k, const Tensor& v, int64_t block_size,
                                                           bool tree, std::string pool, bool causal, double scale) {
  const char* op = "span_summaries_backward";
  Call call(op, q, k, v, block_size, tree, pool, causal, scale);
  check_like(op, "dkhat", dkhat, "q", q, call.rows, "[B, S, H, D]");
  check_like(op, "dvhat", dvhat, "q", q, call.rows, "[B, S, H, D]");
  const ScalarType real = real_of(q.scalar_type());
  Tensor dq = call.new_gradient(real), dk = call.new_gradient(real), dv = call.new_gradient(real);
  const Tensor in_k = with_dense_channels(dkhat), in_v = with_dense_channels(dvhat);
  SpanSummaries& arguments = call.arguments;
  arguments.khat = view(in_k), arguments.vhat = view(in_v);
  arguments.dq = view(dq), arguments.dk = view(dk), arguments.dv = view(dv);
  call.run(kernels().summaries_backward[type_index(q.scalar_type())], bytes_of(real), 10);
  return {dq, dk, dv};
}

// ---- running pools

RunningPool running_pool_of(const char* op, const Tensor& like, int64_t stride, const std::string& pool, bool reverse) {
  check_at_least_one(op, "stride", stride);
  RunningPool k = {};
  k.T = like.size(1), k.H = like.size(2), k.D = like.size(3);
  k.stride = std::min(stride, std::max<int64_t>(k.T, 1));
  k.mean = is_mean(op, pool), k.reverse = reverse;
  return k;
}

void run(const RunningPool& k, RunningPoolKernel kernel, int64_t B, int64_t real_bytes, int64_t reads) {
  if (B * k.T == 0) return;
  share(B * k.stride, reads * B * k.T * k.H * k.D, k.H * k.D * real_bytes,
        [&](int64_t task, void* scratch) { kernel(k, task / k.stride, task % k.stride, scratch); });
}

Tensor running_pool(const Tensor& x, int64_t stride, std::string pool, bool reverse) {
  const char* op = "running_pool";
  check_rows(op, "x", x);
  RunningPool k = running_pool_of(op, x, stride, pool, reverse);
  const Tensor in = with_dense_channels(x);
  Tensor y = new_output(x, {x.size(0), k.T, k.H, k.D}, x.scalar_type());
  k.x = view(in), k.y = view(y);
  run(k, kernels().pool[type_index(x.scalar_type())], x.size(0), bytes_of(real_of(x.scalar_type())), 2);
  return y;
}

Tensor running_pool_backward(const Tensor& dy, Optional x, Optional y, int64_t stride, std::string pool, bool reverse) {
  const char* op = "running_pool_backward";
  check_rows(op, "dy", dy);
  RunningPool k = running_pool_of(op, dy, stride, pool, reverse);
  const Tensor in = with_dense_channels(dy);
  Optional values, pools;
  if (!k.mean) {
    check(x.has_value(), op, ": x: expected a tensor where pool is max, got None");
    check(y.has_value(), op, ": y: expected a tensor where pool is max, got None");
    check_like(op, "x", *x, "dy", dy, k.T);
    check_like(op, "y", *y, "dy", dy, k.T);
    values = with_dense_channels(*x), pools = with_dense_channels(*y);
    k.x = view(*values), k.y = view(*pools);
  }
  Tensor dx = new_output(dy, {dy.size(0), k.T, k.H, k.D}, dy.scalar_type());
  k.dy = view(in), k.dx = view(dx);
  run(k, kernels().pool_backward[type_index(dy.scalar_type())], dy.size(0), bytes_of(real_of(dy.scalar_type())), 4);
  return dx;
}

}  // namespace
}  // namespace seqops

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "span_summaries(Tensor q, Tensor k, Tensor v, int block_size, *, bool tree, str pool, bool causal, float scale) "
      "-> (Tensor khat, Tensor vhat)");
  m.def(
      "span_summaries_backward(Tensor dkhat, Tensor dvhat, Tensor q, Tensor k, Tensor v, int block_size, *, bool tree, "
      "str pool, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("running_pool(Tensor x, int stride, *, str pool, bool reverse) -> Tensor");
  m.def("running_pool_backward(Tensor dy, Tensor? x, Tensor? y, int stride, *, str pool, bool reverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("span_summaries", TORCH_BOX(&seqops::span_summaries));
  m.impl("span_summaries_backward", TORCH_BOX(&seqops::span_summaries_backward));
  m.impl("running_pool", TORCH_BOX(&seqops::running_pool));
  m.impl("running_pool_backward", TORCH_BOX(&seqops::running_pool_backward));
}
