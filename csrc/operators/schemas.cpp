// Every operator's schema, once. Implementations register themselves for CPU and CUDA; fake and autograd are in
// megatron_retro/ops/registrations.py. One that has no CUDA side on purpose stands in `CPU_ONLY` of
// megatron_retro/ops/library.py; a test holds every other one to both.
#include <torch/csrc/stable/library.h>

// Tests load the CUDA sources a second time, built for the host, under a name of their own.
#ifndef MEGATRON_RETRO_NAMESPACE
#define MEGATRON_RETRO_NAMESPACE megatron_retro
#endif

STABLE_TORCH_LIBRARY(MEGATRON_RETRO_NAMESPACE, library) {
  library.def("gated_activation(Tensor input, Tensor? bias, int kind, bool gated) -> Tensor");
  library.def(
      "gated_activation_backward(Tensor grad_output, Tensor input, Tensor? bias, int kind, bool gated)"
      " -> (Tensor grad_input, Tensor grad_bias)");
  library.def(
      "residual_norm(Tensor input, Tensor? residual, Tensor weight, Tensor? bias, float epsilon, bool centered,"
      " float weight_offset) -> (Tensor output, Tensor sum, Tensor mean, Tensor inverse_deviation)");
  library.def(
      "residual_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor mean,"
      " Tensor inverse_deviation, Tensor weight, Tensor? bias, bool centered, float weight_offset)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  library.def("rotary(Tensor heads, Tensor cosine, Tensor sine, bool interleaved, bool inverse) -> Tensor");
  library.def("rotary_(Tensor(a!) heads, Tensor cosine, Tensor sine, bool interleaved, bool inverse) -> ()");
  library.def(
      "vocabulary_statistics(Tensor logits, Tensor labels, int first_label, Tensor(a!) largest, Tensor(b!) sum,"
      " Tensor(c!) label_logit) -> ()");
  library.def(
      "vocabulary_gradient_(Tensor(a!) logits, Tensor labels, int first_label, Tensor log_normalizer,"
      " Tensor scale) -> ()");
  library.def(
      "chunked_cross_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int chunk_length,"
      " int first_position, float scale, Tensor? query_cosine, Tensor? query_sine, Tensor? key_cosine,"
      " Tensor? key_sine, bool interleaved) -> (Tensor output, Tensor log_normalizer)");
  library.def(
      "chunked_cross_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? mask,"
      " Tensor output, Tensor log_normalizer, int chunk_length, int first_position, float scale,"
      " Tensor? query_cosine, Tensor? query_sine, Tensor? key_cosine, Tensor? key_sine, bool interleaved)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  // For the CPU only, as `CPU_ONLY` of megatron_retro/ops/library.py says.
  library.def("small_batch_gemv(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}
