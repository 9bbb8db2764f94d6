// CPU side of `chunked_cross_attention`: threads over (sequence, chunk, key/value head).
#include "cross_attention.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

std::tuple<Tensor, Tensor> chunked_cross_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, int64_t chunk_length,
    int64_t first_position, double scale, const OptionalTensor& query_cosine, const OptionalTensor& query_sine,
    const OptionalTensor& key_cosine, const OptionalTensor& key_sine, bool interleaved) {
  const Stored stored = stored_type(query, "query");
  CrossAttention call = cross_attention_arguments(query, key, value, mask, chunk_length, first_position, scale, {query_cosine, query_sine, key_cosine, key_sine}, interleaved);
  Tensor output = torch::stable::new_empty(query, query.sizes());
  Tensor log_normalizer = torch::stable::new_zeros(query, {query.size(0), call.heads, call.queries}, compute_type(query));
  call.output = output.mutable_data_ptr();
  call.log_normalizer = log_normalizer.mutable_data_ptr();
  zero_unattended(output, call);
  torch::stable::parallel_for(0, num_rows(query, call), 1, [&](int64_t first, int64_t last) {
    cpu::cross_attention_forward(stored, call, first, last);
  });
  return {output, log_normalizer};
}

std::tuple<Tensor, Tensor, Tensor> chunked_cross_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
    const Tensor& output, const Tensor& log_normalizer, int64_t chunk_length, int64_t first_position, double scale,
    const OptionalTensor& query_cosine, const OptionalTensor& query_sine, const OptionalTensor& key_cosine,
    const OptionalTensor& key_sine, bool interleaved) {
  const Stored stored = stored_type(query, "query");
  CrossAttention call = cross_attention_arguments(query, key, value, mask, chunk_length, first_position, scale, {query_cosine, query_sine, key_cosine, key_sine}, interleaved);
  Gradients gradients = gradients_of(call, grad_output, query, key, value, output, log_normalizer);
  zero_unattended(gradients.query, call);
  torch::stable::parallel_for(0, num_rows(query, call), 1, [&](int64_t first, int64_t last) {
    cpu::cross_attention_backward(stored, call, first, last);
  });
  return {gradients.query, gradients.key, gradients.value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("chunked_cross_attention", TORCH_BOX(&chunked_cross_attention));
  library.impl("chunked_cross_attention_backward", TORCH_BOX(&chunked_cross_attention_backward));
}

}  // namespace megatron_retro
