// Rotary positions of one head.
#pragma once

#include "cpu/vector.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {

template <typename Scalar>
inline Vector<Scalar> table_values(const float* table, int64_t count) {
  if constexpr (sizeof(Scalar) == sizeof(float)) return load(table, count);
  Vector<Scalar> values{};
  constexpr int64_t width = lanes<Scalar>;
  for (int64_t lane = 0; lane < (count < width ? count : width); ++lane) values[lane] = table[lane];
  return values;
}

// Pairs (i, i + half).
template <typename Element>
inline void rotate_halves(
    const Element* from, Element* to, const float* cosine, const float* sine, double sign, int64_t half) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  for (int64_t pair = 0; pair < half; pair += step) {
    const int64_t count = half - pair;
    const auto cos = table_values<Scalar>(cosine + pair, count);
    const auto sin = table_values<Scalar>(sine + pair, count) * Scalar(sign);
    const auto first = load(from + pair, count), second = load(from + half + pair, count);
    store(to + pair, first * cos - second * sin, count);
    store(to + half + pair, second * cos + first * sin, count);
  }
}

// Pairs (2i, 2i + 1).
template <typename Element>
inline void rotate_pairs(
    const Element* from, Element* to, const float* cosine, const float* sine, double sign, int64_t half) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  for (int64_t pair = 0; pair < half; pair += step / 2) {
    const int64_t count = std::min(step / 2, half - pair);
    auto cos = splat(Scalar(1)), sin = Vector<Scalar>{};
    for (int64_t lane = 0; lane < count; ++lane) {
      cos[2 * lane] = cos[2 * lane + 1] = cosine[pair + lane];
      sin[2 * lane + 1] = sine[pair + lane] * Scalar(sign);
      sin[2 * lane] = -sin[2 * lane + 1];
    }
    const auto value = load(from + 2 * pair, 2 * count);
    auto crossed = value;
    for (int64_t lane = 0; lane < step; ++lane) crossed[lane] = value[lane ^ 1];
    store(to + 2 * pair, value * cos + crossed * sin, 2 * count);
  }
}

template <typename Element>
inline void rotate(
    const Element* from, Element* to, const float* cosine, const float* sine, double sign, int64_t half,
    bool interleaved) {
  interleaved ? rotate_pairs(from, to, cosine, sine, sign, half) : rotate_halves(from, to, cosine, sine, sign, half);
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
