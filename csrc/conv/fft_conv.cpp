// fft_conv on the CPU: schema, checks, allocation, the choice of lengths. See fft_conv.h for the notation.
#include "fft_conv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <numbers>

#include "../common/rows.h"

namespace seqops::conv {
namespace {

const FftConvKernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16: return avx512_bf16::fft_conv_kernels;
    case Isa::avx512: return avx512::fft_conv_kernels;
    case Isa::avx2: return avx2::fft_conv_kernels;
#endif
    default: return baseline::fft_conv_kernels;
  }
}

int index_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return 0;
  if (dtype == ScalarType::Double) return 1;
  return dtype == ScalarType::BFloat16 ? 2 : 3;
}

// ---- checks

struct Shape {
  int64_t B, T, D, N, L;
  bool many;  // k has dimension N
};

Shape check_inputs(const char* op, const Tensor& u, const Tensor& k, const Optional& skip) {
  check(u.dim() == 3, op, ": u: expected 3 dimensions [B, T, D], got shape ", shape_text(u));
  check(u.size(2) >= 1, op, ": u: expected at least 1 channel, got shape ", shape_text(u));
  using enum ScalarType;
  check_type(op, "u", u, {Float, Double, BFloat16, Half});
  check_device(op, "k", k, "u", u);
  check(k.dim() == 2 || k.dim() == 3, op, ": k: expected 2 or 3 dimensions [D, L] or [D, N, L], got shape ",
        shape_text(k));
  check(k.size(0) == u.size(2), op, ": k: expected D = ", u.size(2), " in front, got ", shape_text(k));
  const bool many = k.dim() == 3;
  check(!many || k.size(1) >= 1, op, ": k: expected at least 1 kernel a channel, got shape ", shape_text(k));
  const ScalarType real = real_of(u.scalar_type());
  check_type(op, "k", k, {u.scalar_type(), real});
  if (skip) {
    check_device(op, "skip", *skip, "u", u);
    check_shape(op, "skip", *skip, "[D]", {u.size(2)});
    check_type(op, "skip", *skip, {u.scalar_type(), real});
  }
  return {u.size(0), u.size(1), u.size(2), many ? k.size(1) : 1, k.size(many ? 2 : 1), many};
}

// ---- plans

struct Transform {
  FftPlan plan = {};
  int64_t max_radix;
  bool wide;
  std::vector<std::vector<char>> tables;
};

// The radices of n = 2^a 3^b 5^c, large strides first.
std::vector<int64_t> radices_of(int64_t n, int64_t max_radix) {
  std::vector<int64_t> radices;
  for (const int64_t odd : {5, 3}) {
    for (; n % odd == 0; n /= odd) radices.push_back(odd);
  }
  while (n > 1) {
    int64_t radix = std::min(n, max_radix);
    if (radix == 8 && n == 16) radix = 4;  // 4 * 4 takes less than 8 * 2
    radices.push_back(radix);
    n /= radix;
  }
  return radices;
}

template <class Real>
void append(std::vector<char>& table, double value) {
  const Real rounded = static_cast<Real>(value);
  const char* bytes = reinterpret_cast<const char*>(&rounded);
  table.insert(table.end(), bytes, bytes + sizeof(Real));
}

std::shared_ptr<const Transform> make_transform(int64_t n, int64_t max_radix, bool wide) {
  auto made = std::make_shared<Transform>();
  made->max_radix = max_radix, made->wide = wide;
  FftPlan& plan = made->plan;
  plan.n = n;
  std::vector<double> turns = {0.25};  // the root of each block: z^m = e^{2 pi i turns}
  for (const int64_t radix : radices_of(n, max_radix)) {
    std::vector<char> table;
    std::vector<double> inner;
    for (const double turn : turns) {
      for (int64_t i = 1; i < radix; ++i) {
        const double angle = 2 * std::numbers::pi * turn * static_cast<double>(i) / static_cast<double>(radix);
        for (const double value : {std::cos(angle), std::sin(angle)}) {
          wide ? append<double>(table, value) : append<float>(table, value);
        }
      }
      for (int64_t k = 0; k < radix; ++k) inner.push_back((turn + static_cast<double>(k)) / static_cast<double>(radix));
    }
    plan.radix[plan.levels] = radix;
    made->tables.push_back(std::move(table));
    plan.twiddles[plan.levels++] = made->tables.back().data();
    turns = std::move(inner);
  }
  return made;
}

// The last few lengths are kept: a table holds about n complex numbers.
std::shared_ptr<const Transform> transform_of(int64_t n, int64_t max_radix, bool wide) {
  constexpr size_t KEPT = 8;
  static std::mutex mutex;
  static std::list<std::shared_ptr<const Transform>> known;
  const std::lock_guard lock(mutex);
  for (auto each = known.begin(); each != known.end(); ++each) {
    if ((*each)->plan.n != n || (*each)->max_radix != max_radix || (*each)->wide != wide) continue;
    known.splice(known.begin(), known, each);
    return known.front();
  }
  known.push_front(make_transform(n, max_radix, wide));
  if (known.size() > KEPT) known.pop_back();
  return known.front();
}

// The smallest 2^a 3^b 5^c, b <= 2 and c <= 1, that is at least `n`.
int64_t fast_length(int64_t n) {
  int64_t best = INT64_MAX;
  for (const int64_t odd : {1, 3, 5, 9, 15}) {
    int64_t length = odd;
    while (length < n) length *= 2;
    best = std::min(best, length);
  }
  return best;
}

// Of transforming n points there and back, in no unit: passes, and reading and writing them.
double cost_of(int64_t n) {
  const double points = static_cast<double>(n);
  const double far = n > 8192 ? 1.2 : 1.0;  // more than the second cache holds
  return points * (std::log2(points) + 4) * far;
}

constexpr int64_t DIRECT_STEPS = 256;
constexpr int64_t RESIDENT_BYTES = 2 << 20;
constexpr int64_t BYTES_OF_WORKER = 256 << 10;  // less is not worth waking another thread
constexpr int64_t TASKS = 8;                    // of a backward, at least: chunks must not depend on the threads

void cut(FftConv& a) {
  const int64_t T = a.T, M = a.M;
  if (M <= kernels().direct_taps) {
    a.plan.n = 0;
    a.step = std::min(T, DIRECT_STEPS);
    a.span = a.step + M - 1;
    a.lead = M - 1;
    a.segments = (T + a.step - 1) / a.step;
    return;
  }
  int64_t best = fast_length((T + M) / 2), count = 1;
  double least = cost_of(best);
  for (int64_t n = 32; n < best; n *= 2) {
    if (2 * n < 2 * M) continue;
    const int64_t segments = (T + 2 * n - M) / (2 * n - M + 1);
    const double cost = static_cast<double>(segments) * cost_of(n);
    if (cost < least) least = cost, best = n, count = segments;
  }
  a.plan.n = best;
  a.span = 2 * best;
  a.segments = count;
  a.step = count == 1 ? T : 2 * best - M + 1;
  a.lead = count == 1 ? 0 : M - 1;
}

// ---- a call

// The arguments as the kernels read them; they live as long as this.
struct Call {
  FftConv a = {};
  Tensor u, k;
  Optional skip;
  std::shared_ptr<const Transform> transform;
  int64_t workers = 1;

  Call(const Tensor& given, const Tensor& taps, const Optional& skipped, const Shape& shape, bool backward)
      : u(with_dense_steps(given)),
        k(taps.is_contiguous() ? taps : torch::stable::contiguous(taps)),
        skip(dense(skipped, real_of(given.scalar_type()))) {
    const int index = index_of(u.scalar_type());
    a.B = shape.B, a.T = shape.T, a.D = shape.D, a.N = shape.N, a.L = shape.L;
    a.M = reached(shape, skipped);
    if (a.B == 0 || a.T == 0 || a.M == 0) return;
    cut(a);
    if (a.plan.n > 0) {
      transform = transform_of(a.plan.n, kernels().max_radix, u.scalar_type() == ScalarType::Double);
      a.plan = transform->plan;
    }
    a.u = sequence(u, a.B, a.T);
    a.k = k.const_data_ptr();
    a.k_is_stored = k.scalar_type() == u.scalar_type();
    a.skip = data(skip);
    const int64_t lanes = kernels().lanes[index];
    const int64_t buffer = fft_conv_numbers(a) * lanes * (u.scalar_type() == ScalarType::Double ? 8 : 4);
    a.resident = a.N == 1 ? 1 : std::clamp<int64_t>(RESIDENT_BYTES / buffer, 1, MOST_RESIDENT);
    a.groups = (a.D + lanes - 1) / lanes;
    const int64_t bytes = a.B * a.T * a.D * a.N * u.element_size();
    workers = std::clamp<int64_t>(8 * bytes / BYTES_OF_WORKER, 1, torch::stable::get_num_threads());
    const int64_t tasks = backward ? TASKS : workers == 1 ? 1 : 2 * workers;
    a.chunks = std::clamp<int64_t>((tasks + a.groups - 1) / a.groups, 1, a.B * a.segments);
    workers = std::min(workers, a.groups * a.chunks);
    a.scratch_bytes = (fft_conv_buffers(a, backward) * buffer + 63) / 64 * 64;
  }

  static int64_t reached(const Shape& shape, const Optional& skip) {
    return std::max<int64_t>(std::min(shape.T, shape.L), skip ? 1 : 0);
  }

  bool empty() const { return a.B == 0 || a.T == 0 || a.M == 0; }

  void run(void (*kernel)(const FftConv&, int64_t)) {
    alignas(64) int64_t next = 0;
    const Scratch scratch(workers * a.scratch_bytes);
    a.next = &next;
    a.scratch = scratch.get();
    if (workers == 1) return kernel(a, 0);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) kernel(a, worker);
    });
  }
};

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

Sizes sizes_of_y(const Shape& shape) {
  if (shape.many) return {shape.B, shape.T, shape.D, shape.N};
  return {shape.B, shape.T, shape.D};
}

Tensor fft_conv(const Tensor& u, const Tensor& k, Optional skip) {
  const Shape shape = check_inputs("fft_conv", u, k, skip);
  Call call(u, k, skip, shape, false);
  if (call.empty()) return zeros(u, sizes_of_y(shape), u.scalar_type());
  const Tensor y = new_output(u, sizes_of_y(shape), u.scalar_type());
  call.a.y = sequence(y, shape.B, shape.T);
  call.run(kernels().forward[index_of(u.scalar_type())]);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fft_conv_backward(const Tensor& dy, const Tensor& u, const Tensor& k, Optional skip,
                                                     bool for_u, bool for_k) {
  const char* op = "fft_conv_backward";
  const Shape shape = check_inputs(op, u, k, skip);
  check_device(op, "dy", dy, "u", u);
  check_type(op, "dy", dy, {u.scalar_type()});
  if (shape.many) {
    check_shape(op, "dy", dy, "[B, T, D, N]", {shape.B, shape.T, shape.D, shape.N});
  } else {
    check_shape(op, "dy", dy, "[B, T, D]", {shape.B, shape.T, shape.D});
  }
  const ScalarType real = real_of(u.scalar_type());
  const Sizes none = {0}, of_u = {shape.B, shape.T, shape.D}, of_skip = {for_k && skip ? shape.D : 0};
  const Sizes of_k = !for_k ? none : shape.many ? Sizes{shape.D, shape.N, shape.L} : Sizes{shape.D, shape.L};
  Call call(u, k, skip, shape, true);
  if (call.empty() || !(for_u || for_k)) {
    return {zeros(u, for_u ? of_u : none, u.scalar_type()), zeros(u, of_k, k.scalar_type()), zeros(u, of_skip, real)};
  }
  FftConv& a = call.a;
  Tensor du = new_output(u, for_u ? of_u : none, u.scalar_type()), dk = new_output(u, of_k, k.scalar_type());
  Tensor dskip = torch::stable::new_empty(u, of_skip, real);
  const Tensor grad = with_dense_steps(dy);
  a.y = sequence(grad, shape.B, shape.T);
  if (for_u) a.du = sequence(du, shape.B, shape.T);
  // What the sums are is dk itself, if that can hold them.
  const bool direct = a.chunks == 1 && a.M == a.L && k.scalar_type() == real;
  const int64_t rows = shape.D * shape.N;
  const Scratch partial(direct || !for_k ? 0 : a.chunks * rows * a.M * (real == ScalarType::Double ? 8 : 4));
  if (for_k) a.dk = direct ? dk.mutable_data_ptr() : partial.get();
  const int index = index_of(u.scalar_type());
  call.run(kernels().backward[index]);
  if (for_k && (!direct || skip)) {
    const FftConvTaps taps = {shape.D,
                              shape.N,
                              shape.L,
                              a.M,
                              a.chunks,
                              a.dk,
                              direct ? nullptr : dk.mutable_data_ptr(),
                              a.k_is_stored,
                              skip ? dskip.mutable_data_ptr() : nullptr};
    torch::stable::parallel_for(0, shape.D, std::max<int64_t>(1, 65536 / (shape.N * a.M)),
                                [&](int64_t begin, int64_t end) { kernels().taps[index](taps, begin, end); });
  }
  return {du, dk, dskip};
}

}  // namespace
}  // namespace seqops::conv

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("fft_conv(Tensor u, Tensor k, Tensor? skip=None) -> Tensor");
  m.def(
      "fft_conv_backward(Tensor dy, Tensor u, Tensor k, Tensor? skip, bool for_u, bool for_k) "
      "-> (Tensor du, Tensor dk, Tensor dskip)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("fft_conv", TORCH_BOX(&seqops::conv::fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&seqops::conv::fft_conv_backward));
}
