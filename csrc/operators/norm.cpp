// CPU side of `residual_norm`: checks, memory, threads.
#include "cpu/dispatch.h"
#include "tensors.h"

namespace megatron_retro {
namespace {

int64_t rows_of(const Tensor& input, int64_t width) { return width ? input.numel() / width : 0; }

// Weight and bias stay alive in `kept` in the type that the kernel computes in.
Norm arguments(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, double epsilon, bool centered,
    double weight_offset, std::vector<Tensor>& kept) {
  require(input.dim() >= 1, "input must have at least one dimension");
  require(input.is_contiguous(), "input must be contiguous");
  Norm call{};
  call.centered = centered;
  call.epsilon = epsilon;
  call.weight_offset = weight_offset;
  call.width = input.size(input.dim() - 1);
  check_vector(weight, "weight", call.width);
  kept.push_back(torch::stable::contiguous(torch::stable::to(weight, compute_type(input))));
  call.weight = kept.back().const_data_ptr();
  if (bias) {
    check_vector(*bias, "bias", call.width);
    kept.push_back(torch::stable::contiguous(torch::stable::to(*bias, compute_type(input))));
    call.bias = kept.back().const_data_ptr();
  }
  call.input = input.const_data_ptr();
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm(
    const Tensor& input, const OptionalTensor& residual, const Tensor& weight, const OptionalTensor& bias,
    double epsilon, bool centered, double weight_offset) {
  const Stored stored = stored_type(input, "input");
  std::vector<Tensor> kept;
  Norm call = arguments(input, weight, bias, epsilon, centered, weight_offset, kept);
  const int64_t rows = rows_of(input, call.width);
  Tensor output = torch::stable::empty_like(input);
  Tensor sum = residual ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  Tensor mean = torch::stable::new_empty(input, {rows}, compute_type(input));
  Tensor inverse_deviation = torch::stable::empty_like(mean);
  if (residual) {
    check_like(*residual, "residual", input, "input");
    check_same_shape(*residual, "residual", input, "input");
    require(residual->is_contiguous(), "residual must be contiguous");
    call.residual = residual->const_data_ptr();
    call.sum = sum.mutable_data_ptr();
  }
  call.output = output.mutable_data_ptr();
  call.mean = mean.mutable_data_ptr();
  call.inverse_deviation = inverse_deviation.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::norm_forward(stored, call, first, last);
  });
  return {output, sum, mean, inverse_deviation};
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input, const Tensor& mean,
    const Tensor& inverse_deviation, const Tensor& weight, const OptionalTensor& bias, bool centered,
    double weight_offset) {
  const Stored stored = stored_type(input, "input");
  std::vector<Tensor> kept;
  Norm call = arguments(input, weight, bias, 0.0, centered, weight_offset, kept);
  const int64_t rows = rows_of(input, call.width), parts = num_parts(rows, grain_of(call.width));
  check_like(grad_output, "grad_output", input, "input");
  check_same_shape(grad_output, "grad_output", input, "input");
  require(grad_output.is_contiguous(), "grad_output must be contiguous");
  if (grad_sum) {
    check_like(*grad_sum, "grad_sum", input, "input");
    check_same_shape(*grad_sum, "grad_sum", input, "input");
    require(grad_sum->is_contiguous(), "grad_sum must be contiguous");
  }
  Tensor grad_input = torch::stable::empty_like(input);
  call.grad_output = grad_output.const_data_ptr();
  call.grad_sum = pointer(grad_sum);
  call.mean = const_cast<void*>(mean.const_data_ptr());
  call.inverse_deviation = const_cast<void*>(inverse_deviation.const_data_ptr());
  call.grad_input = grad_input.mutable_data_ptr();
  PartialSums weights(input, parts, call.width), biases(input, bias ? parts : 0, call.width);
  for_parts(rows, parts, [&](int64_t part, int64_t first, int64_t last) {
    Norm own = call;
    own.partial_grad_weight = weights.part(part);
    own.partial_grad_bias = bias ? biases.part(part) : nullptr;
    cpu::norm_backward(stored, own, first, last);
  });
  return {grad_input, weights.total(weight), biases.total(bias ? *bias : weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("residual_norm", TORCH_BOX(&residual_norm));
  library.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
}

}  // namespace megatron_retro
