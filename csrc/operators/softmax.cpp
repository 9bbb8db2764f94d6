// CPU side of the vocabulary block of `linear_cross_entropy` and of `masked_softmax`: checks, memory, threads.
#include "softmax.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

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

Tensor masked_softmax(const Tensor& scores, const OptionalTensor& mask, double scale) {
  MaskedSoftmax call = softmax_arguments(scores, scale);
  const int64_t rows = softmax_rows(scores, call.width);
  set_mask(call, mask, scores);
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
  const Tensor grad_input = softmax_gradient(call, grad_output, output);
  const Stored stored = stored_type(output, "output");
  torch::stable::parallel_for(0, softmax_rows(output, call.width), grain_of(call.width), [&](int64_t first, int64_t last) {
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
