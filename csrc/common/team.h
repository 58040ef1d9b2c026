// A barrier for the workers of one parallel_for, usable once a time step.
//
// parallel_for may hand several workers to one thread, or all of them when it decides to run serially. So a thread
// arrives with the number of workers it plays, and the barrier opens when all of them have arrived: no thread waits for
// one that does not exist. `arrived` starts at 0 and only counts upwards.
#pragma once

#include <sched.h>
#include <stdint.h>

#include "isa.h"

namespace seqops::SEQOPS_ISA {
namespace {

// Returns when the counter has come to `value`, which another thread that runs already will see to.
inline void wait_until(const int64_t* counter, int64_t value) {
  constexpr int SPINS = 2000;
  for (int polls = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++polls) {
    if (polls < SPINS) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    } else {
      sched_yield();  // more threads than cores: let the one we wait for run
    }
  }
}

class Team {
 public:
  Team(int64_t* arrived, int64_t workers, int64_t played) : arrived_(arrived), workers_(workers), played_(played) {}

  void wait() {
    if (played_ == workers_) return;
    open_at_ += workers_;
    if (__atomic_add_fetch(arrived_, played_, __ATOMIC_ACQ_REL) >= open_at_) return;
    wait_until(arrived_, open_at_);
  }

 private:
  int64_t* arrived_;
  int64_t workers_, played_;
  int64_t open_at_ = 0;
};

}  // namespace
}  // namespace seqops::SEQOPS_ISA
