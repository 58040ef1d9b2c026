// What the host side of the room shares: the kernels in use, the number of workers, memory for the length of a call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../common/check.h"
#include "../common/memory.h"
#include "rnn.h"

namespace seqops {

using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

struct IsaKernels {
  const CellKernels* cells[4];  // by Cell
  const Tiles* tiles;
  const ProjectionKernels* projection;
};

// The kernels of the instruction set in use.
const IsaKernels& kernels_in_use();

// Threads that may meet at a barrier.
int64_t team_size();

inline const void* data(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// Memory for the length of a call.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT)) {
    if (data_ == nullptr) throw std::runtime_error("rnn: out of memory");
    prefer_huge_pages(data_.get(), bytes);
  }
  void* get() const { return data_.get(); }

 private:
  static constexpr int64_t ALIGNMENT = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

}  // namespace seqops
