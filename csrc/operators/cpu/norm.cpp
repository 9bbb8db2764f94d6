// LayerNorm and RMSNorm with the residual add in front, a row at a time: it is read from memory once and stays in cache.
#include "cpu/for_stored.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

template <typename Element>
struct NormRow {
  using Scalar = compute_t<Element>;
  using Wide = Vector<Scalar>;
  static constexpr int64_t step = lanes<Scalar>;
  const Norm& call;
  const Scalar* weight = static_cast<const Scalar*>(call.weight);
  const Scalar* bias = static_cast<const Scalar*>(call.bias);

  template <typename Visitor>
  void for_columns(Visitor&& visit) const {
    for (int64_t column = 0; column < call.width; column += step) visit(column, call.width - column);
  }

  Wide scale(int64_t column, int64_t count) const {
    return load(weight + column, count) + Scalar(call.weight_offset);
  }

  // Input plus residual, rounded as it is stored.
  const Element* summed(int64_t row) const {
    const auto* input = static_cast<const Element*>(call.input) + row * call.width;
    if (!call.residual) return input;
    const auto* residual = static_cast<const Element*>(call.residual) + row * call.width;
    auto* sum = static_cast<Element*>(call.sum) + row * call.width;
    for_columns([&](int64_t column, int64_t count) {
      store(sum + column, load(input + column, count) + load(residual + column, count), count);
    });
    return sum;
  }

  Scalar mean_of(const Element* values) const {
    Wide total{};
    for_columns([&](int64_t column, int64_t count) { total += load(values + column, count); });
    return sum_of_lanes(total) / Scalar(call.width);
  }

  Scalar mean_square(const Element* values, Scalar mean) const {
    Wide total{};
    for_columns([&](int64_t column, int64_t count) {
      Wide distance = load(values + column, count) - mean;
      if (count < step)
        for (int64_t lane = count; lane < step; ++lane) distance[lane] = 0;
      total += distance * distance;
    });
    return sum_of_lanes(total) / Scalar(call.width);
  }

  void forward(int64_t row) const {
    const Element* values = summed(row);
    const Scalar mean = call.centered ? mean_of(values) : Scalar(0);
    const Scalar inverse = 1 / std::sqrt(mean_square(values, mean) + Scalar(call.epsilon));
    auto* output = static_cast<Element*>(call.output) + row * call.width;
    for_columns([&](int64_t column, int64_t count) {
      Wide value = (load(values + column, count) - mean) * inverse * scale(column, count);
      if (bias) value += load(bias + column, count);
      store(output + column, value, count);
    });
    static_cast<Scalar*>(call.mean)[row] = mean;
    static_cast<Scalar*>(call.inverse_deviation)[row] = inverse;
  }

  void backward(int64_t row) const {
    const auto* values = static_cast<const Element*>(call.input) + row * call.width;
    const auto* grad_output = static_cast<const Element*>(call.grad_output) + row * call.width;
    const Scalar mean = static_cast<const Scalar*>(call.mean)[row];
    const Scalar inverse = static_cast<const Scalar*>(call.inverse_deviation)[row];
    auto* grad_weight = static_cast<Scalar*>(call.partial_grad_weight);
    auto* grad_bias = static_cast<Scalar*>(call.partial_grad_bias);
    Wide along{}, total{};
    for_columns([&](int64_t column, int64_t count) {
      const Wide grad = load(grad_output + column, count);
      const Wide normed = (load(values + column, count) - mean) * inverse;
      const Wide scaled = grad * scale(column, count);
      along += scaled * normed;
      total += scaled;
      store(grad_weight + column, load(grad_weight + column, count) + grad * normed, count);
      if (grad_bias) store(grad_bias + column, load(grad_bias + column, count) + grad, count);
    });
    const Scalar share = sum_of_lanes(along) / Scalar(call.width);
    const Scalar shift = call.centered ? sum_of_lanes(total) / Scalar(call.width) : Scalar(0);
    const auto* past = call.grad_sum ? static_cast<const Element*>(call.grad_sum) + row * call.width : nullptr;
    auto* grad_input = static_cast<Element*>(call.grad_input) + row * call.width;
    for_columns([&](int64_t column, int64_t count) {
      const Wide normed = (load(values + column, count) - mean) * inverse;
      Wide grad = (load(grad_output + column, count) * scale(column, count) - normed * share - shift) * inverse;
      if (past) grad += load(past + column, count);
      store(grad_input + column, grad, count);
    });
  }
};

}  // namespace

void norm_forward(Stored stored, const Norm& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    const NormRow<decltype(element)> rows{call};
    for (int64_t row = first; row < last; ++row) rows.forward(row);
  });
}

void norm_backward(Stored stored, const Norm& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    const NormRow<decltype(element)> rows{call};
    for (int64_t row = first; row < last; ++row) rows.backward(row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
