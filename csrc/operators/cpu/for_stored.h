// From a run-time element type to a template argument.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {

template <typename Visitor>
inline void for_stored(Stored stored, Visitor&& visit) {
  switch (stored) {
    case Stored::float32: return visit(float{});
    case Stored::bfloat16: return visit(BFloat16{});
    case Stored::float16: return visit(Half{});
    case Stored::float64: return visit(double{});
  }
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
