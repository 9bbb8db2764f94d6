// What the CPU kernels are called with. Tensors come as plain pointers; each call does rows first..last of its work.
//
// Gradients of weights and biases are sums over rows: every caller thread hands in a float buffer of its own
// (`partial_*`), and the caller adds them up in a fixed order.
#pragma once

#include <cstdint>

namespace megatron_retro {

enum class Stored : int { float32, bfloat16, float16, float64 };

enum class ActivationKind : int { silu, gelu, gelu_tanh, squared_relu };

struct Activation {
  ActivationKind kind;
  bool gated;           // input rows hold [gate, up]; otherwise `up` is absent
  int64_t width;        // of the output
  int64_t input_stride; // elements from one input row to the next
  const void* input;
  const void* bias;     // like one input row, or null
  void* output;
  const void* grad_output;
  void* grad_input;
  void* partial_grad_bias;  // compute type, one input row, or null
};

// name, arguments
#define MEGATRON_RETRO_KERNELS(KERNEL)         \
  KERNEL(activation_forward, Activation)       \
  KERNEL(activation_backward, Activation)

#define MEGATRON_RETRO_DECLARE(name, Arguments) void name(Stored stored, const Arguments& call, int64_t first, int64_t last);
#define MEGATRON_RETRO_DECLARE_ALL(set) \
  namespace set {                       \
  MEGATRON_RETRO_KERNELS(MEGATRON_RETRO_DECLARE) \
  }
MEGATRON_RETRO_DECLARE_ALL(generic)
#if defined(__x86_64__)
MEGATRON_RETRO_DECLARE_ALL(avx2)
MEGATRON_RETRO_DECLARE_ALL(avx512)
#endif

}  // namespace megatron_retro
