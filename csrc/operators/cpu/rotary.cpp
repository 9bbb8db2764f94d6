// Rotary positions: each head read once and written once, in place where input and output are the same memory.
#include "cpu/for_stored.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

template <typename Scalar>
inline Vector<Scalar> table_values(const float* table, int64_t count) {
  Vector<Scalar> values{};
  constexpr int64_t width = lanes<Scalar>;
  if constexpr (sizeof(Scalar) == sizeof(float)) return load(table, count);
  for (int64_t lane = 0; lane < (count < width ? count : width); ++lane) values[lane] = table[lane];
  return values;
}

// Pairs (i, i + rotated / 2).
template <typename Element>
inline void turn_halves(const Element* from, Element* to, const float* cosine, const float* sine, double sign, int64_t half) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  for (int64_t pair = 0; pair < half; pair += step) {
    const int64_t count = half - pair;
    const auto cos = table_values<Scalar>(cosine + pair, count), sin = table_values<Scalar>(sine + pair, count) * Scalar(sign);
    const auto first = load(from + pair, count), second = load(from + half + pair, count);
    store(to + pair, first * cos - second * sin, count);
    store(to + half + pair, second * cos + first * sin, count);
  }
}

// Pairs (2i, 2i + 1).
template <typename Element>
inline void turn_neighbors(const Element* from, Element* to, const float* cosine, const float* sine, double sign, int64_t half) {
  using Scalar = compute_t<Element>;
  for (int64_t pair = 0; pair < half; ++pair) {
    const Scalar cos = cosine[pair], sin = sine[pair] * Scalar(sign);
    const Scalar first = load_one(from + 2 * pair), second = load_one(from + 2 * pair + 1);
    store_one(to + 2 * pair, first * cos - second * sin);
    store_one(to + 2 * pair + 1, second * cos + first * sin);
  }
}

template <typename Element>
void turn_row(const Rotary& call, int64_t row) {
  const int64_t sequence = row / call.positions, position = row % call.positions, half = call.rotated / 2;
  const auto* input = static_cast<const Element*>(call.input) + sequence * call.input_strides[0] + position * call.input_strides[1];
  auto* output = static_cast<Element*>(call.output) + sequence * call.output_strides[0] + position * call.output_strides[1];
  const int64_t table = sequence * call.table_stride + position * half;
  const double sign = call.inverse ? -1 : 1;
  for (int64_t head = 0; head < call.heads; ++head) {
    const Element* from = input + head * call.input_strides[2];
    Element* to = output + head * call.output_strides[2];
    if (call.interleaved)
      turn_neighbors(from, to, call.cosine + table, call.sine + table, sign, half);
    else
      turn_halves(from, to, call.cosine + table, call.sine + table, sign, half);
    if (from != to && call.rotated < call.width)
      std::memcpy(to + call.rotated, from + call.rotated, (call.width - call.rotated) * sizeof(Element));
  }
}

}  // namespace

void rotary(Stored stored, const Rotary& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) turn_row<decltype(element)>(call, row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
