// What the CPU and the CUDA side of `gated_activation` share: checks and memory.
#pragma once

#include "tensors.h"

namespace megatron_retro {

inline Activation activation_arguments(const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  require(kind >= 0 && kind <= 3, "kind must be 0 (silu), 1 (gelu), 2 (gelu_tanh) or 3 (squared_relu)");
  require(input.dim() >= 1, "input must have at least one dimension");
  require(input.is_contiguous(), "input must be contiguous");
  const int64_t input_width = input.size(input.dim() - 1);
  require(!gated || input_width % 2 == 0, "a gated input must have an even last dimension, got ", input_width);
  if (bias) {
    check_like(*bias, "bias", input, "input");
    check_vector(*bias, "bias", input_width);
    require(bias->is_contiguous(), "bias must be contiguous");
  }
  Activation call{};
  call.kind = static_cast<ActivationKind>(kind);
  call.gated = gated;
  call.width = gated ? input_width / 2 : input_width;
  call.input_stride = input_width;
  call.input = input.const_data_ptr();
  call.bias = pointer(bias);
  return call;
}

inline Tensor activation_output(const Tensor& input, int64_t width) {
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = width;
  return torch::stable::new_empty(input, shape);
}

inline int64_t activation_rows(const Tensor& input) {
  const int64_t width = input.size(input.dim() - 1);
  return width ? input.numel() / width : 0;
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& input, const Activation& call) {
  check_like(grad_output, "grad_output", input, "input");
  require(grad_output.is_contiguous(), "grad_output must be contiguous");
  check_vector(grad_output, "grad_output", activation_rows(input) * call.width);
}

}  // namespace megatron_retro
