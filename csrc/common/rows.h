// What host code checks of sequences, and how it hands them to kernels.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "sequence.h"
#include "tensor.h"

namespace seqops {

// "A", "A or B", "A, B or C", without repetitions.
std::string any_of(std::initializer_list<ScalarType> dtypes);
void check_type(const char* op, const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed);

// The sequences of a batch or, with cu_seqlens, those packed into its only row; checks cu_seqlens.
std::vector<Row> rows_of(const char* op, const char* name, const Tensor& like, const Optional& cu_seqlens);

// ---- layout

// Whether everything from dimension `from` on lies in one piece, first index slowest.
bool dense_from(const Tensor& t, int64_t from);
inline Tensor with_dense_steps(const Tensor& t) { return dense_from(t, 2) ? t : torch::stable::contiguous(t); }

// `t` [B, T, ...] as a kernel takes it; a size of 1 in B or T, where others have more, is a stride of 0. `parts`:
// scalars in an element (2 where complex numbers are taken as pairs of reals).
Sequence sequence(const Tensor& t, int64_t batches, int64_t steps, int64_t parts = 1);
Sequence sequence(const Optional& t, int64_t batches, int64_t steps, int64_t parts = 1);

}  // namespace seqops
