// The vocabulary's softmax on the GPU. A vocabulary block's row belongs to a block of threads: its statistics take one
// pass (largest and sum together, the sum rescaled when the largest grows), its gradient one read and one write.
#include "cuda/device.cuh"
#include "vocabulary.h"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = 512;

// e^(value - largest) where both may be minus infinity.
__device__ __forceinline__ float weight_of(float value, float largest) {
  return value == -INFINITY ? 0.0f : expf(value - largest);
}

template <typename Element>
__global__ void __launch_bounds__(threads) statistics(VocabularyBlock call, int64_t rows) {
  float* scratch = shared_memory<float>();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Element* logits = static_cast<const Element*>(call.logits) + row * call.stride;
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t column = threadIdx.x; column < call.width; column += threads) {
      const float value = widen(logits[column]);
      if (value > largest) {
        sum = sum * weight_of(largest, value) + 1.0f;
        largest = value;
      } else {
        sum += weight_of(value, largest);
      }
    }
    const float top = over_block(largest, Maximum{}, scratch);
    const float total = over_block(sum * weight_of(largest, top), Sum{}, scratch);
    if (threadIdx.x == 0) {
      call.largest[row] = top;
      call.sum[row] = total;
      const int64_t label = call.labels[row] - call.first_label;
      if (label >= 0 && label < call.width) call.label_logit[row] = widen(logits[label]);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(threads) gradient(VocabularyBlock call, int64_t rows) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    Element* logits = static_cast<Element*>(call.logits) + row * call.stride;
    const float normalizer = call.log_normalizer[row], scale = call.scale[row];
    const int64_t label = call.labels[row] - call.first_label;
    for (int64_t column = threadIdx.x; column < call.width; column += threads) {
      const float slope = expf(widen(logits[column]) - normalizer) * scale;
      narrow(column == label ? slope - scale : slope, logits[column]);
    }
  }
}

void vocabulary_statistics(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& largest, const Tensor& sum,
    const Tensor& label_logit) {
  const VocabularyBlock call = statistics_of(logits, labels, first_label, largest, sum, label_logit);
  const OnDeviceOf guard(logits);
  const int64_t rows = logits.size(0);
  for_element(logits, "logits", [&](auto element) {
    launch(statistics<decltype(element)>, num_blocks(rows, 1), threads, 128, stream_of(logits), call, rows);
  });
}

void vocabulary_gradient_(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& log_normalizer,
    const Tensor& scale) {
  const VocabularyBlock call = gradient_of(logits, labels, first_label, log_normalizer, scale);
  const OnDeviceOf guard(logits);
  const int64_t rows = logits.size(0);
  for_element(logits, "logits", [&](auto element) {
    launch(gradient<decltype(element)>, num_blocks(rows, 1), threads, 0, stream_of(logits), call, rows);
  });
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("vocabulary_statistics", TORCH_BOX(&device::vocabulary_statistics));
  library.impl("vocabulary_gradient_", TORCH_BOX(&device::vocabulary_gradient_));
}

}  // namespace megatron_retro
