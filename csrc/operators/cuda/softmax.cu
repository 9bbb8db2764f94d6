// Softmax operators on the GPU. A vocabulary block's row belongs to a block of threads: its statistics take one pass
// (largest and sum together, the sum rescaled when the largest grows), its gradient one read and one write. A row of
// attention scores belongs to a warp.
#include "cuda/device.cuh"
#include "softmax.h"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = 512;
constexpr int warps_per_block = 4;

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
    const float normalizer = call.log_normalizer[row], scale = call.probability_scale[row];
    const int64_t label = call.labels[row] - call.first_label;
    for (int64_t column = threadIdx.x; column < call.width; column += threads) {
      const float slope = expf(widen(logits[column]) - normalizer) * scale;
      narrow(column == label ? slope - call.label_scale[row] : slope, logits[column]);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(warps_per_block * 32) masked_forward(MaskedSoftmax call, int64_t rows) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / 32; row < rows;
       row += int64_t(gridDim.x) * warps_per_block) {
    const Element* scores = static_cast<const Element*>(call.input) + row * call.width;
    Element* output = static_cast<Element*>(call.output) + row * call.width;
    const uint8_t* mask = call.mask ? call.mask + row / call.rows_per_mask * call.width : nullptr;
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t column = lane; column < call.width; column += 32)
      if (!mask || mask[column]) largest = fmaxf(largest, widen(scores[column]) * float(call.scale));
    largest = over_warp(largest, Maximum{});
    for (int64_t column = lane; column < call.width; column += 32)
      if (!mask || mask[column]) sum += weight_of(widen(scores[column]) * float(call.scale), largest);
    sum = over_warp(sum, Sum{});
    for (int64_t column = lane; column < call.width; column += 32) {
      const bool seen = sum > 0.0f && (!mask || mask[column]);
      narrow(seen ? weight_of(widen(scores[column]) * float(call.scale), largest) / sum : 0.0f, output[column]);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(warps_per_block * 32) masked_backward(MaskedSoftmax call, int64_t rows) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / 32; row < rows;
       row += int64_t(gridDim.x) * warps_per_block) {
    const Element* output = static_cast<const Element*>(call.output) + row * call.width;
    const Element* grad_output = static_cast<const Element*>(call.grad_output) + row * call.width;
    Element* grad_input = static_cast<Element*>(call.grad_input) + row * call.width;
    float along = 0.0f;
    for (int64_t column = lane; column < call.width; column += 32) along += widen(output[column]) * widen(grad_output[column]);
    along = over_warp(along, Sum{});
    for (int64_t column = lane; column < call.width; column += 32)
      narrow(widen(output[column]) * (widen(grad_output[column]) - along) * float(call.scale), grad_input[column]);
  }
}

void vocabulary_statistics(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& largest, const Tensor& sum,
    const Tensor& label_logit) {
  VocabularyBlock call = block_of(logits, labels, first_label);
  require(call.width > 0, "logits must have at least one column");
  call.largest = row_values(largest, "largest", logits);
  call.sum = row_values(sum, "sum", logits);
  call.label_logit = row_values(label_logit, "label_logit", logits);
  const OnDeviceOf guard(logits);
  const int64_t rows = logits.size(0);
  for_element(logits, "logits", [&](auto element) {
    launch(statistics<decltype(element)>, num_blocks(rows, 1), threads, 128, stream_of(logits), call, rows);
  });
}

void vocabulary_gradient_(
    const Tensor& logits, const Tensor& labels, int64_t first_label, const Tensor& log_normalizer,
    const Tensor& probability_scale, const Tensor& label_scale) {
  VocabularyBlock call = block_of(logits, labels, first_label);
  call.log_normalizer = row_values(log_normalizer, "log_normalizer", logits);
  call.probability_scale = row_values(probability_scale, "probability_scale", logits);
  call.label_scale = row_values(label_scale, "label_scale", logits);
  const OnDeviceOf guard(logits);
  const int64_t rows = logits.size(0);
  for_element(logits, "logits", [&](auto element) {
    launch(gradient<decltype(element)>, num_blocks(rows, 1), threads, 0, stream_of(logits), call, rows);
  });
}

Tensor masked_softmax(const Tensor& scores, const OptionalTensor& mask, double scale) {
  MaskedSoftmax call = softmax_arguments(scores, scale);
  set_mask(call, mask, scores);
  Tensor output = torch::stable::empty_like(scores);
  call.output = output.mutable_data_ptr();
  const OnDeviceOf guard(scores);
  const int64_t rows = softmax_rows(scores, call.width);
  for_element(scores, "scores", [&](auto element) {
    const auto kernel = masked_forward<decltype(element)>;
    launch(kernel, num_blocks(rows, warps_per_block), warps_per_block * 32, 0, stream_of(scores), call, rows);
  });
  return output;
}

Tensor masked_softmax_backward(const Tensor& grad_output, const Tensor& output, double scale) {
  MaskedSoftmax call = softmax_arguments(output, scale);
  const Tensor grad_input = softmax_gradient(call, grad_output, output);
  const OnDeviceOf guard(output);
  const int64_t rows = softmax_rows(output, call.width);
  for_element(output, "output", [&](auto element) {
    const auto kernel = masked_backward<decltype(element)>;
    launch(kernel, num_blocks(rows, warps_per_block), warps_per_block * 32, 0, stream_of(output), call, rows);
  });
  return grad_input;
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("vocabulary_statistics", TORCH_BOX(&device::vocabulary_statistics));
  library.impl("vocabulary_gradient_", TORCH_BOX(&device::vocabulary_gradient_));
  library.impl("masked_softmax", TORCH_BOX(&device::masked_softmax));
  library.impl("masked_softmax_backward", TORCH_BOX(&device::masked_softmax_backward));
}

}  // namespace megatron_retro
