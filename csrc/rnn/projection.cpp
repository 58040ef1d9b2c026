// The input projection: schema, checks, allocation. The kernel is in projection_kernel.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "host.h"

namespace seqops {
namespace {

Tensor project(const Tensor& x, const Tensor& weight, Optional bias) {
  const char* op = "project";
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": x: expected float32 or float64, got ",
        dtype_text(dtype));
  check(x.dim() >= 1, op, ": x: expected at least 1 dimension [..., in], got shape ", shape_text(x));
  check(weight.dim() == 2, op, ": weight: expected 2 dimensions [out, in], got shape ", shape_text(weight));
  const int64_t depth = x.size(x.dim() - 1), units = weight.size(0);
  check_device(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, "[out, in]", {units, depth});
  check(weight.scalar_type() == dtype, op, ": weight: expected x's dtype ", dtype_text(dtype), ", got ",
        dtype_text(weight.scalar_type()));
  if (bias) {
    check_device(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, "[out]", {units});
    check(bias->scalar_type() == dtype, op, ": bias: expected x's dtype ", dtype_text(dtype), ", got ",
          dtype_text(bias->scalar_type()));
  }
  const auto x_sizes = x.sizes();
  Sizes sizes(x_sizes.begin(), x_sizes.end());
  sizes.back() = units;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * y.element_size());

  const Tensor dense_x = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const bool dense_weight = weight.stride(0) == 1 || weight.stride(1) == 1;
  const Tensor w = dense_weight ? weight : torch::stable::contiguous(weight);
  const Optional dense_bias = bias ? Optional(torch::stable::contiguous(*bias)) : bias;
  const Tiles& tiles = *kernels_in_use().tiles;
  const bool wide = dtype == ScalarType::Double;
  const Panels panels = projection_panels(units, wide ? tiles.lanes_double : tiles.lanes_float, depth);
  const Scratch packed(panels.head_size() * (wide ? 8 : 4));
  alignas(64) int64_t arrived = 0;
  Projection a = {};
  a.rows = y.numel() / units, a.units = units, a.depth = depth;
  a.workers = std::min(team_size(), a.rows);
  a.arrived = &arrived;
  a.x = dense_x.const_data_ptr();
  a.stride_x = depth;
  a.weight = w.const_data_ptr();
  a.stride_unit = w.stride(0), a.stride_k = w.stride(1);
  a.bias = data(dense_bias);
  a.packed = packed.get();
  a.y = y.mutable_data_ptr();
  const ProjectionKernels& kernels = *kernels_in_use().projection;
  const ProjectionKernel kernel = wide ? kernels.float64 : kernels.float32;
  torch::stable::parallel_for(0, a.workers, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

}  // namespace
}  // namespace seqops

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) { m.def("project(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) { m.impl("project", TORCH_BOX(&seqops::project)); }
