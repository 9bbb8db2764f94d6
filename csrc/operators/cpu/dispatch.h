// The kernels of the best instruction set that this processor has, as megatron_retro::cpu::NAME.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace megatron_retro {
namespace cpu {

enum class InstructionSet { generic, avx2, avx512 };

// MEGATRON_RETRO_INSTRUCTION_SET holds the choice down, for tests of the others.
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet chosen = [] {
    const char* wish = std::getenv("MEGATRON_RETRO_INSTRUCTION_SET");
    if (wish && !std::strcmp(wish, "generic")) return InstructionSet::generic;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bf16");
    if (wish && !std::strcmp(wish, "avx2") && avx2) return InstructionSet::avx2;
    return avx512 ? InstructionSet::avx512 : avx2 ? InstructionSet::avx2 : InstructionSet::generic;
  }();
  return chosen;
#else
  return InstructionSet::generic;
#endif
}

#if defined(__x86_64__)
#define MEGATRON_RETRO_DISPATCH(name, Arguments)                                                    \
  inline void name(Stored stored, const Arguments& call, int64_t first, int64_t last) {             \
    switch (instruction_set()) {                                                                    \
      case InstructionSet::avx512: return avx512::name(stored, call, first, last);                  \
      case InstructionSet::avx2: return avx2::name(stored, call, first, last);                      \
      case InstructionSet::generic: return generic::name(stored, call, first, last);                \
    }                                                                                               \
  }
#else
#define MEGATRON_RETRO_DISPATCH(name, Arguments)                                        \
  inline void name(Stored stored, const Arguments& call, int64_t first, int64_t last) { \
    generic::name(stored, call, first, last);                                           \
  }
#endif
MEGATRON_RETRO_KERNELS(MEGATRON_RETRO_DISPATCH)

}  // namespace cpu
}  // namespace megatron_retro
