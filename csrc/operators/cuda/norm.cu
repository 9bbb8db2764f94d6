// `residual_norm` on the GPU. A block takes a row at a time and keeps it in shared memory between the statistics and
// the output, so device memory is read once and written once. In the backward pass a block takes many rows and sums
// the weight's gradient in shared memory; each thread owns its columns, so that sum needs no atomics and is the same
// in every run.
#include "cuda/device.cuh"
#include "norm.h"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = 256;
#ifdef MEGATRON_RETRO_SHIM
constexpr int64_t row_blocks = 2;  // a few rows make several rounds
#else
constexpr int64_t row_blocks = 264;  // two per multiprocessor of an H200
#endif

__device__ __forceinline__ float weight_at(const Norm& call, int64_t column) {
  return static_cast<const float*>(call.weight)[column] + float(call.weight_offset);
}

template <typename Element, int count>
__global__ void __launch_bounds__(threads, 4) forward(Norm call, int64_t rows) {
  float* scratch = shared_memory<float>();
  float* values = scratch + 32;
  const int64_t stride = int64_t(threads) * count, first = int64_t(threadIdx.x) * count;
  const float* bias = static_cast<const float*>(call.bias);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Element* input = static_cast<const Element*>(call.input) + row * call.width;
    const Element* residual = call.residual ? static_cast<const Element*>(call.residual) + row * call.width : nullptr;
    Element* sum = call.residual ? static_cast<Element*>(call.sum) + row * call.width : nullptr;
    float total = 0.0f;
    for (int64_t column = first; column < call.width; column += stride) {
      auto pack = load_pack<Element, count>(input + column);
      if (residual) {
        const auto other = load_pack<Element, count>(residual + column);
#pragma unroll
        for (int i = 0; i < count; ++i) narrow(widen(pack.each[i]) + widen(other.each[i]), pack.each[i]);
        store_pack(sum + column, pack);
      }
#pragma unroll
      for (int i = 0; i < count; ++i) total += values[column + i] = widen(pack.each[i]);
    }
    const float mean = call.centered ? over_block(total, Sum{}, scratch) / float(call.width) : 0.0f;
    float squares = 0.0f;
    for (int64_t column = first; column < call.width; column += stride)
#pragma unroll
      for (int i = 0; i < count; ++i) squares += (values[column + i] - mean) * (values[column + i] - mean);
    const float inverse = 1.0f / sqrtf(over_block(squares, Sum{}, scratch) / float(call.width) + float(call.epsilon));
    Element* output = static_cast<Element*>(call.output) + row * call.width;
    for (int64_t column = first; column < call.width; column += stride) {
      Pack<Element, count> pack;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float normed = (values[column + i] - mean) * inverse * weight_at(call, column + i);
        narrow(bias ? normed + bias[column + i] : normed, pack.each[i]);
      }
      store_pack(output + column, pack);
    }
    if (threadIdx.x == 0) {
      static_cast<float*>(call.mean)[row] = mean;
      static_cast<float*>(call.inverse_deviation)[row] = inverse;
    }
  }
}

template <typename Element, int count>
__global__ void __launch_bounds__(threads, 4) backward(Norm call, int64_t rows) {
  float* scratch = shared_memory<float>();
  float* grad_weight = scratch + 32;
  float* grad_bias = grad_weight + call.width;
  const int64_t stride = int64_t(threads) * count, first = int64_t(threadIdx.x) * count;
  const bool wants_bias = call.partial_grad_bias != nullptr;
  for (int64_t column = first; column < call.width; column += stride)
    for (int i = 0; i < count; ++i) {
      grad_weight[column + i] = 0.0f;
      if (wants_bias) grad_bias[column + i] = 0.0f;
    }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Element* input = static_cast<const Element*>(call.input) + row * call.width;
    const Element* grad_output = static_cast<const Element*>(call.grad_output) + row * call.width;
    const Element* past = call.grad_sum ? static_cast<const Element*>(call.grad_sum) + row * call.width : nullptr;
    const float mean = static_cast<const float*>(call.mean)[row];
    const float inverse = static_cast<const float*>(call.inverse_deviation)[row];
    float along = 0.0f, total = 0.0f;
    for (int64_t column = first; column < call.width; column += stride) {
      const auto values = load_pack<Element, count>(input + column);
      const auto grads = load_pack<Element, count>(grad_output + column);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float normed = (widen(values.each[i]) - mean) * inverse, grad = widen(grads.each[i]);
        const float scaled = grad * weight_at(call, column + i);
        along += scaled * normed;
        total += scaled;
        grad_weight[column + i] += grad * normed;
        if (wants_bias) grad_bias[column + i] += grad;
      }
    }
    const float share = over_block(along, Sum{}, scratch) / float(call.width);
    const float shift = call.centered ? over_block(total, Sum{}, scratch) / float(call.width) : 0.0f;
    Element* grad_input = static_cast<Element*>(call.grad_input) + row * call.width;
    // The row is still in the second-level cache.
    for (int64_t column = first; column < call.width; column += stride) {
      const auto values = load_pack<Element, count>(input + column);
      const auto grads = load_pack<Element, count>(grad_output + column);
      const auto flows = past ? load_pack<Element, count>(past + column) : grads;
      Pack<Element, count> result;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float normed = (widen(values.each[i]) - mean) * inverse;
        float grad = (widen(grads.each[i]) * weight_at(call, column + i) - normed * share - shift) * inverse;
        if (past) grad += widen(flows.each[i]);
        narrow(grad, result.each[i]);
      }
      store_pack(grad_input + column, result);
    }
  }
  for (int64_t column = first; column < call.width; column += stride)
    for (int i = 0; i < count; ++i) {
      const int64_t at = int64_t(blockIdx.x) * call.width + column + i;
      static_cast<float*>(call.partial_grad_weight)[at] = grad_weight[column + i];
      if (wants_bias) static_cast<float*>(call.partial_grad_bias)[at] = grad_bias[column + i];
    }
}

void check_width(const Norm& call, int64_t rows_kept) {
  require(
      (call.width * rows_kept + 32) * 4 <= 227 * 1024, "a row of ", call.width,
      " elements does not fit the shared memory of a block");
}

template <typename Visitor>
void for_pack(const Norm& call, const Tensor& input, Visitor&& visit) {
  const bool lines_up = aligned(call.input) && aligned(call.residual) && aligned(call.sum) && aligned(call.output) &&
                        aligned(call.grad_output) && aligned(call.grad_sum) && aligned(call.grad_input);
  for_element(input, "input", [&](auto element) {
    constexpr int wide = 16 / sizeof(element);
    if (lines_up && call.width % wide == 0)
      visit(element, std::integral_constant<int, wide>{});
    else
      visit(element, std::integral_constant<int, 1>{});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm(
    const Tensor& input, const OptionalTensor& residual, const Tensor& weight, const OptionalTensor& bias,
    double epsilon, bool centered, double weight_offset) {
  std::vector<Tensor> kept;
  Norm call = norm_arguments(input, weight, bias, epsilon, centered, weight_offset, kept);
  check_width(call, 1);
  const NormResults results(call, input, residual);
  const OnDeviceOf guard(input);
  const int64_t rows = norm_rows(input, call.width);
  for_pack(call, input, [&](auto element, auto count) {
    const auto kernel = forward<decltype(element), decltype(count)::value>;
    launch(kernel, num_blocks(rows, 1), threads, (call.width + 32) * 4, stream_of(input), call, rows);
  });
  return results.all();
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input, const Tensor& mean,
    const Tensor& inverse_deviation, const Tensor& weight, const OptionalTensor& bias, bool centered,
    double weight_offset) {
  std::vector<Tensor> kept;
  Norm call = norm_arguments(input, weight, bias, 0.0, centered, weight_offset, kept);
  check_width(call, bias ? 2 : 1);
  const Tensor grad_input = norm_gradient(call, grad_output, grad_sum, input, mean, inverse_deviation);
  const OnDeviceOf guard(input);
  const int64_t rows = norm_rows(input, call.width);
  const unsigned blocks = num_blocks(rows, 1, row_blocks);
  // Every block of threads writes a row of each.
  const Tensor weights = torch::stable::new_zeros(input, {blocks, call.width}, ScalarType::Float);
  const Tensor biases = torch::stable::new_zeros(input, {bias ? blocks : 0, call.width}, ScalarType::Float);
  call.partial_grad_weight = weights.mutable_data_ptr();
  call.partial_grad_bias = bias ? biases.mutable_data_ptr() : nullptr;
  for_pack(call, input, [&](auto element, auto count) {
    const auto kernel = backward<decltype(element), decltype(count)::value>;
    const size_t shared = (call.width * (bias ? 2 : 1) + 32) * 4;
    launch(kernel, blocks, threads, shared, stream_of(input), call, rows);
  });
  return {grad_input, sum_over_rows(weights, weight), sum_over_rows(biases, bias ? *bias : weight)};
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("residual_norm", TORCH_BOX(&device::residual_norm));
  library.impl("residual_norm_backward", TORCH_BOX(&device::residual_norm_backward));
}

}  // namespace megatron_retro
