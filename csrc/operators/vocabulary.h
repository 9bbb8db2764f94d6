// What the CPU and the CUDA side of the vocabulary's softmax share: checks and strides.
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

inline VocabularyBlock statistics_of(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& largest, const Tensor& sum,
    const Tensor& label_logit) {
  VocabularyBlock call = block_of(logits, labels, first_label);
  require(call.width > 0, "logits must have at least one column");
  call.largest = row_values(largest, "largest", logits);
  call.sum = row_values(sum, "sum", logits);
  call.label_logit = row_values(label_logit, "label_logit", logits);
  return call;
}

inline VocabularyBlock gradient_of(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& log_normalizer,
    const Tensor& scale) {
  VocabularyBlock call = block_of(logits, labels, first_label);
  call.log_normalizer = row_values(log_normalizer, "log_normalizer", logits);
  call.scale = row_values(scale, "scale", logits);
  return call;
}

}  // namespace megatron_retro
