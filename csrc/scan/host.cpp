#include "host.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace seqops::scan {

#define SEQOPS_ROW(name) \
  case Isa::name: return name::SEQOPS_TABLE;

const LinearScanKernels& linear_scan_kernels() {
#define SEQOPS_TABLE linear_scan_kernels
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("linear_scan: no kernels for this instruction set");
  }
#undef SEQOPS_TABLE
}

const SoftmaxScanKernels& softmax_scan_kernels() {
#define SEQOPS_TABLE softmax_scan_kernels
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("softmax_scan: no kernels for this instruction set");
  }
#undef SEQOPS_TABLE
}

// ---- checks

bool is_complex(ScalarType dtype) { return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble; }

ScalarType complex_of(ScalarType real) {
  return real == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

ScalarType real_part_of(ScalarType dtype) {
  if (dtype == ScalarType::ComplexFloat) return ScalarType::Float;
  return dtype == ScalarType::ComplexDouble ? ScalarType::Double : dtype;
}

// ---- states

Carried::Carried(const Plan& plan, Tensor& states)
    : plan_(plan), row_bytes_(states.size(0) == 0 ? 0 : states.numel() / states.size(0) * states.element_size()) {
  rows_ = static_cast<char*>(states.mutable_data_ptr());
  if (plan.chunked.empty()) return;
  buffer_ = Scratch(plan.slots * row_bytes_);
  std::memset(buffer_.get(), 0, plan.slots * row_bytes_);
  std::memcpy(buffer_.get(), rows_, states.size(0) * row_bytes_);
  for (const Plan::Chunked& chunked : plan.chunked) {
    std::memcpy(slot(chunked.slot), rows_ + chunked.row * row_bytes_, row_bytes_);
  }
}

void Carried::finish() const {
  if (buffer_.get() == nullptr) return;
  for (size_t r = 0; r < plan_.last_slot.size(); ++r) {
    std::memcpy(rows_ + r * row_bytes_, slot(plan_.last_slot[r]), row_bytes_);
  }
}

Tensor new_state(const Tensor& like, const Sizes& sizes, ScalarType dtype, const Optional& initial) {
  Tensor state = torch::stable::new_empty(like, sizes, dtype);
  if (initial) {
    torch::stable::copy_(state, *initial);
  } else if (state.numel() > 0) {
    std::memset(state.mutable_data_ptr(), 0, state.numel() * state.element_size());
  }
  return state;
}

}  // namespace seqops::scan
