// `small_batch_gemv`, for the CPU only: checks, memory, threads over outputs.
#include "tensors.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

Tensor small_batch_gemv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Stored stored = stored_type(input, "input");
  require(weight.dim() == 2 && weight.is_contiguous(), "weight must be contiguous [outputs, inputs]");
  check_like(weight, "weight", input, "input");
  require(input.dim() == 2 && input.is_contiguous(), "input must be contiguous [rows, inputs]");
  require(
      input.size(1) == weight.size(1), "input must have the ", weight.size(1), " columns of weight, got the shape ",
      shape_of(input));
  SmallBatchGemv call{};
  call.rows = input.size(0);
  call.depth = weight.size(1);
  call.outputs = weight.size(0);
  if (bias) {
    check_like(*bias, "bias", input, "input");
    check_vector(*bias, "bias", call.outputs);
    require(bias->is_contiguous(), "bias must be contiguous");
    call.bias = bias->const_data_ptr();
  }
  const bool wide_already = input.scalar_type() == compute_type(input);
  const Tensor wide = wide_already ? input : torch::stable::to(input, compute_type(input));
  call.input = wide.const_data_ptr();
  call.weight = weight.const_data_ptr();
  Tensor output = torch::stable::new_empty(input, {call.rows, call.outputs});
  call.output = output.mutable_data_ptr();
  torch::stable::parallel_for(0, call.outputs, grain_of(call.depth), [&](int64_t first, int64_t last) {
    cpu::small_batch_gemv(stored, call, first, last);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) { library.impl("small_batch_gemv", TORCH_BOX(&small_batch_gemv)); }

}  // namespace megatron_retro
