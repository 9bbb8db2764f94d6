// CPU side of the vocabulary block of `linear_cross_entropy` and of `masked_softmax`: checks, memory, threads.
#include "cpu/dispatch.h"
#include "tensors.h"

namespace megatron_retro {
namespace {

float* row_values(const Tensor& tensor, const char* what, const Tensor& logits) {
  require(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), what, " must be contiguous float32");
  check_vector(tensor, what, logits.size(0));
  return static_cast<float*>(tensor.mutable_data_ptr());
}

VocabularyBlock block_of(const Tensor& logits, const Tensor& labels, int64_t first_label) {
  require(logits.dim() == 2, "logits must be [positions, labels], got ", shape_of(logits));
  require(logits.size(1) <= 1 || logits.stride(1) == 1, "the last dimension of logits must be contiguous");
  require(logits.scalar_type() != ScalarType::Double, "logits must be float32, bfloat16 or float16");
  require(labels.scalar_type() == ScalarType::Long && labels.is_contiguous(), "labels must be contiguous int64");
  check_vector(labels, "labels", logits.size(0));
  VocabularyBlock call{};
  call.width = logits.size(1);
  call.stride = logits.stride(0);
  call.first_label = first_label;
  call.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  call.logits = logits.mutable_data_ptr();
  return call;
}

void vocabulary_statistics(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& largest, const Tensor& sum,
    const Tensor& label_logit) {
  VocabularyBlock call = block_of(logits, labels, first_label);
  require(call.width > 0, "logits must have at least one column");
  call.largest = row_values(largest, "largest", logits);
  call.sum = row_values(sum, "sum", logits);
  call.label_logit = row_values(label_logit, "label_logit", logits);
  const Stored stored = stored_type(logits, "logits");
  torch::stable::parallel_for(0, logits.size(0), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::vocabulary_statistics(stored, call, first, last);
  });
}

void vocabulary_gradient_(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& log_normalizer,
    const Tensor& probability_scale, const Tensor& label_scale) {
  VocabularyBlock call = block_of(logits, labels, first_label);
  call.log_normalizer = row_values(log_normalizer, "log_normalizer", logits);
  call.probability_scale = row_values(probability_scale, "probability_scale", logits);
  call.label_scale = row_values(label_scale, "label_scale", logits);
  const Stored stored = stored_type(logits, "logits");
  torch::stable::parallel_for(0, logits.size(0), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::vocabulary_gradient(stored, call, first, last);
  });
}

MaskedSoftmax softmax_arguments(const Tensor& scores, double scale) {
  require(scores.dim() >= 1 && scores.is_contiguous(), "scores must be contiguous");
  MaskedSoftmax call{};
  call.width = scores.size(scores.dim() - 1);
  call.scale = scale;
  call.input = scores.const_data_ptr();
  return call;
}

int64_t rows_of(const Tensor& scores, int64_t width) { return width ? scores.numel() / width : 0; }

Tensor masked_softmax(const Tensor& scores, const OptionalTensor& mask, double scale) {
  MaskedSoftmax call = softmax_arguments(scores, scale);
  const int64_t rows = rows_of(scores, call.width);
  if (mask) {
    require(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous(), "mask must be contiguous bool");
    const int64_t mask_rows = rows_of(*mask, call.width);
    require(
        mask->dim() >= 1 && mask->size(mask->dim() - 1) == call.width && (mask_rows ? rows % mask_rows : rows) == 0,
        "mask must have the columns of scores and rows that divide its rows: got ", shape_of(*mask), " for ",
        shape_of(scores));
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    call.rows_per_mask = mask_rows ? rows / mask_rows : 1;
  }
  Tensor output = torch::stable::empty_like(scores);
  call.output = output.mutable_data_ptr();
  const Stored stored = stored_type(scores, "scores");
  torch::stable::parallel_for(0, rows, grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::masked_softmax_forward(stored, call, first, last);
  });
  return output;
}

Tensor masked_softmax_backward(const Tensor& grad_output, const Tensor& output, double scale) {
  MaskedSoftmax call = softmax_arguments(output, scale);
  check_like(grad_output, "grad_output", output, "output");
  check_same_shape(grad_output, "grad_output", output, "output");
  require(grad_output.is_contiguous(), "grad_output must be contiguous");
  Tensor grad_input = torch::stable::empty_like(output);
  call.output = const_cast<void*>(output.const_data_ptr());
  call.grad_output = grad_output.const_data_ptr();
  call.grad_input = grad_input.mutable_data_ptr();
  const Stored stored = stored_type(output, "output");
  torch::stable::parallel_for(0, rows_of(output, call.width), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::masked_softmax_backward(stored, call, first, last);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("vocabulary_statistics", TORCH_BOX(&vocabulary_statistics));
  library.impl("vocabulary_gradient_", TORCH_BOX(&vocabulary_gradient_));
  library.impl("masked_softmax", TORCH_BOX(&masked_softmax));
  library.impl("masked_softmax_backward", TORCH_BOX(&masked_softmax_backward));
}

}  // namespace megatron_retro
