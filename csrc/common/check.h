// Argument checks of operators. A failure throws std::invalid_argument, which reaches Python as ValueError with exactly
// this text: "<operator>: <argument>: expected <what>, got <what>". seqops/core/validate.py has the same texts for
// tensors without data; tests hold both to one table.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace seqops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class Sizes>
std::string list_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& t) { return list_text(t.sizes()); }

std::string dtype_text(ScalarType dtype);  // as Python writes it, without "torch."
std::string device_text(const Tensor& t);

// `name` must have this shape; `letters` says what its dimensions are, as in "[B, H, D]".
void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 std::initializer_list<int64_t> expected);
void check_device(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like);

}  // namespace seqops
