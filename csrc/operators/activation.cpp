// CPU side of `gated_activation`: checks, memory, threads.
#include "cpu/dispatch.h"
#include "tensors.h"

namespace megatron_retro {
namespace {

Activation arguments(const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
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

Tensor output_of(const Tensor& input, int64_t width) {
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = width;
  return torch::stable::new_empty(input, shape);
}

int64_t rows_of(const Tensor& input) {
  const int64_t width = input.size(input.dim() - 1);
  return width ? input.numel() / width : 0;
}

Tensor gated_activation(const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  const Stored stored = stored_type(input, "input");
  Activation call = arguments(input, bias, kind, gated);
  Tensor output = output_of(input, call.width);
  call.output = output.mutable_data_ptr();
  torch::stable::parallel_for(0, rows_of(input), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::activation_forward(stored, call, first, last);
  });
  return output;
}

std::tuple<Tensor, Tensor> gated_activation_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  const Stored stored = stored_type(input, "input");
  Activation call = arguments(input, bias, kind, gated);
  check_like(grad_output, "grad_output", input, "input");
  require(grad_output.is_contiguous(), "grad_output must be contiguous");
  check_vector(grad_output, "grad_output", rows_of(input) * call.width);
  Tensor grad_input = torch::stable::empty_like(input);
  call.grad_output = grad_output.const_data_ptr();
  call.grad_input = grad_input.mutable_data_ptr();
  const int64_t rows = rows_of(input), parts = num_parts(rows, grain_of(call.width));
  PartialSums sums(input, bias ? parts : 0, call.input_stride);
  for_parts(rows, parts, [&](int64_t part, int64_t first, int64_t last) {
    Activation own = call;
    own.partial_grad_bias = bias ? sums.part(part) : nullptr;
    cpu::activation_backward(stored, own, first, last);
  });
  return {grad_input, sums.total(input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("gated_activation", TORCH_BOX(&gated_activation));
  library.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
}

}  // namespace megatron_retro
