// What every room's host code does with tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "memory.h"

namespace seqops {

using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline const void* data(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// float32, float64, bfloat16 or float16.
inline bool is_storage(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// What a storage type is computed in, and what its states have.
inline ScalarType real_of(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

inline Tensor as_type(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// `t` in this type and contiguous, or nothing.
inline Optional dense(const Optional& t, ScalarType dtype) {
  if (!t) return t;
  const Tensor converted = as_type(*t, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline Tensor new_output(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  prefer_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

}  // namespace seqops
