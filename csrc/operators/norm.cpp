// CPU side of `residual_norm`: threads over rows.
#include "norm.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm(
    const Tensor& input, const OptionalTensor& residual, const Tensor& weight, const OptionalTensor& bias,
    double epsilon, bool centered, double weight_offset) {
  const Stored stored = stored_type(input, "input");
  std::vector<Tensor> kept;
  Norm call = norm_arguments(input, weight, bias, epsilon, centered, weight_offset, kept);
  const NormResults results(call, input, residual);
  const int64_t rows = norm_rows(input, call.width);
  torch::stable::parallel_for(0, rows, grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::norm_forward(stored, call, first, last);
  });
  return results.all();
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input, const Tensor& mean,
    const Tensor& inverse_deviation, const Tensor& weight, const OptionalTensor& bias, bool centered,
    double weight_offset) {
  const Stored stored = stored_type(input, "input");
  std::vector<Tensor> kept;
  Norm call = norm_arguments(input, weight, bias, 0.0, centered, weight_offset, kept);
  const Tensor grad_input = norm_gradient(call, grad_output, grad_sum, input, mean, inverse_deviation);
  const int64_t rows = norm_rows(input, call.width), parts = num_parts(rows, grain_of(call.width));
  PartialSums weights(input, parts, call.width), biases(input, bias ? parts : 0, call.width);
  for_parts(rows, parts, [&](int64_t part, int64_t first, int64_t last) {
    Norm own = call;
    own.partial_grad_weight = weights.block(part);
    own.partial_grad_bias = bias ? biases.block(part) : nullptr;
    for (int64_t row = first; row < last; row += PartialSums::rows_per_flush) {
      cpu::norm_backward(stored, own, row, std::min(row + PartialSums::rows_per_flush, last));
      weights.flush(part);
      if (bias) biases.flush(part);
    }
  });
  return {grad_input, weights.total(weight), biases.total(bias ? *bias : weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("residual_norm", TORCH_BOX(&residual_norm));
  library.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
}

}  // namespace megatron_retro
