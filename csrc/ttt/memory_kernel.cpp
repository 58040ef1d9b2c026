// A memory that learns while it reads, on the CPU, compiled once per instruction set: the table of passes. See memory.h.
#include "memory_backward.h"
#include "memory_forward.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class S>
constexpr MemoryKernels::Pass FORWARD = {MemoryForward<S>::buffers_size, MemoryForward<S>::run};
template <class S>
constexpr MemoryKernels::Pass BACKWARD = {MemoryBackward<S>::buffers_size, MemoryBackward<S>::run};

}  // namespace

extern const MemoryKernels memory_kernels = {
    {FORWARD<float>, FORWARD<double>, FORWARD<bfloat16>, FORWARD<float16>},
    {BACKWARD<float>, BACKWARD<double>, BACKWARD<bfloat16>, BACKWARD<float16>},
};

}  // namespace seqops::SEQOPS_ISA
