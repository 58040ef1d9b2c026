#include "memory.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqops {

void prefer_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + bytes) / PAGE * PAGE;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace seqops
