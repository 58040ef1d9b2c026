// merge_attention on the CPU: schema, checks, allocation.
#include "merge_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/rows.h"

namespace seqops {
namespace {

const MergeAttentionKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::merge_attention_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("merge_attention: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

// ---- checks

void check_lse(const char* op, const char* name, const Tensor& lse, const Tensor& o1,
               std::initializer_list<ScalarType> allowed) {
  check_device(op, name, lse, "o1", o1);
  check_type(op, name, lse, allowed);
  check_shape(op, name, lse, "[B, H, T]", {o1.size(0), o1.size(2), o1.size(1)});
}

void check_rows(const char* op, const char* name, const Tensor& o, const Tensor& o1) {
  check_device(op, name, o, "o1", o1);
  check_type(op, name, o, {o1.scalar_type()});
  check_shape(op, name, o, "[B, T, H, D]", {o1.size(0), o1.size(1), o1.size(2), o1.size(3)});
}

void check_arguments(const char* op, const Tensor& o1, const Tensor& lse1, const Tensor& o2, const Tensor& lse2) {
  using enum ScalarType;
  const std::string shape = shape_text(o1);
  check(o1.dim() == 4, op, ": o1: expected 4 dimensions [B, T, H, D], got shape ", shape);
  check_type(op, "o1", o1, {Float, Double, BFloat16, Half});
  check(o1.size(2) >= 1 && o1.size(3) >= 1, op, ": o1: expected at least 1 head and 1 channel, got shape ", shape);
  check_lse(op, "lse1", lse1, o1, {Float, real_of(o1.scalar_type())});
  check_rows(op, "o2", o2, o1);
  check_lse(op, "lse2", lse2, o1, {lse1.scalar_type()});
}

// ---- layout

int storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: return 0;
  }
}

Tensor with_dense_channels(const Tensor& t) { return dense_from(t, 3) ? t : torch::stable::contiguous(t); }

MergedRows rows(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

MergedSums sums(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor like(const Tensor& t, ScalarType dtype) {
  return new_output(t, Sizes(t.sizes().begin(), t.sizes().end()), dtype);
}

// ---- the work

constexpr int64_t NUMBERS_OF_THREAD = 1 << 15;  // of o: less is not worth waking another thread

void run(const MergeAttention& k, MergeAttentionPass pass) {
  const int64_t numbers = MergeAttention::STEPS * k.H * k.D;
  const int64_t grain = std::max<int64_t>(1, NUMBERS_OF_THREAD / numbers);
  torch::stable::parallel_for(0, k.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) pass(k, task);
  });
}

// A call as the kernels take it, and the tensors that it points to: sums in the type that is computed in.
struct Call {
  ScalarType dtype, real;
  Tensor o1, o2, lse1, lse2;
  MergeAttention arguments = {};

  Call(const Tensor& first, const Tensor& first_sums, const Tensor& second, const Tensor& second_sums)
      : dtype(first.scalar_type()),
        real(real_of(dtype)),
        o1(with_dense_channels(first)),
        o2(with_dense_channels(second)),
        lse1(as_type(first_sums, real)),
        lse2(as_type(second_sums, real)) {
    MergeAttention& k = arguments;
    k.B = o1.size(0), k.T = o1.size(1), k.H = o1.size(2), k.D = o1.size(3);
    k.o1 = rows(o1), k.o2 = rows(o2), k.lse1 = sums(lse1), k.lse2 = sums(lse2);
  }
};

std::tuple<Tensor, Tensor> merge_attention(const Tensor& o1, const Tensor& lse1, const Tensor& o2, const Tensor& lse2) {
  check_arguments("merge_attention", o1, lse1, o2, lse2);
  Call call(o1, lse1, o2, lse2);
  Tensor o = like(o1, call.dtype), lse = like(lse1, call.real);
  call.arguments.o = rows(o), call.arguments.lse = sums(lse);
  if (o.numel() > 0) run(call.arguments, kernels().forward[storage_of(call.dtype)]);
  return {o, as_type(lse, lse1.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_backward(Optional grad_o, Optional grad_lse,
                                                                    const Tensor& o1, const Tensor& lse1,
                                                                    const Tensor& o2, const Tensor& lse2) {
  const char* op = "merge_attention_backward";
  check_arguments(op, o1, lse1, o2, lse2);
  if (grad_o) check_rows(op, "grad_o", *grad_o, o1);
  if (grad_lse) check_lse(op, "grad_lse", *grad_lse, o1, {lse1.scalar_type()});
  Call call(o1, lse1, o2, lse2);
  const Optional grad = grad_o ? Optional(with_dense_channels(*grad_o)) : grad_o,
                 grad_sums = grad_lse ? Optional(as_type(*grad_lse, call.real)) : grad_lse;
  Tensor do1 = like(o1, call.dtype), dlse1 = like(lse1, call.real), do2 = like(o2, call.dtype),
         dlse2 = like(lse2, call.real);
  MergeAttention& k = call.arguments;
  if (grad) k.grad_o = rows(*grad);
  if (grad_sums) k.grad_lse = sums(*grad_sums);
  k.do1 = rows(do1), k.do2 = rows(do2), k.dlse1 = sums(dlse1), k.dlse2 = sums(dlse2);
  if (do1.numel() > 0) run(k, kernels().backward[storage_of(call.dtype)]);
  return {do1, as_type(dlse1, lse1.scalar_type()), do2, as_type(dlse2, lse1.scalar_type())};
}

}  // namespace
}  // namespace seqops

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("merge_attention(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor o, Tensor lse)");
  m.def(
      "merge_attention_backward(Tensor? grad_o, Tensor? grad_lse, Tensor o1, Tensor lse1, Tensor o2, Tensor lse2)"
      " -> (Tensor do1, Tensor dlse1, Tensor do2, Tensor dlse2)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("merge_attention", TORCH_BOX(&seqops::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&seqops::merge_attention_backward));
}
