// Activations of the MLP with bias and gate in one pass; the backward pass computes them again instead of storing them.
#include "cpu/for_stored.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

// Value and slope of an activation at x.
template <ActivationKind kind, typename Wide>
inline void activate(Wide x, Wide& value, Wide& slope) {
  if constexpr (kind == ActivationKind::silu) {
    Wide rest = x;
    const Wide gate = sigmoid(x, rest);
    value = x * gate;
    slope = gate * (1 + x * rest);
  } else if constexpr (kind == ActivationKind::gelu) {
    using Scalar = std::decay_t<decltype(x[0])>;
    const Wide share = (1 + error_function(x * Scalar(0.70710678118654752))) * Scalar(0.5);
    value = x * share;
    slope = share + x * exponential(x * x * Scalar(-0.5)) * Scalar(0.39894228040143268);
  } else if constexpr (kind == ActivationKind::gelu_tanh) {
    using Scalar = std::decay_t<decltype(x[0])>;
    const Scalar scale = Scalar(1.5957691216057308), cubic = Scalar(0.044715);
    Wide rest = x;
    const Wide share = sigmoid(x * (1 + x * x * cubic) * scale, rest);
    value = x * share;
    slope = share + x * share * rest * scale * (1 + x * x * (3 * cubic));
  } else {
    const Wide positive = x > 0 ? x : Wide{};
    value = positive * positive;
    slope = 2 * positive;
  }
}

template <typename Element>
struct Row {
  const Element* gate;
  const Element* up;
  const Element* gate_bias;
  const Element* up_bias;
};

template <typename Element>
inline Row<Element> row_of(const Activation& call, int64_t row) {
  const auto* input = static_cast<const Element*>(call.input) + row * call.input_stride;
  const auto* bias = static_cast<const Element*>(call.bias);
  return {input, input + call.width, bias, bias ? bias + call.width : nullptr};
}

template <typename Element>
inline auto biased(const Element* values, const Element* bias, int64_t column, int64_t count) {
  auto loaded = load(values + column, count);
  return bias ? loaded + load(bias + column, count) : loaded;
}

template <ActivationKind kind, bool gated, typename Element>
void forward(const Activation& call, int64_t first, int64_t last) {
  constexpr int64_t step = lanes<compute_t<Element>>;
  for (int64_t row = first; row < last; ++row) {
    const auto at = row_of<Element>(call, row);
    auto* output = static_cast<Element*>(call.output) + row * call.width;
    for (int64_t column = 0; column < call.width; column += step) {
      const int64_t count = call.width - column;
      auto value = biased(at.gate, at.gate_bias, column, count), slope = value;
      activate<kind>(value, value, slope);
      if constexpr (gated) value *= biased(at.up, at.up_bias, column, count);
      store(output + column, value, count);
    }
  }
}

template <typename Scalar>
inline void accumulate(Scalar* into, Vector<Scalar> value, int64_t count) {
  store(into, load(into, count) + value, count);
}

template <ActivationKind kind, bool gated, typename Element>
void backward(const Activation& call, int64_t first, int64_t last) {
  using Scalar = compute_t<Element>;
  const int64_t step = lanes<Scalar>, input_width = gated ? 2 * call.width : call.width;
  auto* grad_bias = static_cast<Scalar*>(call.partial_grad_bias);
  for (int64_t row = first; row < last; ++row) {
    const auto at = row_of<Element>(call, row);
    const auto* grad_output = static_cast<const Element*>(call.grad_output) + row * call.width;
    auto* grad_input = static_cast<Element*>(call.grad_input) + row * input_width;
    for (int64_t column = 0; column < call.width; column += step) {
      const int64_t count = call.width - column;
      auto value = biased(at.gate, at.gate_bias, column, count), slope = value;
      activate<kind>(value, value, slope);
      auto grad = load(grad_output + column, count);
      if constexpr (gated) {
        const auto grad_up = grad * value;
        store(grad_input + call.width + column, grad_up, count);
        if (grad_bias) accumulate(grad_bias + call.width + column, grad_up, count);
        grad *= biased(at.up, at.up_bias, column, count);
      }
      grad *= slope;
      store(grad_input + column, grad, count);
      if (grad_bias) accumulate(grad_bias + column, grad, count);
    }
  }
}

template <typename Visitor>
void for_kind(ActivationKind kind, Visitor&& visit) {
  switch (kind) {
    case ActivationKind::silu: return visit(std::integral_constant<ActivationKind, ActivationKind::silu>{});
    case ActivationKind::gelu: return visit(std::integral_constant<ActivationKind, ActivationKind::gelu>{});
    case ActivationKind::gelu_tanh: return visit(std::integral_constant<ActivationKind, ActivationKind::gelu_tanh>{});
    case ActivationKind::squared_relu:
      return visit(std::integral_constant<ActivationKind, ActivationKind::squared_relu>{});
  }
}

}  // namespace

void activation_forward(Stored stored, const Activation& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    using Element = decltype(element);
    for_kind(call.kind, [&](auto kind) {
      call.gated ? forward<kind.value, true, Element>(call, first, last)
                 : forward<kind.value, false, Element>(call, first, last);
    });
  });
}

void activation_backward(Stored stored, const Activation& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    using Element = decltype(element);
    for_kind(call.kind, [&](auto kind) {
      call.gated ? backward<kind.value, true, Element>(call, first, last)
                 : backward<kind.value, false, Element>(call, first, last);
    });
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
