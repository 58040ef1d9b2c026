#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace seqops {
namespace {

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa widest = supported();
  const char* wish = std::getenv("SEQOPS_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return widest;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::string(wish) == isa_name(isa)) return isa < widest ? isa : widest;
  }
  throw std::invalid_argument(std::string("SEQOPS_CPU_ISA: expected baseline, avx2, avx512 or avx512_bf16, got ") +
                              wish);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace seqops
