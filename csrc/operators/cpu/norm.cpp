// LayerNorm and RMSNorm with the residual add in front: a row is read from memory once and stays in cache. What a row
// becomes does not depend on the rows beside it.
#include "cpu/for_stored.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

// Two rows side by side hide each other's chains of additions. The backward pass reads three tensors and more: there one
// row is faster, as what it reads comes from memory in fewer streams. Loads of all rows come before their stores: where
// rows are 4096 bytes apart, a load waits for an earlier store to the same place of another page.
#if defined(__AVX512F__)
constexpr int forward_rows = 2;
#else
constexpr int forward_rows = 1;
#endif

// A value rounded as it will be stored.
template <typename Element>
inline auto as_stored(Vector<compute_t<Element>> value) {
  constexpr Element* type = nullptr;
  if constexpr (sizeof(Element) == 2) return widen(narrow(value, type), type);
  else return value;
}

template <int rows, typename Visitor>
inline void for_rows(Visitor&& visit) {
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) visit(row);
}

template <typename Element, int rows>
struct NormRows {
  using Scalar = compute_t<Element>;
  using Wide = Vector<Scalar>;
  static constexpr int64_t step = lanes<Scalar>;
  const Norm& call;
  const int64_t offset;  // of the first row's first element
  const Scalar* weight = static_cast<const Scalar*>(call.weight);
  const Scalar* bias = static_cast<const Scalar*>(call.bias);

  const Element* in(const void* tensor) const { return static_cast<const Element*>(tensor) + offset; }
  Element* out(void* tensor) const { return static_cast<Element*>(tensor) + offset; }

  // Whole vectors with a count that the compiler knows, then the rest.
  template <typename Visitor>
  void for_columns(Visitor&& visit) const {
    const int64_t whole = call.width - call.width % step;
    for (int64_t column = 0; column < whole; column += step) visit(column, std::integral_constant<int64_t, step>{});
    if (whole < call.width) visit(whole, call.width - whole);
  }

  Wide scale(int64_t column, int64_t count) const {
    return load(weight + column, count) + Scalar(call.weight_offset);
  }

  void average(const Wide (&totals)[rows], Scalar (&averages)[rows]) const {
    for_rows<rows>([&](int row) { averages[row] = sum_of_lanes(totals[row]) / Scalar(call.width); });
  }

  // What is normed: the input, or its sum with the residual as that is stored.
  const Element* summed(Wide (&totals)[rows]) const {
    const Element* input = in(call.input);
    if (!call.residual) {
      for_columns([&](int64_t column, auto count) {
        for_rows<rows>([&](int row) { totals[row] += load(input + row * call.width + column, count); });
      });
      return input;
    }
    const Element* residual = in(call.residual);
    Element* sum = out(call.sum);
    for_columns([&](int64_t column, auto count) {
      Wide values[rows];
      for_rows<rows>([&](int row) {
        const int64_t at = row * call.width + column;
        values[row] = as_stored<Element>(load(input + at, count) + load(residual + at, count));
        totals[row] += values[row];
      });
      for_rows<rows>([&](int row) { store(sum + row * call.width + column, values[row], count); });
    });
    return sum;
  }

  void mean_square(const Element* values, const Scalar (&mean)[rows], Scalar (&averages)[rows]) const {
    Wide totals[rows] = {};
    for_columns([&](int64_t column, auto count) {
      for_rows<rows>([&](int row) {
        Wide distance = load(values + row * call.width + column, count) - mean[row];
        if (count < step)
          for (int64_t lane = count; lane < step; ++lane) distance[lane] = 0;
        totals[row] += distance * distance;
      });
    });
    average(totals, averages);
  }

  void forward(int64_t first_row) const {
    Wide totals[rows] = {};
    const Element* values = summed(totals);
    Scalar mean[rows] = {}, inverse[rows];
    if (call.centered) average(totals, mean);
    mean_square(values, mean, inverse);
    for_rows<rows>([&](int row) { inverse[row] = 1 / std::sqrt(inverse[row] + Scalar(call.epsilon)); });
    Element* output = out(call.output);
    for_columns([&](int64_t column, auto count) {
      const Wide factor = scale(column, count), shift = bias ? load(bias + column, count) : Wide{};
      Wide normed[rows];
      for_rows<rows>([&](int row) {
        normed[row] = (load(values + row * call.width + column, count) - mean[row]) * inverse[row] * factor + shift;
      });
      for_rows<rows>([&](int row) { store(output + row * call.width + column, normed[row], count); });
    });
    for_rows<rows>([&](int row) {
      static_cast<Scalar*>(call.mean)[first_row + row] = mean[row];
      static_cast<Scalar*>(call.inverse_deviation)[first_row + row] = inverse[row];
    });
  }

  void backward(int64_t at_row) const {
    static_assert(rows == 1, "a row at a time");
    const Element *values = in(call.input), *grad_output = in(call.grad_output);
    const Scalar mean = static_cast<const Scalar*>(call.mean)[at_row];
    const Scalar inverse = static_cast<const Scalar*>(call.inverse_deviation)[at_row];
    auto* grad_weight = static_cast<Scalar*>(call.partial_grad_weight);
    auto* grad_bias = static_cast<Scalar*>(call.partial_grad_bias);
    Wide along[rows] = {}, total[rows] = {};
    for_columns([&](int64_t column, auto count) {
      const Wide grad = load(grad_output + column, count);
      const Wide normed = (load(values + column, count) - mean) * inverse;
      const Wide scaled = grad * scale(column, count);
      along[0] += scaled * normed;
      total[0] += scaled;
      store(grad_weight + column, load(grad_weight + column, count) + grad * normed, count);
      if (grad_bias) store(grad_bias + column, load(grad_bias + column, count) + grad, count);
    });
    Scalar share[rows], shift[rows] = {};
    average(along, share);
    if (call.centered) average(total, shift);
    const Element* past = call.grad_sum ? in(call.grad_sum) : nullptr;
    Element* grad_input = out(call.grad_input);
    for_columns([&](int64_t column, auto count) {
      const Wide normed = (load(values + column, count) - mean) * inverse;
      Wide grad = (load(grad_output + column, count) * scale(column, count) - normed * share[0] - shift[0]) * inverse;
      if (past) grad += load(past + column, count);
      store(grad_input + column, grad, count);
    });
  }
};

}  // namespace

void norm_forward(Stored stored, const Norm& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    using Element = decltype(element);
    int64_t row = first;
    for (; row + forward_rows <= last; row += forward_rows)
      NormRows<Element, forward_rows>{call, row * call.width}.forward(row);
    for (; row < last; ++row) NormRows<Element, 1>{call, row * call.width}.forward(row);
  });
}

void norm_backward(Stored stored, const Norm& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) NormRows<decltype(element), 1>{call, row * call.width}.backward(row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
