// What the CPU and the CUDA side of `residual_norm` share: checks and memory.
#pragma once

#include "tensors.h"

namespace megatron_retro {

inline int64_t norm_rows(const Tensor& input, int64_t width) { return width ? input.numel() / width : 0; }

// Weight and bias stay alive in `kept` in the type that the kernel computes in.
inline Norm norm_arguments(
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
  check_device(weight, "weight", input, "input");
  stored_type(weight, "weight");
  kept.push_back(torch::stable::contiguous(torch::stable::to(weight, compute_type(input))));
  call.weight = kept.back().const_data_ptr();
  if (bias) {
    check_vector(*bias, "bias", call.width);
    check_device(*bias, "bias", input, "input");
    stored_type(*bias, "bias");
    kept.push_back(torch::stable::contiguous(torch::stable::to(*bias, compute_type(input))));
    call.bias = kept.back().const_data_ptr();
  }
  call.input = input.const_data_ptr();
  return call;
}

// The outputs of the forward pass; `call` points into them.
struct NormResults {
  Tensor output, sum, mean, inverse_deviation;

  NormResults(Norm& call, const Tensor& input, const OptionalTensor& residual)
      : output(torch::stable::empty_like(input)),
        sum(residual ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0})),
        mean(torch::stable::new_empty(input, {norm_rows(input, call.width)}, compute_type(input))),
        inverse_deviation(torch::stable::empty_like(mean)) {
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
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {output, sum, mean, inverse_deviation}; }
};

// Points `call` at what the backward pass reads; returns the gradient of the input that it fills.
inline Tensor norm_gradient(
    Norm& call, const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input, const Tensor& mean,
    const Tensor& inverse_deviation) {
  check_like(grad_output, "grad_output", input, "input");
  check_same_shape(grad_output, "grad_output", input, "input");
  require(grad_output.is_contiguous(), "grad_output must be contiguous");
  if (grad_sum) {
    check_like(*grad_sum, "grad_sum", input, "input");
    check_same_shape(*grad_sum, "grad_sum", input, "input");
    require(grad_sum->is_contiguous(), "grad_sum must be contiguous");
  }
  const int64_t rows = norm_rows(input, call.width);
  check_statistic(mean, "mean", rows, input, "input");
  check_statistic(inverse_deviation, "inverse_deviation", rows, input, "input");
  Tensor grad_input = torch::stable::empty_like(input);
  call.grad_output = grad_output.const_data_ptr();
  call.grad_sum = pointer(grad_sum);
  call.mean = const_cast<void*>(mean.const_data_ptr());
  call.inverse_deviation = const_cast<void*>(inverse_deviation.const_data_ptr());
  call.grad_input = grad_input.mutable_data_ptr();
  return grad_input;
}

}  // namespace megatron_retro
