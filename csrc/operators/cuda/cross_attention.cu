// Chunked cross-attention on the GPU: checks, memory, and which of the two forms computes.
#include "cuda/cross_attention.cuh"

namespace megatron_retro {
namespace device {
namespace {

bool has_matrix_instruction(const Tensor& tensor) {
#ifdef MEGATRON_RETRO_SHIM
  return true;
#else
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()));
  return major >= 8;
#endif
}

// Heads of 16-bit numbers that can be copied 16 bytes at a time: bfloat16 or float16, up to 128 dimensions in eights,
// and every head begins at a multiple of 16 bytes. Anything else, float32 above all, is computed in float32.
bool uses_matrices(const Tensor& query, const CrossAttention& call) {
  if (stored_type(query, "query") == Stored::float32 || call.width > 128 || call.width % 8) return false;
  for (const int64_t stride : call.query_strides)
    if (stride % 8) return false;
  for (const auto& strides : {call.key_strides, call.value_strides})
    for (int dim = 0; dim < 4; ++dim)
      if (strides[dim] % 8) return false;
  for (const void* data : {call.query, call.key, call.value, call.grad_output, static_cast<const void*>(call.output)})
    if (!aligned(data)) return false;
  return has_matrix_instruction(query);
}

std::tuple<Tensor, Tensor> chunked_cross_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, int64_t chunk_length,
    int64_t first_position, double scale, const OptionalTensor& query_cosine, const OptionalTensor& query_sine,
    const OptionalTensor& key_cosine, const OptionalTensor& key_sine, bool interleaved) {
  CrossAttention call = cross_attention_arguments(
      query, key, value, mask, chunk_length, first_position, scale, {query_cosine, query_sine, key_cosine, key_sine},
      interleaved);
  const OnDeviceOf guard(query);
  Tensor output = torch::stable::new_empty(query, query.sizes());
  Tensor log_normalizer = torch::stable::new_zeros(query, {query.size(0), call.heads, call.queries}, ScalarType::Float);
  call.output = output.mutable_data_ptr();
  call.log_normalizer = log_normalizer.mutable_data_ptr();
  zero_unattended(output, call);
  uses_matrices(query, call) ? forward_on_matrices(query, call) : forward_in_float32(query, call);
  return {output, log_normalizer};
}

std::tuple<Tensor, Tensor, Tensor> chunked_cross_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
    const Tensor& output, const Tensor& log_normalizer, int64_t chunk_length, int64_t first_position, double scale,
    const OptionalTensor& query_cosine, const OptionalTensor& query_sine, const OptionalTensor& key_cosine,
    const OptionalTensor& key_sine, bool interleaved) {
  CrossAttention call = cross_attention_arguments(
      query, key, value, mask, chunk_length, first_position, scale, {query_cosine, query_sine, key_cosine, key_sine},
      interleaved);
  const OnDeviceOf guard(query);
  Gradients gradients = gradients_of(call, grad_output, query, key, value, output, log_normalizer);
  zero_unattended(gradients.query, call);
  uses_matrices(query, call) ? backward_on_matrices(query, call) : backward_in_float32(query, call);
  return {gradients.query, gradients.key, gradients.value};
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("chunked_cross_attention", TORCH_BOX(&device::chunked_cross_attention));
  library.impl("chunked_cross_attention_backward", TORCH_BOX(&device::chunked_cross_attention_backward));
}

}  // namespace megatron_retro
