// What the CPU's cost model is measured by: loops of one kind each, compiled once per instruction set.
#pragma once

#include <stdint.h>

namespace seqops {

struct HostProbe {
  // Sum of n floats, a multiple of 512, read so many times over.
  float (*read)(const float* values, int64_t n, int64_t rounds);

  // rounds times `multiply_adds` float32 multiply-adds that do not wait for each other.
  float (*multiply_add)(int64_t rounds);
  int64_t multiply_adds;

  // The workers of a parallel_for, of which this thread plays `played`, meet so many times; *arrived starts at 0.
  void (*meet)(int64_t* arrived, int64_t workers, int64_t played, int64_t rounds);
};

}  // namespace seqops
