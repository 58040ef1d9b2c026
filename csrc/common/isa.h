// Instruction sets: every csrc/<room>/*_kernel.cpp is compiled once for each, with -DSEQOPS_ISA=<name> and its flags.
//
// Kernel files keep all code in `namespace seqops::SEQOPS_ISA { namespace { ... } }` and use no template or inline
// function of the standard library: the compiler would emit it as a mergeable symbol that holds, say, AVX-512 code, the
// linker would keep one copy for the whole module, and a machine without AVX-512 would run it. setup.py checks this.
#pragma once

#define SEQOPS_STRING_(name) #name
#define SEQOPS_STRING(name) SEQOPS_STRING_(name)

#if defined(__x86_64__)
#define SEQOPS_FOR_EACH_ISA(DO) DO(baseline) DO(avx2) DO(avx512) DO(avx512_bf16)
#else
#define SEQOPS_FOR_EACH_ISA(DO) DO(baseline)
#endif

namespace seqops {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };  // each contains those before it

// The widest set that this machine has and SEQOPS_CPU_ISA (one of these names) allows; read once, at load.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace seqops
