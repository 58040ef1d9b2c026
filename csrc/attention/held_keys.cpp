// held_keys on the CPU: schema, checks, allocation.
#include "held_keys.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/rows.h"

namespace seqops {
namespace {

const HeldKeysKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::held_keys_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("held_keys: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

void check_keys(const char* op, const char* name, const Tensor& k) {
  using enum ScalarType;
  check(k.dim() == 4, op, ": ", name, ": expected 4 dimensions [B, T, Hk, D], got shape ", shape_text(k));
  check_type(op, name, k, {Float, Double, BFloat16, Half});
}

int storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: return 0;
  }
}

Tensor with_dense_channels(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }

HeldRows rows(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

HeldKeys sizes_of(const Tensor& k, bool by_row) {
  HeldKeys sizes = {};
  sizes.B = k.size(0), sizes.T = k.size(1), sizes.Hk = k.size(2), sizes.D = k.size(3);
  sizes.by_row = by_row;
  return sizes;
}

constexpr int64_t NUMBERS_OF_THREAD = 1 << 15;  // less is not worth waking another thread

// Heads are walked one by one, each from its first step to its last or back.
void run(const HeldKeys& k, HeldKeysPass pass, int64_t bytes_of_real) {
  const int64_t tasks = k.B * k.Hk, grain = std::max<int64_t>(1, NUMBERS_OF_THREAD / (k.T * k.D));
  const int64_t buffer = (k.D * bytes_of_real + 63) / 64 * 64;
  const Scratch scratch(tasks * buffer);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) pass(k, task, static_cast<char*>(scratch.get()) + task * buffer);
  });
}

int64_t bytes_of_real(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? 8 : 4; }

Tensor held_keys(const Tensor& k, double threshold, bool by_row) {
  const char* op = "held_keys";
  check_keys(op, "k", k);
  check(threshold >= 0, op, ": threshold: expected a number >= 0, got ", threshold);
  Tensor held = new_output(k, Sizes(k.sizes().begin(), k.sizes().end()), k.scalar_type());
  if (k.numel() == 0) return held;
  const Tensor keys = with_dense_channels(k);
  HeldKeys arguments = sizes_of(k, by_row);
  arguments.threshold = threshold;
  arguments.k = rows(keys), arguments.held = rows(held);
  run(arguments, kernels().forward[storage_of(k.scalar_type())], bytes_of_real(k));
  return held;
}

Tensor held_keys_backward(const Tensor& grad, const Tensor& held, bool by_row) {
  const char* op = "held_keys_backward";
  check_keys(op, "held", held);
  check_device(op, "grad", grad, "held", held);
  check_type(op, "grad", grad, {held.scalar_type()});
  check_shape(op, "grad", grad, "[B, T, Hk, D]", {held.size(0), held.size(1), held.size(2), held.size(3)});
  Tensor dk = new_output(held, Sizes(held.sizes().begin(), held.sizes().end()), held.scalar_type());
  if (held.numel() == 0) return dk;
  const Tensor gradient = with_dense_channels(grad), keys = with_dense_channels(held);
  HeldKeys arguments = sizes_of(held, by_row);
  arguments.held = rows(keys), arguments.grad = rows(gradient), arguments.dk = rows(dk);
  run(arguments, kernels().backward[storage_of(held.scalar_type())], bytes_of_real(held));
  return dk;
}

}  // namespace
}  // namespace seqops

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("held_keys(Tensor k, float threshold, bool by_row) -> Tensor");
  m.def("held_keys_backward(Tensor grad, Tensor held, bool by_row) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("held_keys", TORCH_BOX(&seqops::held_keys));
  m.impl("held_keys_backward", TORCH_BOX(&seqops::held_keys_backward));
}
