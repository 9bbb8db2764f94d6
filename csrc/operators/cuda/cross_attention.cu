// Chunked cross-attention on the GPU, in float32 arithmetic for every stored type.
//
// A block serves up to 32 query rows (positions and heads of one attending chunk and one key/value head) or, for the
// gradients of keys and values, 32 keys. Four threads share a row: each computes every fourth score and owns every
// fourth dimension of the row's result, so sums over a row are two shuffles. Nothing of size queries x keys reaches
// memory; keys and values belong to exactly one block, so there are no atomics and every run gives the same bits.
#include "cross_attention.h"
#include "cuda/device.cuh"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = 128, tile = 32, sharers = 4;
constexpr int score_row = tile + 1;

// One attending chunk and one key/value head, and the queries that belong to them.
struct Place {
  int64_t sequence, chunk, group, first_query, num_queries;

  __device__ Place(const CrossAttention& call, int64_t row) {
    group = row % call.groups;
    chunk = row / call.groups % call.chunks;
    sequence = row / call.groups / call.chunks;
    const int64_t start = (chunk + 1) * call.chunk_length - 1 - call.first_position;
    const int64_t stop = start + call.chunk_length < call.queries ? start + call.chunk_length : call.queries;
    first_query = start > 0 ? start : 0;
    num_queries = stop > first_query ? stop - first_query : 0;
  }
  __device__ int64_t rows(const CrossAttention& call) const { return num_queries * (call.heads / call.groups); }
  __device__ int64_t head(const CrossAttention& call, int64_t row) const {
    return group * (call.heads / call.groups) + row / num_queries;
  }
  __device__ int64_t query(int64_t row) const { return first_query + row % num_queries; }
  __device__ int64_t output(const CrossAttention& call, int64_t row) const {
    return ((sequence * call.queries + query(row)) * call.heads + head(call, row)) * call.width;
  }
  __device__ int64_t statistic(const CrossAttention& call, int64_t row) const {
    return (sequence * call.heads + head(call, row)) * call.queries + query(row);
  }
  __device__ bool sees(const CrossAttention& call, int64_t key) const {
    return key < call.keys && (!call.mask || call.mask[(sequence * call.chunks + chunk) * call.keys + key]);
  }
};

__device__ __forceinline__ int row_stride(const CrossAttention& call) { return int(call.width) + 1; }

// Dimension `at` of a head, turned by its position's angles (turned back for sign = -1).
template <typename Element>
__device__ __forceinline__ float turned(
    const CrossAttention& call, const Element* head, int64_t at, const float* cosine, const float* sine, float sign) {
  const float value = widen(head[at]);
  if (at >= call.rotated) return value;
  const int64_t half = call.rotated / 2, pair = call.interleaved ? at / 2 : at % half;
  const bool first = call.interleaved ? at % 2 == 0 : at < half;
  const int64_t distance = call.interleaved ? 1 : half;
  const float other = widen(head[first ? at + distance : at - distance]), turn = sine[pair] * sign;
  return value * cosine[pair] + (first ? -other : other) * turn;
}

template <typename Element>
__device__ void read_queries(const CrossAttention& call, const Place& place, int64_t first, float* to) {
  for (int64_t i = threadIdx.x; i < tile * call.width; i += threads) {
    const int64_t row = i / call.width, at = i % call.width;
    float value = 0.0f;
    if (first + row < place.rows(call)) {
      const int64_t query = place.query(first + row), table = query * (call.rotated / 2);
      const Element* head = static_cast<const Element*>(call.query) + place.sequence * call.query_strides[0] +
                            query * call.query_strides[1] + place.head(call, first + row) * call.query_strides[2];
      value = turned(call, head, at, call.query_cosine + table, call.query_sine + table, 1.0f);
    }
    to[row * row_stride(call) + at] = value;
  }
}

// Rows of a contiguous tensor shaped like the output.
template <typename Element>
__device__ void read_like_output(const CrossAttention& call, const Place& place, const void* from, int64_t first, float* to) {
  for (int64_t i = threadIdx.x; i < tile * call.width; i += threads) {
    const int64_t row = i / call.width, at = i % call.width;
    const bool there = first + row < place.rows(call);
    to[row * row_stride(call) + at] =
        there ? widen(static_cast<const Element*>(from)[place.output(call, first + row) + at]) : 0.0f;
  }
}

// Keys and values that may not be seen are read as zeros: not even NaN in them reaches a product.
template <typename Element>
__device__ void read_keys_values(const CrossAttention& call, const Place& place, int64_t first, float* keys, float* values) {
  for (int64_t i = threadIdx.x; i < tile * call.width; i += threads) {
    const int64_t row = i / call.width, at = i % call.width, key = first + row;
    float key_value = 0.0f, value = 0.0f;
    if (place.sees(call, key)) {
      const Element* head = static_cast<const Element*>(call.key) + place.sequence * call.key_strides[0] +
                            place.chunk * call.key_strides[1] + key * call.key_strides[2] + place.group * call.key_strides[3];
      const int64_t table = key * (call.rotated / 2);
      key_value = turned(call, head, at, call.key_cosine + table, call.key_sine + table, 1.0f);
      value = widen(static_cast<const Element*>(call.value)[place.sequence * call.value_strides[0] + place.chunk * call.value_strides[1] + key * call.value_strides[2] + place.group * call.value_strides[3] + at]);
    }
    keys[row * row_stride(call) + at] = key_value;
    values[row * row_stride(call) + at] = value;
  }
}

__device__ __forceinline__ float dot(const float* left, const float* right, int64_t width) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t at = 0; at < width; ++at) sum += left[at] * right[at];
  return sum;
}

// Over the four threads of a row.
template <typename Operation>
__device__ __forceinline__ float over_sharers(float value, Operation operation) {
  value = operation(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return operation(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ bool sees_any(const CrossAttention& call, const Place& place, int64_t first) {
  bool any = false;
#pragma unroll 1
  for (int key = 0; key < tile; ++key) any |= place.sees(call, first + key);
  return any;
}

template <typename Element, int most_width>
__global__ void __launch_bounds__(threads, 1) forward(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int64_t first = int64_t(blockIdx.x % tiles) * tile;
  if (first >= place.rows(call)) return;
  const int stride = row_stride(call), row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  float* queries = shared_memory<float>();
  float* keys = queries + tile * stride;
  float* values = keys + tile * stride;
  float* weights = values + tile * stride;
  read_queries<Element>(call, place, first, queries);
  float result[most_width / sharers] = {};
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t first_key = 0; first_key < call.keys; first_key += tile) {
    if (!sees_any(call, place, first_key)) continue;
    __syncthreads();
    read_keys_values<Element>(call, place, first_key, keys, values);
    __syncthreads();
    float top = largest;
    for (int key = share; key < tile; key += sharers) {
      const bool seen = place.sees(call, first_key + key);
      const float score = seen ? dot(queries + row * stride, keys + key * stride, call.width) * float(call.scale) : -INFINITY;
      weights[row * score_row + key] = score;
      top = fmaxf(top, score);
    }
    top = over_sharers(top, Maximum{});
    float added = 0.0f;
    for (int key = share; key < tile; key += sharers) {
      const float weight = expf(weights[row * score_row + key] - top);
      weights[row * score_row + key] = weight;
      added += weight;
    }
    const float shrink = expf(largest - top);
    sum = sum * shrink + over_sharers(added, Sum{});
    largest = top;
    __syncwarp();  // a shuffle orders no memory, but on the shim it does
#pragma unroll
    for (int slot = 0; slot < most_width / sharers; ++slot) {
      const int at = slot * sharers + share;
      if (at >= call.width) continue;
      float total = result[slot] * shrink;
#pragma unroll 4
      for (int key = 0; key < tile; ++key) total += weights[row * score_row + key] * values[key * stride + at];
      result[slot] = total;
    }
  }
  if (first + row >= place.rows(call)) return;
  Element* output = static_cast<Element*>(call.output) + place.output(call, first + row);
#pragma unroll
  for (int slot = 0; slot < most_width / sharers; ++slot) {
    const int at = slot * sharers + share;
    if (at < call.width) narrow(sum > 0.0f ? result[slot] / sum : 0.0f, output[at]);
  }
  if (share == 0)
    static_cast<float*>(call.log_normalizer)[place.statistic(call, first + row)] = sum > 0.0f ? largest + logf(sum) : 0.0f;
}

// Of one row: its log normalizer, and the inner product of its output with that output's gradient.
template <typename Element>
__device__ void read_statistics(
    const CrossAttention& call, const Place& place, int64_t first, const float* grads, float* normalizers, float* shares) {
  const int row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  const bool there = first + row < place.rows(call);
  float along = 0.0f;
  if (there) {
    const Element* output = static_cast<const Element*>(call.output) + place.output(call, first + row);
    for (int64_t at = share; at < call.width; at += sharers) along += widen(output[at]) * grads[row * row_stride(call) + at];
  }
  along = over_sharers(along, Sum{});
  if (share == 0) {
    normalizers[row] = there ? static_cast<const float*>(call.log_normalizer)[place.statistic(call, first + row)] : 0.0f;
    shares[row] = along;
  }
}

// Probability and score gradient of (query row, key), both in shared memory.
__device__ __forceinline__ void probability_and_slope(
    const CrossAttention& call, const Place& place, int64_t key, bool there, const float* query, const float* grad,
    const float* key_head, const float* value_head, float normalizer, float share, float& probability, float& slope) {
  const bool seen = there && place.sees(call, key);
  probability = seen ? expf(dot(query, key_head, call.width) * float(call.scale) - normalizer) : 0.0f;
  slope = seen ? probability * (dot(grad, value_head, call.width) - share) * float(call.scale) : 0.0f;
}

template <typename Element, int most_width>
__global__ void __launch_bounds__(threads, 1) backward_queries(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int64_t first = int64_t(blockIdx.x % tiles) * tile;
  if (first >= place.rows(call)) return;
  const int stride = row_stride(call), row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  float* queries = shared_memory<float>();
  float* grads = queries + tile * stride;
  float* keys = grads + tile * stride;
  float* values = keys + tile * stride;
  float* slopes = values + tile * stride;
  float* normalizers = slopes + tile * score_row;
  float* shares = normalizers + tile;
  read_queries<Element>(call, place, first, queries);
  read_like_output<Element>(call, place, call.grad_output, first, grads);
  __syncthreads();
  read_statistics<Element>(call, place, first, grads, normalizers, shares);
  float result[most_width / sharers] = {};
  for (int64_t first_key = 0; first_key < call.keys; first_key += tile) {
    if (!sees_any(call, place, first_key)) continue;
    __syncthreads();
    read_keys_values<Element>(call, place, first_key, keys, values);
    __syncthreads();
    for (int key = share; key < tile; key += sharers) {
      float probability, slope;
      probability_and_slope(
          call, place, first_key + key, true, queries + row * stride, grads + row * stride, keys + key * stride,
          values + key * stride, normalizers[row], shares[row], probability, slope);
      slopes[row * score_row + key] = slope;
    }
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < most_width / sharers; ++slot) {
      const int at = slot * sharers + share;
      if (at >= call.width) continue;
#pragma unroll 4
      for (int key = 0; key < tile; ++key) result[slot] += slopes[row * score_row + key] * keys[key * stride + at];
    }
  }
#pragma unroll
  for (int slot = 0; slot < most_width / sharers; ++slot) {
    const int at = slot * sharers + share;
    if (at < call.width) queries[row * stride + at] = result[slot];
  }
  __syncwarp();
  if (first + row >= place.rows(call)) return;
  const int64_t table = place.query(first + row) * (call.rotated / 2);
  Element* target = static_cast<Element*>(call.grad_query) + place.output(call, first + row);
  for (int64_t at = share; at < call.width; at += sharers)
    narrow(turned(call, queries + row * stride, at, call.query_cosine + table, call.query_sine + table, -1.0f), target[at]);
}

template <typename Element, int most_width>
__global__ void __launch_bounds__(threads, 1) backward_keys(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int64_t first_key = int64_t(blockIdx.x % tiles) * tile;
  const int stride = row_stride(call), row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  float* keys = shared_memory<float>();
  float* values = keys + tile * stride;
  float* queries = values + tile * stride;
  float* grads = queries + tile * stride;
  float* probabilities = grads + tile * stride;
  float* slopes = probabilities + tile * score_row;
  float* normalizers = slopes + tile * score_row;
  float* shares = normalizers + tile;
  read_keys_values<Element>(call, place, first_key, keys, values);
  float grad_key[most_width / sharers] = {}, grad_value[most_width / sharers] = {};
  const bool any = sees_any(call, place, first_key);
  for (int64_t first = 0; any && first < place.rows(call); first += tile) {
    __syncthreads();
    read_queries<Element>(call, place, first, queries);
    read_like_output<Element>(call, place, call.grad_output, first, grads);
    __syncthreads();
    read_statistics<Element>(call, place, first, grads, normalizers, shares);
    __syncthreads();
    // Here a row of threads is a key.
    for (int query = share; query < tile; query += sharers) {
      float probability, slope;
      probability_and_slope(
          call, place, first_key + row, first + query < place.rows(call), queries + query * stride, grads + query * stride,
          keys + row * stride, values + row * stride, normalizers[query], shares[query], probability, slope);
      probabilities[row * score_row + query] = probability;
      slopes[row * score_row + query] = slope;
    }
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < most_width / sharers; ++slot) {
      const int at = slot * sharers + share;
      if (at >= call.width) continue;
#pragma unroll 4
      for (int query = 0; query < tile; ++query) {
        grad_key[slot] += slopes[row * score_row + query] * queries[query * stride + at];
        grad_value[slot] += probabilities[row * score_row + query] * grads[query * stride + at];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int slot = 0; slot < most_width / sharers; ++slot) {
    const int at = slot * sharers + share;
    if (at < call.width) keys[row * stride + at] = grad_key[slot];
  }
  __syncwarp();
  const int64_t key = first_key + row;
  if (key >= call.keys) return;
  const int64_t table = key * (call.rotated / 2);
  const int64_t target = (((place.sequence * call.chunks + place.chunk) * call.keys + key) * call.groups + place.group) * call.width;
#pragma unroll
  for (int slot = 0; slot < most_width / sharers; ++slot) {
    const int at = slot * sharers + share;
    if (at >= call.width) continue;
    narrow(turned(call, keys + row * stride, at, call.key_cosine + table, call.key_sine + table, -1.0f),
           static_cast<Element*>(call.grad_key)[target + at]);
    narrow(grad_value[slot], static_cast<Element*>(call.grad_value)[target + at]);
  }
}

size_t shared_bytes(const CrossAttention& call, int rows_kept, int scores_kept) {
  return (rows_kept * tile * (call.width + 1) + scores_kept * tile * score_row + 2 * tile) * sizeof(float);
}

template <typename Visitor>
void for_width(const CrossAttention& call, Visitor&& visit) {
  require(call.width <= 256, "a head has at most 256 dimensions on a GPU, got ", call.width);
  if (call.width <= 64) return visit(std::integral_constant<int, 64>{});
  if (call.width <= 128) return visit(std::integral_constant<int, 128>{});
  visit(std::integral_constant<int, 256>{});
}

int64_t query_tiles(const CrossAttention& call) {
  const int64_t rows = std::min(call.chunk_length, call.queries) * (call.heads / call.groups);
  return std::max<int64_t>(1, (rows + tile - 1) / tile);
}

unsigned grid_of(int64_t rows, int64_t tiles) {
  require(rows * tiles <= INT32_MAX, "too many chunks for one call: ", rows, " chunks and heads in ", tiles, " tiles");
  return unsigned(rows * tiles);
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
  const int64_t tiles = query_tiles(call);
  for_element(query, "query", [&](auto element) {
    for_width(call, [&](auto width) {
      const auto kernel = forward<decltype(element), decltype(width)::value>;
      const unsigned grid = grid_of(num_rows(query, call), tiles);
      launch(kernel, grid, threads, shared_bytes(call, 3, 1), stream_of(query), call, tiles);
    });
  });
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
  const int64_t rows = num_rows(query, call), tiles = query_tiles(call), key_tiles = (call.keys + tile - 1) / tile;
  for_element(query, "query", [&](auto element) {
    using Element = decltype(element);
    for_width(call, [&](auto width) {
      constexpr int most = decltype(width)::value;
      const cudaStream_t stream = stream_of(query);
      launch(backward_queries<Element, most>, grid_of(rows, tiles), threads, shared_bytes(call, 4, 1), stream, call, tiles);
      launch(backward_keys<Element, most>, grid_of(rows, key_tiles), threads, shared_bytes(call, 4, 2), stream, call, key_tiles);
    });
  });
  return {gradients.query, gradients.key, gradients.value};
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("chunked_cross_attention", TORCH_BOX(&device::chunked_cross_attention));
  library.impl("chunked_cross_attention_backward", TORCH_BOX(&device::chunked_cross_attention_backward));
}

}  // namespace megatron_retro
