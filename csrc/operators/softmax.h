// What the CPU and the CUDA side of the softmax operators share: checks and strides.
#pragma once

#include "tensors.h"

namespace megatron_retro {

inline float* row_values(const Tensor& tensor, const char* what, const Tensor& logits) {
  check_statistic(tensor, what, logits.size(0), logits, "logits");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline VocabularyBlock block_of(const Tensor& logits, const Tensor& labels, int64_t first_label) {
  require(logits.dim() == 2, "logits must be [positions, labels], got ", shape_of(logits));
  require(logits.size(1) <= 1 || logits.stride(1) == 1, "the last dimension of logits must be contiguous");
  require(logits.scalar_type() != ScalarType::Double, "logits must be float32, bfloat16 or float16");
  require(labels.scalar_type() == ScalarType::Long && labels.is_contiguous(), "labels must be contiguous int64");
  check_vector(labels, "labels", logits.size(0));
  check_device(labels, "labels", logits, "logits");
  VocabularyBlock call{};
  call.width = logits.size(1);
  call.stride = logits.stride(0);
  call.first_label = first_label;
  call.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  call.logits = logits.mutable_data_ptr();
  return call;
}

inline MaskedSoftmax softmax_arguments(const Tensor& scores, double scale) {
  require(scores.dim() >= 1 && scores.is_contiguous(), "scores must be contiguous");
  MaskedSoftmax call{};
  call.width = scores.size(scores.dim() - 1);
  call.scale = scale;
  call.input = scores.const_data_ptr();
  return call;
}

inline int64_t softmax_rows(const Tensor& scores, int64_t width) { return width ? scores.numel() / width : 0; }

inline void set_mask(MaskedSoftmax& call, const OptionalTensor& mask, const Tensor& scores) {
  if (!mask) return;
  const int64_t rows = softmax_rows(scores, call.width);
  check_device(*mask, "mask", scores, "scores");
  require(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous(), "mask must be contiguous bool");
  const int64_t mask_rows = softmax_rows(*mask, call.width);
  require(
      mask->dim() >= 1 && mask->size(mask->dim() - 1) == call.width && (mask_rows ? rows % mask_rows : rows) == 0,
      "mask must have the columns of scores and rows that divide its rows: got ", shape_of(*mask), " for ",
      shape_of(scores));
  call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  call.rows_per_mask = mask_rows ? rows / mask_rows : 1;
}

inline Tensor softmax_gradient(MaskedSoftmax& call, const Tensor& grad_output, const Tensor& output) {
  check_like(grad_output, "grad_output", output, "output");
  check_same_shape(grad_output, "grad_output", output, "output");
  require(grad_output.is_contiguous(), "grad_output must be contiguous");
  Tensor grad_input = torch::stable::empty_like(output);
  call.output = const_cast<void*>(output.const_data_ptr());
  call.grad_output = grad_output.const_data_ptr();
  call.grad_input = grad_input.mutable_data_ptr();
  return grad_input;
}

}  // namespace megatron_retro
