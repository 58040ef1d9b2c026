#include "rows.h"

#include <algorithm>

namespace seqops {

std::string any_of(std::initializer_list<ScalarType> dtypes) {
  std::vector<std::string> names;
  for (const ScalarType dtype : dtypes) {
    const std::string name = dtype_text(dtype);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  std::string text = names[0];
  for (size_t i = 1; i < names.size(); ++i) text += (i + 1 == names.size() ? " or " : ", ") + names[i];
  return text;
}

void check_type(const char* op, const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), t.scalar_type()) != allowed.end()) return;
  check(false, op, ": ", name, ": expected ", any_of(allowed), ", got ", dtype_text(t.scalar_type()));
}

std::vector<Row> rows_of(const char* op, const char* name, const Tensor& like, const Optional& cu_seqlens) {
  const int64_t B = like.size(0), T = like.size(1);
  std::vector<Row> rows;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < B; ++b) rows.push_back({b, 0, T});
    return rows;
  }
  const char* cu = "cu_seqlens";
  check(B == 1, op, ": ", name, ": expected batch 1 with cu_seqlens, got shape ", shape_text(like));
  check_device(op, cu, *cu_seqlens, name, like);
  check_type(op, cu, *cu_seqlens, {ScalarType::Int, ScalarType::Long});
  check(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op, ": ", cu, ": expected 1 dimension [N + 1], got shape ",
        shape_text(*cu_seqlens));
  const bool narrow = cu_seqlens->scalar_type() == ScalarType::Int;
  const auto value = [&](int64_t i) -> int64_t {
    const int64_t at = i * cu_seqlens->stride(0);
    return narrow ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr())[at]
                  : static_cast<const int64_t*>(cu_seqlens->const_data_ptr())[at];
  };
  check(value(0) == 0, op, ": ", cu, ": expected 0 at index 0, got ", value(0));
  const int64_t N = cu_seqlens->size(0) - 1;
  for (int64_t n = 0; n < N; ++n) {
    check(value(n + 1) >= value(n), op, ": ", cu, ": expected no decrease, got ", value(n + 1), " after ", value(n),
          " at index ", n + 1);
    rows.push_back({0, value(n), value(n + 1) - value(n)});
  }
  check(value(N) == T, op, ": ", cu, ": expected T = ", T, " at the end, got ", value(N));
  return rows;
}

// ---- layout

bool dense_from(const Tensor& t, int64_t from) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= from; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

Sequence sequence(const Tensor& t, int64_t batches, int64_t steps, int64_t parts) {
  const bool one_batch = t.size(0) == 1 && batches > 1, one_step = t.size(1) == 1 && steps > 1;
  return {const_cast<void*>(t.const_data_ptr()), one_batch ? 0 : t.stride(0) * parts,
          one_step ? 0 : t.stride(1) * parts};
}

Sequence sequence(const Optional& t, int64_t batches, int64_t steps, int64_t parts) {
  return t ? sequence(*t, batches, steps, parts) : Sequence{};
}

}  // namespace seqops
