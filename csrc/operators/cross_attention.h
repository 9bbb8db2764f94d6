// What the CPU and the CUDA side of `chunked_cross_attention` share: checks, strides, memory.
#pragma once

#include <array>

#include "tensors.h"

namespace megatron_retro {

using Tables = std::array<OptionalTensor, 4>;  // query cosine and sine, key cosine and sine

inline void check_inner(const Tensor& tensor, const char* what, int64_t dims, const char* shape, const Tensor& query) {
  require(tensor.dim() == dims, what, " must be ", shape, ", got ", shape_of(tensor));
  check_like(tensor, what, query, "query");
  require(tensor.size(dims - 1) <= 1 || tensor.stride(dims - 1) == 1, "the last dimension of ", what, " must be contiguous");
}

inline const float* table_of(
    const OptionalTensor& table, const char* what, const Tensor& query, int64_t rows, int64_t width, int64_t& rotated) {
  check_device(*table, what, query, "query");
  require(table->scalar_type() == ScalarType::Float && table->is_contiguous(), what, " must be contiguous float32");
  require(table->dim() == 2 && table->size(0) == rows, what, " must be [", rows, ", pairs], got ", shape_of(*table));
  require(rotated == 0 || rotated == 2 * table->size(1), "the four rotary tables must rotate the same dimensions");
  rotated = 2 * table->size(1);
  require(rotated <= width, what, " rotates ", rotated, " dimensions of a head of ", width);
  return static_cast<const float*>(table->const_data_ptr());
}

inline void set_tables(CrossAttention& call, const Tables& tables, const Tensor& query) {
  const int64_t given = bool(tables[0]) + bool(tables[1]) + bool(tables[2]) + bool(tables[3]);
  require(given == 0 || given == 4, "rotary tables come all four or not at all, got ", given);
  if (!given) return;
  call.query_cosine = table_of(tables[0], "query_cosine", query, call.queries, call.width, call.rotated);
  call.query_sine = table_of(tables[1], "query_sine", query, call.queries, call.width, call.rotated);
  call.key_cosine = table_of(tables[2], "key_cosine", query, call.keys, call.width, call.rotated);
  call.key_sine = table_of(tables[3], "key_sine", query, call.keys, call.width, call.rotated);
}

inline CrossAttention cross_attention_arguments(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, int64_t chunk_length,
    int64_t first_position, double scale, const Tables& tables, bool interleaved) {
  check_inner(query, "query", 4, "[sequences, positions, heads, head size]", query);
  check_inner(key, "key", 5, "[sequences, chunks, keys, heads, head size]", query);
  check_inner(value, "value", 5, "[sequences, chunks, keys, heads, head size]", query);
  check_same_shape(value, "value", key, "key");
  require(
      key.size(0) == query.size(0) && key.size(4) == query.size(3),
      "key must have the sequences and the head size of query: got ", shape_of(key), " for ", shape_of(query));
  require(
      key.size(3) > 0 && query.size(2) % key.size(3) == 0, "the heads of query (", query.size(2),
      ") must be a multiple of those of key (", key.size(3), ")");
  require(chunk_length >= 1, "chunk_length must be at least 1, got ", chunk_length);
  require(first_position >= 0, "first_position must be at least 0, got ", first_position);
  require(scale > 0, "scale must be positive, got ", scale);
  CrossAttention call{};
  call.queries = query.size(1);
  call.heads = query.size(2);
  call.width = query.size(3);
  call.chunks = key.size(1);
  call.keys = key.size(2);
  call.groups = key.size(3);
  call.chunk_length = chunk_length;
  call.first_position = first_position;
  call.scale = scale;
  call.interleaved = interleaved;
  for (int dim = 0; dim < 3; ++dim) call.query_strides[dim] = query.stride(dim);
  for (int dim = 0; dim < 4; ++dim) call.key_strides[dim] = key.stride(dim), call.value_strides[dim] = value.stride(dim);
  call.query = query.const_data_ptr();
  call.key = key.const_data_ptr();
  call.value = value.const_data_ptr();
  if (mask) {
    check_device(*mask, "mask", query, "query");
    require(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous(), "mask must be contiguous bool");
    require(
        mask->dim() == 3 && mask->size(0) == key.size(0) && mask->size(1) == key.size(1) && mask->size(2) == key.size(2),
        "mask must be [sequences, chunks, keys] of key: got ", shape_of(*mask), " for ", shape_of(key));
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  set_tables(call, tables, query);
  return call;
}

inline int64_t num_rows(const Tensor& query, const CrossAttention& call) {
  return query.numel() ? query.size(0) * call.chunks * call.groups : 0;
}

// Queries before the first attending chunk and after the last one see nothing.
inline void zero_unattended(const Tensor& tensor, const CrossAttention& call) {
  const int64_t start = std::min(call.queries, std::max<int64_t>(0, call.chunk_length - 1 - call.first_position));
  const int64_t stop = std::max(start, std::min(call.queries, (call.chunks + 1) * call.chunk_length - 1 - call.first_position));
  Tensor whole = tensor;
  Tensor before = torch::stable::narrow(whole, 1, 0, start);
  Tensor after = torch::stable::narrow(whole, 1, stop, call.queries - stop);
  torch::stable::zero_(before);
  torch::stable::zero_(after);
}

struct Gradients {
  Tensor query, key, value;
};

inline Gradients gradients_of(
    CrossAttention& call, const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& log_normalizer) {
  for (const auto& [tensor, what] : {std::pair<const Tensor&, const char*>{grad_output, "grad_output"}, {output, "output"}}) {
    check_like(tensor, what, query, "query");
    check_same_shape(tensor, what, query, "query");
    require(tensor.is_contiguous(), what, " must be contiguous");
  }
  check_statistic(log_normalizer, "log_normalizer", query.size(0) * call.heads * call.queries, query, "query");
  Gradients gradients{
      torch::stable::new_empty(query, query.sizes()), torch::stable::new_empty(key, key.sizes()),
      torch::stable::new_empty(value, value.sizes())};
  if (query.numel() == 0) {  // no kernel will run
    torch::stable::zero_(gradients.key);
    torch::stable::zero_(gradients.value);
  }
  call.grad_output = grad_output.const_data_ptr();
  call.output = const_cast<void*>(output.const_data_ptr());
  call.log_normalizer = const_cast<void*>(log_normalizer.const_data_ptr());
  call.grad_query = gradients.query.mutable_data_ptr();
  call.grad_key = gradients.key.mutable_data_ptr();
  call.grad_value = gradients.value.mutable_data_ptr();
  return gradients;
}

}  // namespace megatron_retro
