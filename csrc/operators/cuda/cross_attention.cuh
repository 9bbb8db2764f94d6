// What both CUDA forms of chunked cross-attention share: which queries, keys and values belong together and where they
// lie, what may be seen, how a tile of rows comes into shared memory and rotates by its positions, and the launches.
//
// A block serves a tile of query rows (positions and heads of one attending chunk and one key/value head) or, for the
// gradients of keys and values, a tile of keys. Keys and values belong to exactly one block, so there are no atomics and
// every run gives the same bits. The arithmetic is in cross_attention_float32.cu, on CUDA cores for every stored type, and
// in cross_attention_matrix.cu, on tensor cores for bfloat16 and float16; cross_attention.cu chooses.
#pragma once

#include "cross_attention.h"
#include "cuda/device.cuh"

namespace megatron_retro {
namespace device {

constexpr int attention_threads = 128, attention_warps = attention_threads / 32;

// One attending chunk and one key/value head, and its rows: the queries of each head that shares them.
struct Place {
  int64_t sequence, chunk, group, first_query, first_head;
  int num_queries, num_rows;  // the host sees to it that these are no larger, and rows are divided at every copy

  __device__ Place(const CrossAttention& call, int64_t index) {
    group = index % call.groups;
    chunk = index / call.groups % call.chunks;
    sequence = index / call.groups / call.chunks;
    const int64_t start = (chunk + 1) * call.chunk_length - 1 - call.first_position;
    const int64_t stop = start + call.chunk_length < call.queries ? start + call.chunk_length : call.queries;
    const int sharing = int(call.heads / call.groups);
    first_query = start > 0 ? start : 0;
    first_head = group * sharing;
    num_queries = stop > first_query ? int(stop - first_query) : 0;
    num_rows = num_queries * sharing;
  }
  __device__ int64_t head(int row) const { return first_head + row / num_queries; }
  __device__ int64_t query(int row) const { return first_query + row % num_queries; }
  __device__ bool sees(const CrossAttention& call, int64_t key) const {
    return key < call.keys && (!call.mask || call.mask[(sequence * call.chunks + chunk) * call.keys + key]);
  }

  // Where rows and keys begin in memory, in elements.
  __device__ int64_t query_head(const CrossAttention& call, int row) const {
    return sequence * call.query_strides[0] + query(row) * call.query_strides[1] + head(row) * call.query_strides[2];
  }
  __device__ int64_t output(const CrossAttention& call, int row) const {
    return ((sequence * call.queries + query(row)) * call.heads + head(row)) * call.width;
  }
  __device__ int64_t statistic(const CrossAttention& call, int row) const {
    return (sequence * call.heads + head(row)) * call.queries + query(row);
  }
  __device__ int64_t key_head(const int64_t (&strides)[4], int64_t key) const {
    return sequence * strides[0] + chunk * strides[1] + key * strides[2] + group * strides[3];
  }
  __device__ int64_t key_gradient(const CrossAttention& call, int64_t key) const {
    return (((sequence * call.chunks + chunk) * call.keys + key) * call.groups + group) * call.width;
  }
};

// Whether any of the keys first..first + count - 1 may be seen; the same for every lane of a warp.
__device__ __forceinline__ bool sees_any(const CrossAttention& call, const Place& place, int64_t first, int count) {
  bool any = false;
  for (int key = threadIdx.x % 32; key < count; key += 32) any |= place.sees(call, first + key);
  return over_warp(any ? 1.0f : 0.0f, Maximum{}) > 0.0f;
}

// Dimension `at` of a head, rotated by its position's angles (rotated back for sign = -1).
template <typename Kept>
__device__ __forceinline__ float rotated(
    const CrossAttention& call, const Kept* head, int at, const float* cosine, const float* sine, float sign) {
  const float value = widen(head[at]);
  if (at >= call.rotated) return value;
  const int half = int(call.rotated) / 2, pair = call.interleaved ? at / 2 : at % half;
  const bool first = call.interleaved ? at % 2 == 0 : at < half;
  const int distance = call.interleaved ? 1 : half;
  const float other = widen(head[first ? at + distance : at - distance]), signed_sine = sine[pair] * sign;
  return value * cosine[pair] + (first ? -other : other) * signed_sine;
}

// A tile is rows of heads in shared memory, as float32 or as stored, with one face:
//   rows, packed               how many rows, and how many elements are copied together
//   row(r), width(), given()   where row r begins, its elements, and how many of them a head in memory has
//   copy(r, at, from)          copies `packed` elements, zeros where `from` is null
//   wait()                     behind it the thread's own copies are there
// A warp copies and rotates rows of its own, so between the two no barrier of the block is needed.
template <typename Tile, typename Visitor>
__device__ __forceinline__ void for_own_rows(int steps, Visitor&& visit) {
  constexpr int own = Tile::rows / attention_warps;
  const int first = threadIdx.x / 32 * own;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < own * steps; i += 32) visit(first + i / steps, i % steps);
}

// `source_of(row)` is where a row lies in memory, or null.
template <typename Tile, typename SourceOf>
__device__ __forceinline__ void copy_rows(const Tile& tile, SourceOf&& source_of) {
  for_own_rows<Tile>(tile.width() / Tile::packed, [&](int row, int pack) {
    const int at = pack * Tile::packed;
    const auto* source = source_of(row);
    tile.copy(row, at, source && at < tile.given() ? source + at : nullptr);
  });
}

// Waits for whatever the warp copies, then rotates each row by the angles of `position_of(row)`, unless that is negative.
template <typename Tile, typename PositionOf>
__device__ __forceinline__ void rotate_rows(
    const CrossAttention& call, const Tile& tile, const float* cosine, const float* sine, PositionOf&& position_of) {
  tile.wait();
  __syncwarp();
  if (!call.rotated) return;
  const int half = int(call.rotated) / 2;
  for_own_rows<Tile>(half, [&](int row, int pair) {
    const int64_t position = position_of(row), table = position * half;
    if (position < 0) return;
    auto* head = tile.row(row);
    const int first = call.interleaved ? 2 * pair : pair, second = call.interleaved ? first + 1 : pair + half;
    const float left = rotated(call, head, first, cosine + table, sine + table, 1.0f);
    const float right = rotated(call, head, second, cosine + table, sine + table, 1.0f);
    narrow(left, head[first]);
    narrow(right, head[second]);
  });
}

template <typename Element, typename Tile>
__device__ __forceinline__ void copy_queries(const CrossAttention& call, const Place& place, int first, const Tile& tile) {
  copy_rows(tile, [&](int row) {
    const bool there = first + row < place.num_rows;
    return there ? static_cast<const Element*>(call.query) + place.query_head(call, first + row) : nullptr;
  });
}

// Rows of a contiguous tensor shaped like the output.
template <typename Element, typename Tile>
__device__ __forceinline__ void copy_like_output(
    const CrossAttention& call, const Place& place, const void* from, int first, const Tile& tile) {
  copy_rows(tile, [&](int row) {
    const bool there = first + row < place.num_rows;
    return there ? static_cast<const Element*>(from) + place.output(call, first + row) : nullptr;
  });
}

template <typename Tile>
__device__ __forceinline__ void rotate_queries(const CrossAttention& call, const Place& place, int first, const Tile& tile) {
  rotate_rows(call, tile, call.query_cosine, call.query_sine, [&](int row) {
    return first + row < place.num_rows ? place.query(first + row) : -1;
  });
}

template <typename Element, typename Tile>
__device__ __forceinline__ void read_queries(const CrossAttention& call, const Place& place, int first, const Tile& queries) {
  copy_queries<Element>(call, place, first, queries);
  rotate_queries(call, place, first, queries);
}

// Keys and values that may not be seen are zeros: not even NaN in them reaches a product.
template <typename Element, typename Tile>
__device__ __forceinline__ void read_keys_values(
    const CrossAttention& call, const Place& place, int64_t first, const Tile& keys, const Tile& values) {
  const auto source_of = [&](const void* from, const int64_t(&strides)[4], int64_t key) {
    return place.sees(call, key) ? static_cast<const Element*>(from) + place.key_head(strides, key) : nullptr;
  };
  copy_rows(keys, [&](int row) { return source_of(call.key, call.key_strides, first + row); });
  copy_rows(values, [&](int row) { return source_of(call.value, call.value_strides, first + row); });
  rotate_rows(call, keys, call.key_cosine, call.key_sine, [&](int row) {
    return place.sees(call, first + row) ? first + row : -1;
  });
}

// Of each row of a tile: its log normalizer, infinite where there is no row so that its probabilities are zero, and the
// inner product of its output with that output's gradient. Several threads share a row.
template <typename Element, typename Tile>
__device__ __forceinline__ void read_statistics(
    const CrossAttention& call, const Place& place, int first, const Tile& grads, float* normalizers, float* shares) {
  constexpr int sharers = attention_threads / Tile::rows;
  const int row = threadIdx.x / sharers, share = threadIdx.x % sharers;
  const bool there = first + row < place.num_rows;
  float along = 0.0f;
  if (there) {
    const Element* output = static_cast<const Element*>(call.output) + place.output(call, first + row);
    for (int at = share; at < call.width; at += sharers) along += widen(output[at]) * widen(grads.row(row)[at]);
  }
  along = over_lanes<sharers>(along, Sum{});
  if (share > 0) return;
  normalizers[row] = there ? static_cast<const float*>(call.log_normalizer)[place.statistic(call, first + row)] : INFINITY;
  shares[row] = along;
}

// Queries with what the backward pass needs of their outputs.
template <typename Element, typename Tile>
__device__ __forceinline__ void read_queries_gradients(
    const CrossAttention& call, const Place& place, int first, const Tile& queries, const Tile& grads, float* normalizers,
    float* shares) {
  copy_queries<Element>(call, place, first, queries);
  copy_like_output<Element>(call, place, call.grad_output, first, grads);
  rotate_queries(call, place, first, queries);
  read_statistics<Element>(call, place, first, grads, normalizers, shares);
}

// ---- host side --------------------------------------------------------------------------------

inline int64_t query_tiles(const CrossAttention& call, int rows) {
  const int64_t most = std::min(call.chunk_length, call.queries) * (call.heads / call.groups);
  require(most <= INT32_MAX / 2, "too many queries in a chunk: ", most, " with the heads that share its keys");
  return std::max<int64_t>(1, (most + rows - 1) / rows);
}

inline int64_t key_tiles(const CrossAttention& call, int rows) { return (call.keys + rows - 1) / rows; }

inline unsigned grid_of(int64_t rows, int64_t tiles) {
  require(rows * tiles <= INT32_MAX, "too many chunks for one call: ", rows, " chunks and heads in ", tiles, " tiles");
  return unsigned(rows * tiles);
}

// `call` over the (sequence, chunk, key/value head) of `query`, whose dtype and device it has.
void forward_in_float32(const Tensor& query, const CrossAttention& call);
void backward_in_float32(const Tensor& query, const CrossAttention& call);
void forward_on_matrices(const Tensor& query, const CrossAttention& call);
void backward_on_matrices(const Tensor& query, const CrossAttention& call);

}  // namespace device
}  // namespace megatron_retro
