// Chunked cross-attention on the CPU.
//
// Scores are kept transposed, [keys, queries]: a vector holds one key's scores for 16 queries, so the softmax runs down
// columns without reductions across lanes, keys that may not be seen are left out before any product, and keys and
// values are read in the order in which they lie. Only the queries (a quarter of the keys) are transposed.
#include <cstdlib>
#include <limits>
#include <new>

#include "cpu/for_stored.h"
#include "cpu/multiply.h"
#include "cpu/rope.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

constexpr int64_t tile_queries = 64;

// Zeros at first. Not std::vector: its functions would be shared with other instruction sets at link time.
template <typename Value>
class Buffer {
 public:
  explicit Buffer(int64_t size) : values(static_cast<Value*>(std::calloc(size > 0 ? size : 1, sizeof(Value)))) {
    if (!values) throw std::bad_alloc();
  }
  ~Buffer() { std::free(values); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Value* data() { return values; }
  Value& operator[](int64_t index) { return values[index]; }
  const Value& operator[](int64_t index) const { return values[index]; }

 private:
  Value* values;
};

template <typename Element>
class Chunk {
 public:
  using Scalar = compute_t<Element>;
  using Wide = Vector<Scalar>;
  static constexpr int64_t step = lanes<Scalar>;

  Chunk(const CrossAttention& given, bool with_gradients)
      : call(given),
        padded((given.width + step - 1) / step * step),
        seen(given.keys),
        keys(given.keys * padded),
        values(given.keys * padded),
        scores(given.keys * tile_queries),
        queries(tile_queries * padded),
        across(padded * tile_queries),
        result(padded * tile_queries),
        grads(with_gradients ? tile_queries * padded : 0),
        grad_scores(with_gradients ? given.keys * tile_queries : 0),
        grad_keys(with_gradients ? given.keys * padded : 0),
        grad_values(with_gradients ? given.keys * padded : 0) {}

  void forward(int64_t row) {
    place(row);
    gather();
    for (int64_t first = 0; first < num_rows(); first += tile_queries) {
      begin_tile(first);
      if (!num_seen) {
        write_zeros();
        continue;
      }
      read_queries();
      score();
      normalize();
      multiply<Scalar>(call.width, lane_columns, num_seen, {values.data(), 1, padded}, scores.data(), tile_queries, result.data(), tile_queries, false);
      write_output();
    }
  }

  void backward(int64_t row) {
    place(row);
    gather();
    std::memset(grad_keys.data(), 0, num_seen * padded * sizeof(Scalar));
    std::memset(grad_values.data(), 0, num_seen * padded * sizeof(Scalar));
    for (int64_t first = 0; first < num_rows(); first += tile_queries) {
      begin_tile(first);
      if (!num_seen) {
        write_zeros();
        continue;
      }
      read_queries();
      score();
      read_grad_output();
      // Probabilities, then their gradient: [keys, queries] both.
      probabilities();
      multiply<Scalar>(num_seen, padded, tile_rows_used, {scores.data(), tile_queries, 1}, grads.data(), padded, grad_values.data(), padded, true);
      transpose(tile_rows_used, call.width, grads.data(), padded, across.data(), tile_queries);
      multiply<Scalar>(num_seen, lane_columns, call.width, {values.data(), padded, 1}, across.data(), tile_queries, grad_scores.data(), tile_queries, false);
      score_gradient();
      multiply<Scalar>(num_seen, padded, tile_rows_used, {grad_scores.data(), tile_queries, 1}, queries.data(), padded, grad_keys.data(), padded, true);
      multiply<Scalar>(call.width, lane_columns, num_seen, {keys.data(), 1, padded}, grad_scores.data(), tile_queries, result.data(), tile_queries, false);
      write_grad_query();
    }
    write_key_gradients();
  }

 private:
  const CrossAttention& call;
  int64_t padded;
  Buffer<int64_t> seen;
  Buffer<Scalar> keys, values, scores, queries, across, result;
  Buffer<Scalar> grads, grad_scores, grad_keys, grad_values;
  int64_t sequence = 0, chunk = 0, group = 0, first_query = 0, num_queries = 0, num_seen = 0;
  int64_t tile_first = 0, tile_rows_used = 0, lane_columns = 0;
  Scalar normalizers[tile_queries] = {}, shares[tile_queries] = {};

  int64_t num_rows() const { return num_queries * (call.heads / call.groups); }
  int64_t head_of(int64_t lane) const { return group * (call.heads / call.groups) + (tile_first + lane) / num_queries; }
  int64_t query_of(int64_t lane) const { return first_query + (tile_first + lane) % num_queries; }

  int64_t query_offset(int64_t lane) const {
    return sequence * call.query_strides[0] + query_of(lane) * call.query_strides[1] + head_of(lane) * call.query_strides[2];
  }
  int64_t output_offset(int64_t lane) const {
    return ((sequence * call.queries + query_of(lane)) * call.heads + head_of(lane)) * call.width;
  }
  Scalar& normalizer_of(int64_t lane) const {
    return static_cast<Scalar*>(call.log_normalizer)[(sequence * call.heads + head_of(lane)) * call.queries + query_of(lane)];
  }

  void place(int64_t row) {
    group = row % call.groups;
    chunk = row / call.groups % call.chunks;
    sequence = row / call.groups / call.chunks;
    const int64_t start = (chunk + 1) * call.chunk_length - 1 - call.first_position;
    first_query = std::max<int64_t>(0, start);
    num_queries = std::max<int64_t>(0, std::min(call.queries, start + call.chunk_length) - first_query);
  }

  void begin_tile(int64_t first) {
    tile_first = first;
    tile_rows_used = std::min(tile_queries, num_rows() - first);
    lane_columns = (tile_rows_used + step - 1) / step * step;
  }

  // The keys and values that may be seen, side by side.
  void gather() {
    num_seen = 0;
    const uint8_t* mask = call.mask ? call.mask + (sequence * call.chunks + chunk) * call.keys : nullptr;
    for (int64_t key = 0; key < call.keys; ++key)
      if (!mask || mask[key]) seen[num_seen++] = key;
    if (!num_queries) return;
    for (int64_t index = 0; index < num_seen; ++index) {
      read(call.key, call.key_strides, seen[index], keys.data() + index * padded);
      read(call.value, call.value_strides, seen[index], values.data() + index * padded);
      rotate_by(call.key_cosine, call.key_sine, seen[index], keys.data() + index * padded, 1);
    }
  }

  void read(const void* from, const int64_t* strides, int64_t key, Scalar* to) const {
    const auto* source = static_cast<const Element*>(from) + sequence * strides[0] + chunk * strides[1] + key * strides[2] + group * strides[3];
    read_head(source, to);
  }
  void read_head(const Element* source, Scalar* to) const {
    for (int64_t column = 0; column < call.width; column += step) store(to + column, load(source + column, call.width - column));
  }
  void write_head(Element* target, const Scalar* from) const {
    for (int64_t column = 0; column < call.width; column += step) store(target + column, load(from + column), call.width - column);
  }
  void rotate_by(const float* cosine, const float* sine, int64_t position, Scalar* head, double sign) const {
    if (!call.rotated) return;
    const int64_t half = call.rotated / 2, at = position * half;
    rotate(head, head, cosine + at, sine + at, sign, half, call.interleaved);
  }

  void read_queries() {
    const auto* query = static_cast<const Element*>(call.query);
    for (int64_t lane = 0; lane < tile_rows_used; ++lane) {
      Scalar* head = queries.data() + lane * padded;
      read_head(query + query_offset(lane), head);
      rotate_by(call.query_cosine, call.query_sine, query_of(lane), head, 1);
    }
    transpose(tile_rows_used, call.width, queries.data(), padded, across.data(), tile_queries);
  }

  void score() {
    multiply<Scalar>(num_seen, lane_columns, call.width, {keys.data(), padded, 1}, across.data(), tile_queries, scores.data(), tile_queries, false);
  }

  // scores -> exp(score - largest), with the sum kept for the output.
  void normalize() {
    const Scalar scale = Scalar(call.scale);
    for (int64_t lane = 0; lane < lane_columns; lane += step) {
      Wide largest = splat(-std::numeric_limits<Scalar>::infinity()), sum{};
      for (int64_t key = 0; key < num_seen; ++key) largest = larger(load(&scores[key * tile_queries + lane]), largest);
      for (int64_t key = 0; key < num_seen; ++key) {
        Scalar* at = &scores[key * tile_queries + lane];
        const Wide weight = exponential((load(at) - largest) * scale);
        store(at, weight);
        sum += weight;
      }
      store(&shares[lane], 1 / sum);
      for (int64_t each = lane; each < std::min(lane + step, tile_rows_used); ++each)
        normalizer_of(each) = largest[each - lane] * scale + std::log(sum[each - lane]);
    }
  }

  void write_output() {
    transpose(call.width, tile_rows_used, result.data(), tile_queries, queries.data(), padded);
    for (int64_t lane = 0; lane < tile_rows_used; ++lane) {
      Scalar* head = queries.data() + lane * padded;
      for (int64_t column = 0; column < padded; column += step) store(head + column, load(head + column) * shares[lane]);
      write_head(static_cast<Element*>(call.output) + output_offset(lane), head);
    }
  }

  void write_zeros() {
    void* target = call.grad_query ? call.grad_query : call.output;
    for (int64_t lane = 0; lane < tile_rows_used; ++lane) {
      std::memset(static_cast<void*>(static_cast<Element*>(target) + output_offset(lane)), 0, call.width * sizeof(Element));
      if (!call.grad_query) normalizer_of(lane) = 0;
    }
  }

  // The gradient of each query's output, and its inner product with that output.
  void read_grad_output() {
    for (int64_t lane = 0; lane < tile_rows_used; ++lane) {
      Scalar* head = grads.data() + lane * padded;
      read_head(static_cast<const Element*>(call.grad_output) + output_offset(lane), head);
      normalizers[lane] = normalizer_of(lane);
      Wide along{};
      const Element* output = static_cast<const Element*>(call.output) + output_offset(lane);
      for (int64_t column = 0; column < call.width; column += step)
        along += load(head + column) * load(output + column, call.width - column);
      shares[lane] = sum_of_lanes(along);
    }
  }

  void probabilities() {
    const Scalar scale = Scalar(call.scale);
    for (int64_t key = 0; key < num_seen; ++key)
      for (int64_t lane = 0; lane < lane_columns; lane += step) {
        Scalar* at = &scores[key * tile_queries + lane];
        store(at, exponential(load(at) * scale - load(&normalizers[lane])));
      }
  }

  void score_gradient() {
    const Scalar scale = Scalar(call.scale);
    for (int64_t key = 0; key < num_seen; ++key)
      for (int64_t lane = 0; lane < lane_columns; lane += step) {
        const int64_t at = key * tile_queries + lane;
        store(&grad_scores[at], load(&scores[at]) * (load(&grad_scores[at]) - load(&shares[lane])) * scale);
      }
  }

  void write_grad_query() {
    transpose(call.width, tile_rows_used, result.data(), tile_queries, grads.data(), padded);
    for (int64_t lane = 0; lane < tile_rows_used; ++lane) {
      Scalar* head = grads.data() + lane * padded;
      rotate_by(call.query_cosine, call.query_sine, query_of(lane), head, -1);
      write_head(static_cast<Element*>(call.grad_query) + output_offset(lane), head);
    }
  }

  void write_key_gradients() {
    int64_t index = 0;
    for (int64_t key = 0; key < call.keys; ++key) {
      const int64_t at = (((sequence * call.chunks + chunk) * call.keys + key) * call.groups + group) * call.width;
      Element* grad_key = static_cast<Element*>(call.grad_key) + at;
      Element* grad_value = static_cast<Element*>(call.grad_value) + at;
      if (num_queries && index < num_seen && seen[index] == key) {
        Scalar* rotated = grad_keys.data() + index * padded;
        rotate_by(call.key_cosine, call.key_sine, key, rotated, -1);
        write_head(grad_key, rotated);
        write_head(grad_value, grad_values.data() + index * padded);
        ++index;
      } else {
        std::memset(static_cast<void*>(grad_key), 0, call.width * sizeof(Element));
        std::memset(static_cast<void*>(grad_value), 0, call.width * sizeof(Element));
      }
    }
  }
};

}  // namespace

void cross_attention_forward(Stored stored, const CrossAttention& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    Chunk<decltype(element)> chunk(call, false);
    for (int64_t row = first; row < last; ++row) chunk.forward(row);
  });
}

void cross_attention_backward(Stored stored, const CrossAttention& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    Chunk<decltype(element)> chunk(call, true);
    for (int64_t row = first; row < last; ++row) chunk.backward(row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
