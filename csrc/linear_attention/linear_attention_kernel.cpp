// Linear attention on the CPU, compiled once per instruction set: the table of passes. See linear_attention.h.
#include "backward.h"
#include "forward.h"

namespace seqops::SEQOPS_ISA {
namespace {

template <class S>
using Slots_ = ItemSlots<Compute<S>>;

template <class S>
void march(const LinearAttention& k, int64_t item, int64_t, int64_t, void* buffers, void*) {
  Forward<S>(k, item, buffers).march();
}

template <class S>
void states(const LinearAttention& k, int64_t item, int64_t begin, int64_t end, void* buffers, void* slots) {
  Forward<S> forward(k, item, buffers);
  if (!forward.is_short()) forward.states(begin, end, Slots_<S>(k, slots, false));
}

template <class S>
void fold(const LinearAttention& k, int64_t item, int64_t, int64_t, void* buffers, void* slots) {
  Forward<S> forward(k, item, buffers);
  if (!forward.is_short()) forward.fold(Slots_<S>(k, slots, false));
}

template <class S>
void outputs(const LinearAttention& k, int64_t item, int64_t begin, int64_t end, void* buffers, void* slots) {
  Forward<S> forward(k, item, buffers);
  if (forward.is_short()) return forward.march();
  forward.outputs(begin, end, Slots_<S>(k, slots, false));
}

template <class S>
void backward_states(const LinearAttention& k, int64_t item, int64_t begin, int64_t end, void* buffers, void* slots) {
  Backward<S>(k, item, buffers).states(begin, end, Slots_<S>(k, slots, true));
}

template <class S>
void backward_fold(const LinearAttention& k, int64_t item, int64_t, int64_t, void* buffers, void* slots) {
  Backward<S>(k, item, buffers).fold(Slots_<S>(k, slots, true));
}

template <class S>
void gradients(const LinearAttention& k, int64_t item, int64_t begin, int64_t end, void* buffers, void* slots) {
  Backward<S>(k, item, buffers).gradients(begin, end, Slots_<S>(k, slots, true));
}

template <class S>
constexpr LinearAttentionKernels::Forward FORWARD = {march<S>, states<S>, fold<S>, outputs<S>};
template <class S>
constexpr LinearAttentionKernels::Backward BACKWARD = {backward_states<S>, backward_fold<S>, gradients<S>};

}  // namespace

extern const LinearAttentionKernels linear_attention_kernels = {
    {FORWARD<float>, FORWARD<double>, FORWARD<bfloat16>, FORWARD<float16>},
    {BACKWARD<float>, BACKWARD<double>, BACKWARD<bfloat16>, BACKWARD<float16>},
};

}  // namespace seqops::SEQOPS_ISA
