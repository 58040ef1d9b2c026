#include "host_probe.h"
#include "team.h"
#include "vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

// Enough sums to hide the latency of an addition, few enough for sixteen registers.
constexpr int SUMS = 8;
constexpr int CHAINS = 12;

float total(const Vector<float>* vectors, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) {
    for (int lane = 0; lane < LANES<float>; ++lane) sum += vectors[i][lane];
  }
  return sum;
}

float read(const float* values, int64_t n, int64_t rounds) {
  Vector<float> sums[SUMS] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < n; i += SUMS * LANES<float>) {
#pragma GCC unroll 8
      for (int k = 0; k < SUMS; ++k) sums[k] += load(values + i + k * LANES<float>);
    }
    asm volatile("" ::: "memory");  // each round reads anew
  }
  return total(sums, SUMS);
}

float multiply_add(int64_t rounds) {
  Vector<float> chains[CHAINS];
  for (int k = 0; k < CHAINS; ++k) chains[k] = constant<float>(k);
  Vector<float> factor = constant<float>(0.5), term = constant<float>(1);
  asm volatile("" : "+m"(factor), "+m"(term));  // unknown, or the compiler would solve the recurrence
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int k = 0; k < CHAINS; ++k) chains[k] = chains[k] * factor + term;
  }
  return total(chains, CHAINS);
}

void meet(int64_t* arrived, int64_t workers, int64_t played, int64_t rounds) {
  Team team(arrived, workers, played);
  for (int64_t round = 0; round < rounds; ++round) team.wait();
}

}  // namespace

extern const HostProbe host_probe = {read, multiply_add, int64_t{CHAINS} * LANES<float>, meet};

}  // namespace seqops::SEQOPS_ISA
