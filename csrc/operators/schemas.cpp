// Every operator's schema, once. Implementations register themselves for CPU and CUDA; fake and autograd are in
// megatron_retro/ops/library.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megatron_retro, library) {
  library.def("gated_activation(Tensor input, Tensor? bias, int kind, bool gated) -> Tensor");
  library.def(
      "gated_activation_backward(Tensor grad_output, Tensor input, Tensor? bias, int kind, bool gated)"
      " -> (Tensor, Tensor)");
}
