// Softmax over the vocabulary: statistics and gradient of the logits of one block of it.
#include <algorithm>
#include <limits>

#include "cpu/for_stored.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

template <typename Scalar>
constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();

template <typename Element>
inline auto largest_of(const Element* values, int64_t width) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  auto largest = splat(lowest<Scalar>);
  int64_t column = 0;
  for (; column + step <= width; column += step) largest = larger(load(values + column), largest);
  Scalar value = largest_lane(largest);
  for (; column < width; ++column) value = std::max<Scalar>(value, load_one(values + column));
  return value;
}

template <typename Element>
inline auto sum_of_exponentials(const Element* values, int64_t width, compute_t<Element> largest) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  Vector<Scalar> total{};
  int64_t column = 0;
  for (; column + step <= width; column += step) total += exponential(load(values + column) - largest);
  Scalar sum = sum_of_lanes(total);
  for (; column < width; ++column) sum += std::exp(load_one(values + column) - largest);
  return sum;
}

template <typename Element>
void statistics_of_row(const VocabularyBlock& call, int64_t row) {
  const auto* logits = static_cast<const Element*>(call.logits) + row * call.stride;
  const auto largest = largest_of(logits, call.width);
  call.largest[row] = largest;
  call.sum[row] = sum_of_exponentials(logits, call.width, largest);
  const int64_t label = call.labels[row] - call.first_label;
  if (label >= 0 && label < call.width) call.label_logit[row] = load_one(logits + label);
}

template <typename Element>
void gradient_of_row(const VocabularyBlock& call, int64_t row) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  auto* logits = static_cast<Element*>(call.logits) + row * call.stride;
  const Scalar normalizer = call.log_normalizer[row], scale = call.scale[row];
  const int64_t label = call.labels[row] - call.first_label;
  const bool here = label >= 0 && label < call.width;
  const Scalar label_logit = here ? load_one(logits + label) : Scalar(0);
  for (int64_t column = 0; column < call.width; column += step) {
    const int64_t count = call.width - column;
    store(logits + column, exponential(load(logits + column, count) - normalizer) * scale, count);
  }
  if (here) store_one(logits + label, std::exp(label_logit - normalizer) * scale - scale);
}

}  // namespace

void vocabulary_statistics(Stored stored, const VocabularyBlock& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) statistics_of_row<decltype(element)>(call, row);
  });
}

void vocabulary_gradient(Stored stored, const VocabularyBlock& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) gradient_of_row<decltype(element)>(call, row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
