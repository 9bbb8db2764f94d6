// `gated_activation` on the GPU: one read of the input, one write of the output; bandwidth-bound.
#include "activation.h"
#include "cuda/device.cuh"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = 256;

// Value and slope of an activation at x.
__device__ __forceinline__ void activate(ActivationKind kind, float x, float& value, float& slope) {
  if (kind == ActivationKind::silu || kind == ActivationKind::gelu_tanh) {
    const bool tanh_form = kind == ActivationKind::gelu_tanh;
    const float inner = tanh_form ? 1.5957691216057308f * x * (1.0f + 0.044715f * x * x) : x;
    const float tail = expf(-fabsf(inner)), most = 1.0f / (1.0f + tail), least = tail * most;
    const float share = inner < 0.0f ? least : most, rest = inner < 0.0f ? most : least;
    const float growth = tanh_form ? 1.5957691216057308f * (1.0f + 3 * 0.044715f * x * x) : 1.0f;
    value = x * share;
    slope = share + x * share * rest * growth;
  } else if (kind == ActivationKind::gelu) {
    const float share = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    value = x * share;
    slope = share + x * expf(-0.5f * x * x) * 0.39894228040143268f;
  } else {
    const float positive = x > 0.0f ? x : (x == x ? 0.0f : x);
    value = positive * positive;
    slope = 2.0f * positive;
  }
}

template <typename Element>
__device__ __forceinline__ float biased(Element value, const void* bias, int64_t column) {
  return widen(value) + (bias ? widen(static_cast<const Element*>(bias)[column]) : 0.0f);
}

template <typename Element, int count>
__global__ void __launch_bounds__(threads) forward(Activation call, int64_t packs) {
  const int64_t per_row = call.width / count, step = int64_t(gridDim.x) * threads;
  for (int64_t pack = int64_t(blockIdx.x) * threads + threadIdx.x; pack < packs; pack += step) {
    const int64_t row = pack / per_row, column = pack % per_row * count;
    const Element* input = static_cast<const Element*>(call.input) + row * call.input_stride + column;
    const auto gate = load_pack<Element, count>(input);
    const auto up = call.gated ? load_pack<Element, count>(input + call.width) : gate;
    Pack<Element, count> output;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float value, slope;
      activate(call.kind, biased(gate.each[i], call.bias, column + i), value, slope);
      if (call.gated) value *= biased(up.each[i], call.bias, call.width + column + i);
      narrow(value, output.each[i]);
    }
    store_pack(static_cast<Element*>(call.output) + row * call.width + column, output);
  }
}

template <typename Element, int count>
__global__ void __launch_bounds__(threads) backward(Activation call, int64_t packs) {
  const int64_t per_row = call.width / count, step = int64_t(gridDim.x) * threads;
  for (int64_t pack = int64_t(blockIdx.x) * threads + threadIdx.x; pack < packs; pack += step) {
    const int64_t row = pack / per_row, column = pack % per_row * count;
    const int64_t at = row * call.input_stride + column;
    const Element* input = static_cast<const Element*>(call.input) + at;
    const auto gate = load_pack<Element, count>(input);
    const auto up = call.gated ? load_pack<Element, count>(input + call.width) : gate;
    const auto grad = load_pack<Element, count>(static_cast<const Element*>(call.grad_output) + row * call.width + column);
    Pack<Element, count> grad_gate, grad_up;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float value, slope, flow = widen(grad.each[i]);
      activate(call.kind, biased(gate.each[i], call.bias, column + i), value, slope);
      narrow(flow * value, grad_up.each[i]);
      if (call.gated) flow *= biased(up.each[i], call.bias, call.width + column + i);
      narrow(flow * slope, grad_gate.each[i]);
    }
    Element* target = static_cast<Element*>(call.grad_input) + at;
    store_pack(target, grad_gate);
    if (call.gated) store_pack(target + call.width, grad_up);
  }
}

template <typename Element, int count>
void run(const Activation& call, const Tensor& input, bool back) {
  const int64_t packs = activation_rows(input) * (call.width / count);
  const auto kernel = back ? backward<Element, count> : forward<Element, count>;
  launch(kernel, num_blocks(packs, threads), threads, 0, stream_of(input), call, packs);
}

void run(const Activation& call, const Tensor& input, bool back) {
  const OnDeviceOf guard(input);
  const bool lines_up = aligned(call.input) && aligned(call.output) && aligned(call.grad_output) && aligned(call.grad_input);
  for_element(input, "input", [&](auto element) {
    using Element = decltype(element);
    constexpr int wide = 16 / sizeof(Element);
    lines_up && call.width % wide == 0 ? run<Element, wide>(call, input, back) : run<Element, 1>(call, input, back);
  });
}

Tensor gated_activation(const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  Activation call = activation_arguments(input, bias, kind, gated);
  Tensor output = activation_output(input, call.width);
  call.output = output.mutable_data_ptr();
  run(call, input, false);
  return output;
}

std::tuple<Tensor, Tensor> gated_activation_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& bias, int64_t kind, bool gated) {
  Activation call = activation_arguments(input, bias, kind, gated);
  check_grad_output(grad_output, input, call);
  Tensor grad_input = torch::stable::empty_like(input);
  call.grad_output = grad_output.const_data_ptr();
  call.grad_input = grad_input.mutable_data_ptr();
  run(call, input, true);
  if (!bias) return {grad_input, torch::stable::new_zeros(input, {call.input_stride})};
  const Tensor rows = torch::stable::view(grad_input, {activation_rows(input), call.input_stride});
  return {grad_input, sum_over_rows(rows, input)};
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("gated_activation", TORCH_BOX(&device::gated_activation));
  library.impl("gated_activation_backward", TORCH_BOX(&device::gated_activation_backward));
}

}  // namespace megatron_retro
