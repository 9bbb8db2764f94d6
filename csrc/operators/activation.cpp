// CPU side of `gated_activation`: checks, memory, threads.
#include "activation.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

Tensor gated_activation(const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  const Stored stored = stored_type(input, "input");
  Activation call = activation_arguments(input, bias, kind, gated);
  Tensor output = activation_output(input, call.width);
  call.output = output.mutable_data_ptr();
  torch::stable::parallel_for(0, activation_rows(input), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::activation_forward(stored, call, first, last);
  });
  return output;
}

std::tuple<Tensor, Tensor> gated_activation_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  const Stored stored = stored_type(input, "input");
  Activation call = activation_arguments(input, bias, kind, gated);
  check_grad_output(grad_output, input, call);
  Tensor grad_input = torch::stable::empty_like(input);
  call.grad_output = grad_output.const_data_ptr();
  call.grad_input = grad_input.mutable_data_ptr();
  const int64_t rows = activation_rows(input), parts = num_parts(rows, grain_of(call.width));
  PartialSums sums(input, bias ? parts : 0, call.input_stride);
  for_parts(rows, parts, [&](int64_t part, int64_t first, int64_t last) {
    Activation own = call;
    own.partial_grad_bias = bias ? sums.block(part) : nullptr;
    for (int64_t row = first; row < last; row += PartialSums::rows_per_flush) {
      cpu::activation_backward(stored, own, row, std::min(row + PartialSums::rows_per_flush, last));
      if (bias) sums.flush(part);
    }
  });
  return {grad_input, sums.total(input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("gated_activation", TORCH_BOX(&gated_activation));
  library.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
}

}  // namespace megatron_retro
