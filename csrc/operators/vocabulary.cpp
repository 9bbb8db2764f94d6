// CPU side of the vocabulary block of `linear_cross_entropy`: checks, memory, threads.
#include "vocabulary.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

void vocabulary_statistics(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& largest, const Tensor& sum,
    const Tensor& label_logit) {
  const VocabularyBlock call = statistics_of(logits, labels, first_label, largest, sum, label_logit);
  const Stored stored = stored_type(logits, "logits");
  torch::stable::parallel_for(0, logits.size(0), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::vocabulary_statistics(stored, call, first, last);
  });
}

void vocabulary_gradient_(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& log_normalizer,
    const Tensor& scale) {
  const VocabularyBlock call = gradient_of(logits, labels, first_label, log_normalizer, scale);
  const Stored stored = stored_type(logits, "logits");
  torch::stable::parallel_for(0, logits.size(0), grain_of(call.width), [&](int64_t first, int64_t last) {
    cpu::vocabulary_gradient(stored, call, first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("vocabulary_statistics", TORCH_BOX(&vocabulary_statistics));
  library.impl("vocabulary_gradient_", TORCH_BOX(&vocabulary_gradient_));
}

}  // namespace megatron_retro
