// Large fresh outputs: their first write is what costs, a page fault for every 4 KB.
#pragma once

#include <stddef.h>

namespace seqops {

// Asks the system to back a large block by huge pages as it is first written. Only a hint.
void prefer_huge_pages(void* begin, size_t bytes);

}  // namespace seqops
