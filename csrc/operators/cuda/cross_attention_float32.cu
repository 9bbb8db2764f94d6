// Chunked cross-attention in float32 arithmetic on CUDA cores, for every stored type: 32 query rows or 32 keys to a block.
//
// Four threads share a row: each computes every fourth score and owns every fourth dimension of the row's result, so sums
// over a row are two shuffles. Nothing of size queries x keys reaches memory.
#include "cuda/cross_attention.cuh"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = attention_threads, tile = 32, sharers = threads / tile;
constexpr int score_row = tile + 1;

// Rows are one float apart from a multiple of the banks, where the width is one.
struct FloatRows {
  static constexpr int rows = tile, packed = 1;
  float* data;
  int elements;

  __device__ int width() const { return elements; }
  __device__ int given() const { return elements; }
  __device__ float* row(int row) const { return data + row * (elements + 1); }
  __device__ float* end() const { return row(rows); }
  __device__ FloatRows next() const { return {end(), elements}; }
  template <typename Element>
  __device__ void copy(int row, int at, const Element* from) const {
    this->row(row)[at] = from ? widen(*from) : 0.0f;
  }
  __device__ void wait() const {}
};

__device__ __forceinline__ float dot(const float* left, const float* right, int64_t width) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t at = 0; at < width; ++at) sum += left[at] * right[at];
  return sum;
}

template <typename Element, int most_width>
__global__ void __launch_bounds__(threads, 1) forward(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int first = int(blockIdx.x % tiles) * tile;
  if (first >= place.num_rows) return;
  const int row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  const FloatRows queries{shared_memory<float>(), int(call.width)}, keys = queries.next(), values = keys.next();
  float* weights = values.end() + row * score_row;
  read_queries<Element>(call, place, first, queries);
  float result[most_width / sharers] = {};
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t first_key = 0; first_key < call.keys; first_key += tile) {
    if (!sees_any(call, place, first_key, tile)) continue;
    __syncthreads();
    read_keys_values<Element>(call, place, first_key, keys, values);
    __syncthreads();
    float top = largest;
    for (int key = share; key < tile; key += sharers) {
      const bool seen = place.sees(call, first_key + key);
      const float score = seen ? dot(queries.row(row), keys.row(key), call.width) * float(call.scale) : -INFINITY;
      weights[key] = score;
      top = fmaxf(top, score);
    }
    top = over_lanes<sharers>(top, Maximum{});
    float added = 0.0f;
    for (int key = share; key < tile; key += sharers) {
      const float weight = expf(weights[key] - top);
      weights[key] = weight;
      added += weight;
    }
    const float shrink = expf(largest - top);
    sum = sum * shrink + over_lanes<sharers>(added, Sum{});
    largest = top;
    __syncwarp();  // a shuffle orders no memory, but on the shim it does
#pragma unroll
    for (int slot = 0; slot < most_width / sharers; ++slot) {
      const int at = slot * sharers + share;
      if (at >= call.width) continue;
      float total = result[slot] * shrink;
#pragma unroll 4
      for (int key = 0; key < tile; ++key) total += weights[key] * values.row(key)[at];
      result[slot] = total;
    }
  }
  if (first + row >= place.num_rows) return;
  Element* output = static_cast<Element*>(call.output) + place.output(call, first + row);
#pragma unroll
  for (int slot = 0; slot < most_width / sharers; ++slot) {
    const int at = slot * sharers + share;
    if (at < call.width) narrow(sum > 0.0f ? result[slot] / sum : 0.0f, output[at]);
  }
  if (share == 0)
    static_cast<float*>(call.log_normalizer)[place.statistic(call, first + row)] = sum > 0.0f ? largest + logf(sum) : 0.0f;
}

// Probability and score gradient of (query row, key), all four heads in shared memory.
__device__ __forceinline__ void probability_and_slope(
    const CrossAttention& call, bool seen, const float* query, const float* grad, const float* key, const float* value,
    float normalizer, float share, float& probability, float& slope) {
  probability = seen ? expf(dot(query, key, call.width) * float(call.scale) - normalizer) : 0.0f;
  slope = seen ? probability * (dot(grad, value, call.width) - share) * float(call.scale) : 0.0f;
}

// The thread's part of a row's gradient to memory, rotated back: the tile's row lends its space.
template <typename Element, int slots>
__device__ __forceinline__ void write_rotated_back(
    const CrossAttention& call, const float (&result)[slots], float* space, bool there, const float* cosine, const float* sine,
    Element* target) {
  const int share = threadIdx.x % sharers;
  __syncwarp();  // where no other row was read, the warp may still be rotating this one
#pragma unroll
  for (int slot = 0; slot < slots; ++slot)
    if (slot * sharers + share < call.width) space[slot * sharers + share] = result[slot];
  __syncwarp();
  for (int at = share; there && at < call.width; at += sharers) narrow(rotated(call, space, at, cosine, sine, -1.0f), target[at]);
}

template <typename Element, int most_width>
__global__ void __launch_bounds__(threads, 1) backward_queries(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int first = int(blockIdx.x % tiles) * tile;
  if (first >= place.num_rows) return;
  const int row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  const FloatRows queries{shared_memory<float>(), int(call.width)}, grads = queries.next(), keys = grads.next(), values = keys.next();
  float* slopes = values.end() + row * score_row;
  float* normalizers = values.end() + tile * score_row;
  float* shares = normalizers + tile;
  read_queries_gradients<Element>(call, place, first, queries, grads, normalizers, shares);
  float result[most_width / sharers] = {};
  for (int64_t first_key = 0; first_key < call.keys; first_key += tile) {
    if (!sees_any(call, place, first_key, tile)) continue;
    __syncthreads();
    read_keys_values<Element>(call, place, first_key, keys, values);
    __syncthreads();
    for (int key = share; key < tile; key += sharers) {
      float probability, slope;
      probability_and_slope(
          call, place.sees(call, first_key + key), queries.row(row), grads.row(row), keys.row(key), values.row(key),
          normalizers[row], shares[row], probability, slope);
      slopes[key] = slope;
    }
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < most_width / sharers; ++slot) {
      const int at = slot * sharers + share;
      if (at >= call.width) continue;
#pragma unroll 4
      for (int key = 0; key < tile; ++key) result[slot] += slopes[key] * keys.row(key)[at];
    }
  }
  const bool there = first + row < place.num_rows;
  const int64_t table = there ? place.query(first + row) * (call.rotated / 2) : 0;
  Element* target = static_cast<Element*>(call.grad_query) + (there ? place.output(call, first + row) : 0);
  write_rotated_back(call, result, queries.row(row), there, call.query_cosine + table, call.query_sine + table, target);
}

template <typename Element, int most_width>
__global__ void __launch_bounds__(threads, 1) backward_keys(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int64_t first_key = blockIdx.x % tiles * tile;
  const int row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  const FloatRows keys{shared_memory<float>(), int(call.width)}, values = keys.next(), queries = values.next(), grads = queries.next();
  float* probabilities = grads.end() + row * score_row;
  float* slopes = probabilities + tile * score_row;
  float* normalizers = grads.end() + 2 * tile * score_row;
  float* shares = normalizers + tile;
  const bool any = sees_any(call, place, first_key, tile);
  read_keys_values<Element>(call, place, first_key, keys, values);
  float grad_key[most_width / sharers] = {}, grad_value[most_width / sharers] = {};
  for (int first = 0; any && first < place.num_rows; first += tile) {
    __syncthreads();
    read_queries_gradients<Element>(call, place, first, queries, grads, normalizers, shares);
    __syncthreads();
    // Here a row of threads is a key.
    for (int query = share; query < tile; query += sharers)
      probability_and_slope(
          call, place.sees(call, first_key + row), queries.row(query), grads.row(query), keys.row(row), values.row(row),
          normalizers[query], shares[query], probabilities[query], slopes[query]);
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < most_width / sharers; ++slot) {
      const int at = slot * sharers + share;
      if (at >= call.width) continue;
#pragma unroll 4
      for (int query = 0; query < tile; ++query) {
        grad_key[slot] += slopes[query] * queries.row(query)[at];
        grad_value[slot] += probabilities[query] * grads.row(query)[at];
      }
    }
  }
  const int64_t key = first_key + row;
  const bool there = key < call.keys;
  const int64_t table = there ? key * (call.rotated / 2) : 0, target = there ? place.key_gradient(call, key) : 0;
  write_rotated_back(
      call, grad_key, keys.row(row), there, call.key_cosine + table, call.key_sine + table,
      static_cast<Element*>(call.grad_key) + target);
  Element* grad_values = static_cast<Element*>(call.grad_value) + target;
#pragma unroll
  for (int slot = 0; slot < most_width / sharers; ++slot) {
    const int at = slot * sharers + share;
    if (there && at < call.width) narrow(grad_value[slot], grad_values[at]);
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

}  // namespace

void forward_in_float32(const Tensor& query, const CrossAttention& call) {
  const int64_t tiles = query_tiles(call, tile);
  for_element(query, "query", [&](auto element) {
    for_width(call, [&](auto width) {
      const auto kernel = forward<decltype(element), decltype(width)::value>;
      launch(kernel, grid_of(num_rows(query, call), tiles), threads, shared_bytes(call, 3, 1), stream_of(query), call, tiles);
    });
  });
}

void backward_in_float32(const Tensor& query, const CrossAttention& call) {
  const int64_t rows = num_rows(query, call), of_queries = query_tiles(call, tile), of_keys = key_tiles(call, tile);
  for_element(query, "query", [&](auto element) {
    using Element = decltype(element);
    for_width(call, [&](auto width) {
      constexpr int most = decltype(width)::value;
      const cudaStream_t stream = stream_of(query);
      launch(backward_queries<Element, most>, grid_of(rows, of_queries), threads, shared_bytes(call, 4, 1), stream, call, of_queries);
      launch(backward_keys<Element, most>, grid_of(rows, of_keys), threads, shared_bytes(call, 4, 2), stream, call, of_keys);
    });
  });
}

}  // namespace device
}  // namespace megatron_retro
