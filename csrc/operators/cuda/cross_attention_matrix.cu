// Chunked cross-attention on tensor cores, for bfloat16 and float16: 64 query rows or 64 keys to a block, 16 to a warp.
//
// Products are of 16-bit numbers and summed in float32; scores, softmax and the statistics of a row stay in registers in
// float32, where the sums of one product are, rounded, the left operand of the next. Shared memory holds heads as they are
// stored. Heads of 64, 96 and 128 dimensions have kernels; one between takes the next, with zeros behind it.
#include "cuda/cross_attention.cuh"
#include "cuda/matrix.cuh"

namespace megatron_retro::device {
namespace {

constexpr int threads = attention_threads, tile = 64, warp_rows = tile / attention_warps;

// Sixteen bytes are between rows, so that eight rows that ldmatrix reads together begin in eight different banks of four.
template <typename Element, int most_width>
struct StoredRows {
  static constexpr int rows = tile, packed = 8, stride = most_width + 8;
  Element* data;
  int elements;

  __device__ static constexpr int width() { return most_width; }
  __device__ int given() const { return elements; }
  __device__ Element* row(int row) const { return data + row * stride; }
  __device__ Element* own_rows() const { return row(threadIdx.x / 32 * warp_rows); }
  __device__ Element* end() const { return row(rows); }
  __device__ StoredRows next() const { return {end(), elements}; }
  __device__ void copy(int row, int at, const Element* from) const { copy_16_bytes(this->row(row) + at, from); }
  __device__ static void wait() { wait_for_copies(); }
};

// 16 rows of the warp by 8 * count columns, as `sum_row` and `sum_column` have them.
template <int count> struct Sums { float each[count][4] = {}; };

// += left [16, width] right [8 * count, width]^T
template <int width, typename Element, int count>
__device__ __forceinline__ void add_inner(Sums<count>& sums, const Element* left, const Element* right) {
  constexpr int stride = StoredRows<Element, width>::stride;
#pragma unroll
  for (int at = 0; at < width; at += 16) {
    uint32_t row_part[4], column_part[2][2];
    load_left(left + at, stride, row_part);
#pragma unroll
    for (int column = 0; column < count; column += 2) {
      load_right_transpose(right + column * 8 * stride + at, stride, column_part);
      multiply_add<Element>(sums.each[column], row_part, column_part[0]);
      multiply_add<Element>(sums.each[column + 1], row_part, column_part[1]);
    }
  }
}

// += weights [16, 8 * count] right [8 * count, width], the weights rounded
template <int width, typename Element, int count>
__device__ __forceinline__ void add_weighted(Sums<width / 8>& sums, const Sums<count>& weights, const Element* right) {
  constexpr int stride = StoredRows<Element, width>::stride;
#pragma unroll
  for (int row = 0; row < count; row += 2) {
    uint32_t row_part[4], column_part[2][2];
    as_left<Element>(weights.each[row], weights.each[row + 1], row_part);
#pragma unroll
    for (int column = 0; column < width / 8; column += 2) {
      load_right(right + row * 8 * stride + column * 8, stride, column_part);
      multiply_add<Element>(sums.each[column], row_part, column_part[0]);
      multiply_add<Element>(sums.each[column + 1], row_part, column_part[1]);
    }
  }
}

// The running softmax of a thread's two rows, which four lanes share.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // Turns scores into weights relative to the largest score so far; what was summed before shrinks by `shrink`.
  template <int count>
  __device__ __forceinline__ void update(Sums<count>& scores, float (&shrink)[2]) {
    float top[2] = {largest[0], largest[1]}, added[2] = {};
#pragma unroll
    for (int i = 0; i < 4 * count; ++i) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], scores.each[i / 4][i % 4]);
#pragma unroll
    for (int half = 0; half < 2; ++half) top[half] = over_lanes<4>(top[half], Maximum{});
#pragma unroll
    for (int i = 0; i < 4 * count; ++i) {
      float& score = scores.each[i / 4][i % 4];
      score = expf(score - top[i % 4 / 2]);
      added[i % 4 / 2] += score;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shrink[half] = expf(largest[half] - top[half]);
      sum[half] = sum[half] * shrink[half] + over_lanes<4>(added[half], Sum{});
      largest[half] = top[half];
    }
  }

  // Of a row that saw nothing, zero.
  __device__ float inverse_sum(int half) const { return sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f; }
  __device__ float log_normalizer(int half) const { return sum[half] > 0.0f ? largest[half] + logf(sum[half]) : 0.0f; }
};

// Heads of one side of the scores with what the backward pass multiplies beside them, and what each row takes from the
// logarithm of a probability (infinite: it has none) and from a score's gradient.
template <typename Element, int width>
struct Side {
  StoredRows<Element, width> heads, partners;  // queries and gradients of their outputs, or keys and values
  float* normalizers;
  float* shares;

  // One behind the other in shared memory: all heads, then all numbers.
  __device__ static Side number(int index, int sides, int elements) {
    StoredRows<Element, width> heads{shared_memory<Element>() + 2 * index * tile * heads.stride, elements};
    float* numbers = reinterpret_cast<float*>(shared_memory<Element>() + 2 * sides * tile * heads.stride) + 2 * index * tile;
    return {heads, heads.next(), numbers, numbers + tile};
  }
};

template <typename Element, int width>
__device__ __forceinline__ void read_key_side(
    const CrossAttention& call, const Place& place, int64_t first, const Side<Element, width>& keys) {
  if (threadIdx.x < tile) {
    keys.normalizers[threadIdx.x] = place.sees(call, first + threadIdx.x) ? 0.0f : INFINITY;
    keys.shares[threadIdx.x] = 0.0f;
  }
  read_keys_values<Element>(call, place, first, keys.heads, keys.partners);
}

template <typename Element, int width>
__device__ __forceinline__ void read_query_side(
    const CrossAttention& call, const Place& place, int first, const Side<Element, width>& queries) {
  read_queries_gradients<Element>(
      call, place, first, queries.heads, queries.partners, queries.normalizers, queries.shares);
}

// A tile of float32 rows in the space of two stored ones: what a block computed, on its way to memory.
template <typename Element, int width>
struct Results {
  static constexpr int rows = tile, stride = width + 8;
  float* data;

  __device__ explicit Results(const StoredRows<Element, width>& space) : data(reinterpret_cast<float*>(space.data)) {}
  __device__ float* row(int row) const { return data + row * stride; }

  // The warp's rows.
  __device__ void keep(const Sums<width / 8>& sums) const {
    const int first = threadIdx.x / 32 * warp_rows;
    __syncwarp();  // the space may still be read
#pragma unroll
    for (int i = 0; i < width / 2; ++i) row(first + sum_row(i % 4))[i / 4 * 8 + sum_column(i % 4)] = sums.each[i / 4][i % 4];
    __syncwarp();
  }

  // `value_of(row, at)` to `target_of(row)`, unless that is null.
  template <typename TargetOf, typename ValueOf>
  __device__ void write(int elements, TargetOf&& target_of, ValueOf&& value_of) const {
    for_own_rows<Results>(width / 8, [&](int row, int pack) {
      Element* target = target_of(row);
      if (!target || pack * 8 >= elements) return;
      Pack<Element, 8> values;
#pragma unroll
      for (int i = 0; i < 8; ++i) narrow(value_of(row, pack * 8 + i), values.each[i]);
      store_pack(target + pack * 8, values);
    });
  }
};

template <typename Element, int width>
__global__ void __launch_bounds__(threads, 2) matrix_forward(CrossAttention call, int64_t tiles) {
  const Place place(call, blockIdx.x / tiles);
  const int first = int(blockIdx.x % tiles) * tile;
  if (first >= place.num_rows) return;
  const auto keys = Side<Element, width>::number(0, 1, int(call.width));
  const StoredRows<Element, width> queries{reinterpret_cast<Element*>(keys.shares + tile), int(call.width)};
  read_queries<Element>(call, place, first, queries);
  Sums<width / 8> result;
  Softmax softmax;
  for (int64_t first_key = 0; first_key < call.keys; first_key += tile) {
    if (!sees_any(call, place, first_key, tile)) continue;
    __syncthreads();
    read_key_side(call, place, first_key, keys);
    __syncthreads();
    Sums<tile / 8> weights;
    float shrink[2];
    add_inner<width>(weights, queries.own_rows(), keys.heads.data);
#pragma unroll
    for (int i = 0; i < tile / 2; ++i) {
      float& score = weights.each[i / 4][i % 4];
      score = score * float(call.scale) - keys.normalizers[i / 4 * 8 + sum_column(i % 4)];
    }
    softmax.update(weights, shrink);
#pragma unroll
    for (int i = 0; i < width / 2; ++i) result.each[i / 4][i % 4] *= shrink[i % 4 / 2];
    add_weighted<width>(result, weights, keys.partners.data);
  }
  __syncthreads();
  const float factor[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
#pragma unroll
  for (int i = 0; i < width / 2; ++i) result.each[i / 4][i % 4] *= factor[i % 4 / 2];
  const Results<Element, width> results(keys.heads);
  const auto is_there = [&](int row) { return first + row < place.num_rows; };
  const auto target_of = [&](int row) {
    return is_there(row) ? static_cast<Element*>(call.output) + place.output(call, first + row) : nullptr;
  };
  const auto value_of = [&](int row, int at) { return results.row(row)[at]; };
  results.keep(result);
  results.write(int(call.width), target_of, value_of);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x / 32 * warp_rows + sum_row(2 * half);
    if (threadIdx.x % 4 > 0 || !is_there(row)) continue;
    static_cast<float*>(call.log_normalizer)[place.statistic(call, first + row)] = softmax.log_normalizer(half);
  }
}

// Probabilities and gradients of scores (without the scale) of the warp's rows of one side and some rows of the other.
template <typename Element, int width, int count>
__device__ __forceinline__ void probabilities_and_slopes(
    float scale, const Side<Element, width>& mine, const Side<Element, width>& others, int first,
    Sums<count>& probabilities, Sums<count>& slopes) {
  add_inner<width>(probabilities, mine.heads.own_rows(), others.heads.row(first));
  add_inner<width>(slopes, mine.partners.own_rows(), others.partners.row(first));
#pragma unroll
  for (int i = 0; i < 4 * count; ++i) {
    const int row = threadIdx.x / 32 * warp_rows + sum_row(i % 4), other = first + i / 4 * 8 + sum_column(i % 4);
    float& probability = probabilities.each[i / 4][i % 4];
    float& slope = slopes.each[i / 4][i % 4];
    probability = expf(probability * scale - mine.normalizers[row] - others.normalizers[other]);
    slope = probability * (slope - mine.shares[row] - others.shares[other]);
  }
}

constexpr int columns = 32;  // of the other side at a time: more would not fit the registers at 128 dimensions

template <typename Element, int width>
__device__ __forceinline__ void gradients_of_queries(const CrossAttention& call, const Place& place, int first) {
  if (first >= place.num_rows) return;
  const auto queries = Side<Element, width>::number(0, 2, int(call.width));
  const auto keys = Side<Element, width>::number(1, 2, int(call.width));
  read_query_side(call, place, first, queries);
  Sums<width / 8> gradient;
  for (int64_t first_key = 0; first_key < call.keys; first_key += tile) {
    if (!sees_any(call, place, first_key, tile)) continue;
    __syncthreads();
    read_key_side(call, place, first_key, keys);
    __syncthreads();
#pragma unroll 1
    for (int key = 0; key < tile; key += columns) {
      Sums<columns / 8> probabilities, slopes;
      probabilities_and_slopes(float(call.scale), queries, keys, key, probabilities, slopes);
      add_weighted<width>(gradient, slopes, keys.heads.row(key));
    }
  }
  __syncthreads();
  const Results<Element, width> results(keys.heads);
  const auto target_of = [&](int row) {
    const bool there = first + row < place.num_rows;
    return there ? static_cast<Element*>(call.grad_query) + place.output(call, first + row) : nullptr;
  };
  const auto value_of = [&](int row, int at) {
    const int64_t table = place.query(first + row) * (call.rotated / 2);
    const float* cosine = call.query_cosine + table;
    return rotated(call, results.row(row), at, cosine, call.query_sine + table, -1.0f) * float(call.scale);
  };
  results.keep(gradient);
  results.write(int(call.width), target_of, value_of);
}

template <typename Element, int width>
__device__ __forceinline__ void gradients_of_keys(const CrossAttention& call, const Place& place, int64_t first_key) {
  const auto keys = Side<Element, width>::number(0, 2, int(call.width));
  const auto queries = Side<Element, width>::number(1, 2, int(call.width));
  const bool any = sees_any(call, place, first_key, tile);
  read_key_side(call, place, first_key, keys);
  Sums<width / 8> key_gradient, value_gradient;
  for (int first = 0; any && first < place.num_rows; first += tile) {
    __syncthreads();
    read_query_side(call, place, first, queries);
    __syncthreads();
#pragma unroll 1
    for (int query = 0; query < tile; query += columns) {
      Sums<columns / 8> probabilities, slopes;
      probabilities_and_slopes(float(call.scale), keys, queries, query, probabilities, slopes);
      add_weighted<width>(value_gradient, probabilities, queries.partners.row(query));
      add_weighted<width>(key_gradient, slopes, queries.heads.row(query));
    }
  }
  __syncthreads();
  const Results<Element, width> results(queries.heads);
  const auto place_in = [&](void* gradients) {
    return [&, gradients](int row) {
      const bool there = first_key + row < call.keys;
      return there ? static_cast<Element*>(gradients) + place.key_gradient(call, first_key + row) : nullptr;
    };
  };
  const auto value_of = [&](int row, int at) { return results.row(row)[at]; };
  const auto rotated_back = [&](int row, int at) {
    const int64_t table = (first_key + row) * (call.rotated / 2);
    const float* cosine = call.key_cosine + table;
    return rotated(call, results.row(row), at, cosine, call.key_sine + table, -1.0f) * float(call.scale);
  };
  results.keep(value_gradient);
  results.write(int(call.width), place_in(call.grad_value), value_of);
  results.keep(key_gradient);
  results.write(int(call.width), place_in(call.grad_key), rotated_back);
}

// One launch for both: blocks of one chunk run side by side, so its keys, values and queries come from memory once and
// from the second-level cache after that.
template <typename Element, int width>
__global__ void __launch_bounds__(threads, 2) matrix_backward(CrossAttention call, int64_t of_queries, int64_t of_keys) {
  const int64_t tiles = of_queries + of_keys, index = blockIdx.x % tiles;
  const Place place(call, blockIdx.x / tiles);
  if (index < of_queries)
    gradients_of_queries<Element, width>(call, place, int(index) * tile);
  else
    gradients_of_keys<Element, width>(call, place, (index - of_queries) * tile);
}

// Of `heads` tiles and `numbers` numbers for each of a tile's rows.
size_t shared_bytes(int width, int heads, int numbers) {
  return tile * (heads * (width + 8) * sizeof(BFloat16) + numbers * sizeof(float));
}

template <typename Visitor>
void for_kernel(const Tensor& query, const CrossAttention& call, Visitor&& visit) {
  const auto for_width = [&](auto element) {
    if (call.width <= 64) return visit(element, std::integral_constant<int, 64>{});
    if (call.width <= 96) return visit(element, std::integral_constant<int, 96>{});
    visit(element, std::integral_constant<int, 128>{});
  };
  query.scalar_type() == ScalarType::Half ? for_width(Half{}) : for_width(BFloat16{});
}
}  // namespace

void forward_on_matrices(const Tensor& query, const CrossAttention& call) {
  const int64_t tiles = query_tiles(call, tile);
  const unsigned grid = grid_of(num_rows(query, call), tiles);
  for_kernel(query, call, [&](auto element, auto width) {
    const auto kernel = matrix_forward<decltype(element), decltype(width)::value>;
    launch(kernel, grid, threads, shared_bytes(width, 3, 2), stream_of(query), call, tiles);
  });
}

void backward_on_matrices(const Tensor& query, const CrossAttention& call) {
  const int64_t of_queries = query_tiles(call, tile), of_keys = key_tiles(call, tile);
  const unsigned grid = grid_of(num_rows(query, call), of_queries + of_keys);
  for_kernel(query, call, [&](auto element, auto width) {
    const auto kernel = matrix_backward<decltype(element), decltype(width)::value>;
    launch(kernel, grid, threads, shared_bytes(width, 4, 4), stream_of(query), call, of_queries, of_keys);
  });
}

}  // namespace megatron_retro::device
