#include "host.h"

#include <torch/csrc/stable/library.h>

namespace seqops {

const IsaKernels& kernels_in_use() {
#define SEQOPS_ROW(name)                                                                       \
  case Isa::name: {                                                                            \
    static const IsaKernels row = {                                                            \
        {&name::lstm_kernels, &name::gru_kernels, &name::slstm_kernels, &name::elman_kernels}, \
        &name::rnn_tiles,                                                                      \
        &name::projection_kernels};                                                            \
    return row;                                                                                \
  }
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("rnn: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

namespace {

// Workers meet at barriers, so parallel_for must run them at the same time. Torch's OpenMP backend does; its other
// backend queues them on a pool that another call may occupy, and Python then allows one worker only.
bool allow_teams = true;

void set_allow_teams(bool allow) { allow_teams = allow; }

}  // namespace

int64_t team_size() { return allow_teams ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1; }

}  // namespace seqops

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) { m.def("_allow_teams(bool allow) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(seqops, CompositeExplicitAutograd, m) {
  m.impl("_allow_teams", TORCH_BOX(&seqops::set_allow_teams));
}
