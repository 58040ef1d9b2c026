// What the host side of the room shares: the kernels in use, the number of workers, memory for the length of a call.
#pragma once

#include "../common/tensor.h"
#include "rnn.h"

namespace seqops {

struct IsaKernels {
  const CellKernels* cells[4];  // by Cell
  const Tiles* tiles;
  const ProjectionKernels* projection;
};

// The kernels of the instruction set in use.
const IsaKernels& kernels_in_use();

// Threads that may meet at a barrier.
int64_t team_size();

}  // namespace seqops
