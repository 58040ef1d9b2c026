// Memory of kernels: large fresh outputs, and scratch for the length of a call.
#pragma once

#include <stddef.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace seqops {

// Asks the system to back a large block by huge pages as it is first written: the first write of a fresh output is what
// costs, a page fault for every 4 KB. Only a hint.
void prefer_huge_pages(void* begin, size_t bytes);

// Memory for the length of a call.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT)) {
    if (data_ == nullptr) throw std::runtime_error("seqops: out of memory");
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
