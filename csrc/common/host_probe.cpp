// Measuring the CPU, called from seqops/tune/probe.py through ctypes. Every function uses torch's threads, as kernels do.
#include "host_probe.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "memory.h"

#define SEQOPS_EXPORTED __attribute__((visibility("default")))

namespace seqops {

#define SEQOPS_DECLARE(name)         \
  namespace name {                   \
  extern const HostProbe host_probe; \
  }
SEQOPS_FOR_EACH_ISA(SEQOPS_DECLARE)
#undef SEQOPS_DECLARE

namespace {

const HostProbe& loops() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::host_probe;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("probe: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

using Clock = std::chrono::steady_clock;

double microseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

template <class Work>  // Work: called with each worker's number
void for_each_worker(const Work& work) {
  torch::stable::parallel_for(0, threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

volatile float ignored;  // sums end here, so that they are computed

}  // namespace
}  // namespace seqops

extern "C" {

// Microseconds in which all threads are started and have ended, the mean of so many times.
SEQOPS_EXPORTED double seqops_probe_fork(int64_t rounds) {
  const auto start = seqops::Clock::now();
  for (int64_t round = 0; round < rounds; ++round) seqops::for_each_worker([](int64_t) {});
  return seqops::microseconds_since(start) / static_cast<double>(rounds);
}

// Microseconds in which the threads meet once.
SEQOPS_EXPORTED double seqops_probe_barrier(int64_t rounds) {
  const auto& loops = seqops::loops();
  const int64_t workers = seqops::threads();
  int64_t arrived = 0;
  std::vector<double> spent(workers);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const auto start = seqops::Clock::now();
    loops.meet(&arrived, workers, end - begin, rounds);
    spent[begin] = seqops::microseconds_since(start);
  });
  return *std::max_element(spent.begin(), spent.end()) / static_cast<double>(rounds);
}

// Bytes that a thread reads in a microsecond, all of them reading `bytes` of their own again and again; negative if
// there is no memory.
SEQOPS_EXPORTED double seqops_probe_read(int64_t bytes, int64_t rounds) {
  const auto& loops = seqops::loops();
  const int64_t n = std::max<int64_t>(bytes / 2048, 1) * 512;
  std::vector<seqops::Scratch> buffers;
  std::vector<double> rates(seqops::threads());
  try {
    for (size_t worker = 0; worker < rates.size(); ++worker) buffers.emplace_back(n * int64_t{sizeof(float)});
  } catch (const std::runtime_error&) {
    return -1;
  }
  seqops::for_each_worker([&](int64_t worker) {  // each first written where it is read
    std::fill_n(static_cast<float*>(buffers[worker].get()), n, 1.0f);
  });
  seqops::for_each_worker([&](int64_t worker) {
    const auto* values = static_cast<const float*>(buffers[worker].get());
    seqops::ignored = loops.read(values, n, 1);
    const auto start = seqops::Clock::now();
    seqops::ignored = loops.read(values, n, rounds);
    rates[worker] = static_cast<double>(n * sizeof(float)) * static_cast<double>(rounds) /
                    std::max(seqops::microseconds_since(start), 1e-3);
  });
  return seqops::mean(rates);
}

// Float32 multiply-adds of a thread in a microsecond, all of them at it.
SEQOPS_EXPORTED double seqops_probe_multiply_add(int64_t rounds) {
  const auto& loops = seqops::loops();
  std::vector<double> rates(seqops::threads());
  seqops::for_each_worker([&](int64_t worker) {
    const auto start = seqops::Clock::now();
    seqops::ignored = loops.multiply_add(rounds);
    rates[worker] =
        static_cast<double>(rounds * loops.multiply_adds) / std::max(seqops::microseconds_since(start), 1e-3);
  });
  return seqops::mean(rates);
}
}
