// newton_schulz on the CPU: schema, checks, allocation, and how matrices and passes are shared out among threads.
#include "newton_schulz.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <functional>

#include "../common/rows.h"

namespace seqops {
namespace {

using Coefficients = std::optional<std::vector<double>>;
using Pass = NewtonSchulzPass;

constexpr double MUON[] = {3.4445, -4.7750, 2.0315};
constexpr int64_t MUON_STEPS = 5;

const NewtonSchulzKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::newton_schulz_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("newton_schulz: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

NewtonSchulzTask task_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return kernels().run[1];
    case ScalarType::BFloat16: return kernels().run[2];
    case ScalarType::Half: return kernels().run[3];
    default: return kernels().run[0];
  }
}

void check_arguments(const char* op, const Tensor& x, const Coefficients& coefficients, double eps) {
  using enum ScalarType;
  check(x.dim() >= 2, op, ": x: expected at least 2 dimensions [..., M, N], got shape ", shape_text(x));
  check_type(op, "x", x, {Float, Double, BFloat16, Half});
  const size_t count = coefficients ? coefficients->size() : 0;
  check(count % 3 == 0, op, ": coefficients: expected a multiple of 3 numbers, got ", count, " numbers");
  check(eps >= 0, op, ": eps: expected a number >= 0, got ", eps);
}

Tensor in_one_piece(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// ---- the work

struct Step {
  Pass pass;
  int64_t step;
};
using Steps = std::vector<Step>;

constexpr int64_t WORK_OF_THREAD = 1 << 18;  // multiplications: less is not worth waking another thread

// A call as the kernels take it, and what it points to.
struct Call {
  NewtonSchulz arguments = {};
  std::vector<double> coefficients;
  ScalarType dtype;
  int64_t items = 1;

  Call(const Tensor& x, const Coefficients& given, double eps, bool backward) : dtype(x.scalar_type()) {
    NewtonSchulz& k = arguments;
    const int64_t dims = x.dim();
    for (int64_t d = 0; d < dims - 2; ++d) items *= x.size(d);
    k.M = x.size(dims - 2), k.N = x.size(dims - 1), k.m = std::min(k.M, k.N), k.n = std::max(k.M, k.N);
    for (int64_t i = 0; i < MUON_STEPS && !given; ++i) coefficients.insert(coefficients.end(), MUON, MUON + 3);
    if (given) coefficients = *given;
    k.coefficients = coefficients.data(), k.steps = static_cast<int64_t>(coefficients.size()) / 3, k.eps = eps;
    k.lay_out(dtype == ScalarType::Double ? 8 : 4, backward);
  }

  // Every matrix by one thread; of those left over when all threads have had as many, all threads share each.
  void run(const Steps& steps) const {
    const NewtonSchulz& k = arguments;
    if (items == 0 || k.m == 0) return;
    const NewtonSchulzTask task = task_of(dtype);
    const int64_t real = dtype == ScalarType::Double ? 8 : 4, threads = torch::stable::get_num_threads();
    const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t buffers = aligned(k.buffers * real), panel = aligned(k.panel_size() * real);
    const int64_t work = k.m * k.m * k.n;
    const bool share = work > WORK_OF_THREAD && threads > 1;
    const int64_t apart = share ? items / threads * threads : items;
    const int64_t workers =
        std::clamp<int64_t>(apart * work / WORK_OF_THREAD, 1, std::min(threads, std::max<int64_t>(apart, 1)));
    const Scratch scratch(std::max(workers * (buffers + panel), share ? buffers + threads * panel : 0));
    char* const own = static_cast<char*>(scratch.get());

    alignas(64) int64_t next = 0;
    const auto whole = [&](char* mine) {
      for (;;) {
        const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (item >= apart) return;
        for (const Step& s : steps) {
          for (int64_t i = 0; i < k.tasks(s.pass); ++i) task(k, item, s.pass, s.step, i, mine, mine + buffers);
        }
      }
    };
    const auto parallel = [&](int64_t count, const std::function<void(int64_t worker)>& each) {
      if (count == 1) return each(0);
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) each(worker);
      });
    };
    parallel(workers, [&](int64_t worker) { whole(own + worker * (buffers + panel)); });
    for (int64_t item = apart; item < items; ++item) {
      for (const Step& s : steps) {
        next = 0;
        parallel(std::min(threads, k.tasks(s.pass)), [&](int64_t worker) {
          for (;;) {
            const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (i >= k.tasks(s.pass)) return;
            task(k, item, s.pass, s.step, i, own, own + buffers + worker * panel);
          }
        });
      }
    }
  }
};

Tensor output(const Tensor& x) { return new_output(x, Sizes(x.sizes().begin(), x.sizes().end()), x.scalar_type()); }

Tensor newton_schulz(const Tensor& x, Coefficients coefficients, double eps) {
  check_arguments("newton_schulz", x, coefficients, eps);
  Tensor out = output(x);
  const Tensor dense = in_one_piece(x);
  Call call(dense, coefficients, eps, false);
  NewtonSchulz& k = call.arguments;
  k.x = dense.const_data_ptr(), k.out = out.mutable_data_ptr();
  Steps steps = {{Pass::norm, 0}, {Pass::load, 0}};
  for (int64_t i = 0; i < k.steps; ++i) {
    for (const Pass pass : {Pass::gram, Pass::polynomial, Pass::advance}) steps.push_back({pass, i});
  }
  steps.push_back({Pass::store, 0});
  call.run(steps);
  return out;
}

Tensor newton_schulz_backward(const Tensor& dx, const Tensor& x, Coefficients coefficients, double eps) {
  const char* op = "newton_schulz_backward";
  check_arguments(op, x, coefficients, eps);
  check_device(op, "dx", dx, "x", x);
  check_type(op, "dx", dx, {x.scalar_type()});
  check(std::equal(dx.sizes().begin(), dx.sizes().end(), x.sizes().begin(), x.sizes().end()), op,
        ": dx: expected x's shape ", shape_text(x), ", got ", shape_text(dx));
  Tensor result = output(x);
  const Tensor dense = in_one_piece(x), dense_grad = in_one_piece(dx);
  Call call(dense, coefficients, eps, true);
  NewtonSchulz& k = call.arguments;
  k.x = dense.const_data_ptr(), k.grad = dense_grad.const_data_ptr(), k.out = result.mutable_data_ptr();
  Steps steps = {{Pass::norm, 0}, {Pass::load, 0}, {Pass::load_gradient, 0}};
  for (int64_t i = 0; i < k.steps; ++i) {
    for (const Pass pass : {Pass::gram, Pass::polynomial}) steps.push_back({pass, i});
    if (i + 1 < k.steps) steps.push_back({Pass::advance, i});
  }
  for (int64_t i = k.steps - 1; i >= 0; --i) {
    for (const Pass pass : {Pass::cross, Pass::slope, Pass::mirror, Pass::retreat}) steps.push_back({pass, i});
  }
  steps.push_back({Pass::inner, 0}), steps.push_back({Pass::finish, 0});
  call.run(steps);
  return result;
}

}  // namespace
}  // namespace seqops

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("newton_schulz(Tensor x, float[]? coefficients=None, float eps=1e-7) -> Tensor");
  m.def("newton_schulz_backward(Tensor dx, Tensor x, float[]? coefficients=None, float eps=1e-7) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("newton_schulz", TORCH_BOX(&seqops::newton_schulz));
  m.impl("newton_schulz_backward", TORCH_BOX(&seqops::newton_schulz_backward));
}
