// Softmax of rows: statistics and gradient of one block of the vocabulary, and the softmax under a mask.
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
  const Scalar normalizer = call.log_normalizer[row], scale = call.probability_scale[row];
  const int64_t label = call.labels[row] - call.first_label;
  const bool here = label >= 0 && label < call.width;
  const Scalar label_logit = here ? load_one(logits + label) : Scalar(0);
  for (int64_t column = 0; column < call.width; column += step) {
    const int64_t count = call.width - column;
    store(logits + column, exponential(load(logits + column, count) - normalizer) * scale, count);
  }
  if (here) store_one(logits + label, std::exp(label_logit - normalizer) * scale - Scalar(call.label_scale[row]));
}

// Scaled scores of seen columns, minus infinity for the others and beyond the row.
template <typename Element>
inline auto seen_scores(const MaskedSoftmax& call, const Element* scores, const uint8_t* mask, int64_t column) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  const int64_t count = std::min(step, call.width - column);
  uint8_t seen[step] = {};
  if (mask)
    std::memcpy(seen, mask + column, count);
  else
    std::memset(seen, 1, count);
  typename VectorOf<uint8_t, step>::type bytes;
  std::memcpy(&bytes, seen, step);
  const auto shown = __builtin_convertvector(bytes, Vector<Scalar>) > 0;
  return shown ? load(scores + column, count) * Scalar(call.scale) : splat(lowest<Scalar>);
}

template <typename Element>
void softmax_of_row(const MaskedSoftmax& call, int64_t row) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  const auto* scores = static_cast<const Element*>(call.input) + row * call.width;
  auto* output = static_cast<Element*>(call.output) + row * call.width;
  const uint8_t* mask = call.mask ? call.mask + row / call.rows_per_mask * call.width : nullptr;
  auto largest = splat(lowest<Scalar>);
  for (int64_t column = 0; column < call.width; column += step)
    largest = larger(seen_scores(call, scores, mask, column), largest);
  const Scalar top = largest_lane(largest);
  if (top == lowest<Scalar>) {
    std::memset(static_cast<void*>(output), 0, call.width * sizeof(Element));
    return;
  }
  Vector<Scalar> total{};
  for (int64_t column = 0; column < call.width; column += step)
    total += exponential(seen_scores(call, scores, mask, column) - top);
  const Scalar scale = 1 / sum_of_lanes(total);
  for (int64_t column = 0; column < call.width; column += step)
    store(output + column, exponential(seen_scores(call, scores, mask, column) - top) * scale, call.width - column);
}

template <typename Element>
void softmax_gradient_of_row(const MaskedSoftmax& call, int64_t row) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  const auto* output = static_cast<const Element*>(call.output) + row * call.width;
  const auto* grad_output = static_cast<const Element*>(call.grad_output) + row * call.width;
  auto* grad_input = static_cast<Element*>(call.grad_input) + row * call.width;
  Vector<Scalar> along{};
  for (int64_t column = 0; column < call.width; column += step)
    along += load(output + column, call.width - column) * load(grad_output + column, call.width - column);
  const Scalar share = sum_of_lanes(along);
  for (int64_t column = 0; column < call.width; column += step) {
    const int64_t count = call.width - column;
    const auto grad = load(output + column, count) * (load(grad_output + column, count) - share) * Scalar(call.scale);
    store(grad_input + column, grad, count);
  }
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

void masked_softmax_forward(Stored stored, const MaskedSoftmax& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) softmax_of_row<decltype(element)>(call, row);
  });
}

void masked_softmax_backward(Stored stored, const MaskedSoftmax& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) softmax_gradient_of_row<decltype(element)>(call, row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
