// What makes kernels of a cell, by constant: with STEP the pointwise kernels of one step, else those of whole sequences.
#pragma once

#if defined(STEP)
#include "rnn/step.h"
#else
#include "rnn/device.h"
#endif
