// The product of a few rows with a weight matrix. Reading the matrix is all that takes time, so it is read once, in
// order, and memory is asked for what comes next before it is needed.
//
// One row: output after output, a single stream. More rows: the sums of some outputs of all rows are kept while the
// matrix is read a block of columns at a time, and of a block a tile of outputs and rows is in registers; so the rows'
// values of a block stay in the first-level cache, and each weight that was loaded serves every row.
#include "cpu/for_stored.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

// Rows of a tile, and sums that fit the registers beside what is multiplied.
constexpr int most_rows = 8, most_sums = vector_bytes == 64 ? 24 : 12;
constexpr int most_outputs = 8;        // of a tile
constexpr int64_t group_outputs = 16;  // whose sums are kept
constexpr int64_t block_columns = 256;
constexpr int64_t bytes_ahead = 4096;

template <typename Element>
inline void finish(const SmallBatchGemv& call, int64_t row, int64_t output, Vector<compute_t<Element>> sums) {
  auto value = sum_of_lanes(sums);
  if (call.bias) value += load_one(static_cast<const Element*>(call.bias) + output);
  store_one(static_cast<Element*>(call.output) + row * call.outputs + output, value);
}

template <typename Element>
void one_row(const SmallBatchGemv& call, int64_t first, int64_t last) {
  using Scalar = compute_t<Element>;
  constexpr int64_t step = lanes<Scalar>;
  constexpr int chains = 4;  // of additions, side by side
  const Scalar* input = static_cast<const Scalar*>(call.input);
  for (int64_t output = first; output < last; ++output) {
    const Element* weight = static_cast<const Element*>(call.weight) + output * call.depth;
    Vector<Scalar> sums[chains] = {};
    int64_t column = 0;
    for (; column + chains * step <= call.depth; column += chains * step) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
        const int64_t at = column + chain * step;
        __builtin_prefetch(reinterpret_cast<const char*>(weight + at) + bytes_ahead);
        sums[chain] += load(input + at) * load(weight + at);
      }
    }
    for (; column < call.depth; column += step) {
      const int64_t count = call.depth - column;
      sums[0] += load(input + column, count) * load(weight + column, count);
    }
    finish<Element>(call, 0, output, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// Adds `count` columns to the sums of a tile; `ahead` elements further lies what this tile needs next.
template <typename Element, int rows, int outputs>
inline void add_tile(
    const compute_t<Element>* input, const Element* weight, int64_t depth, int64_t count, int64_t ahead,
    Vector<compute_t<Element>> (*kept)[most_rows]) {
  using Wide = Vector<compute_t<Element>>;
  constexpr int64_t step = lanes<compute_t<Element>>;
  Wide sums[outputs][rows];
  const auto add = [&](int64_t column, auto size) __attribute__((always_inline)) {
    Wide factors[outputs];
#pragma GCC unroll 8
    for (int output = 0; output < outputs; ++output) {
      factors[output] = load(weight + output * depth + column, size);
      __builtin_prefetch(weight + output * depth + column + ahead);
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const Wide value = load(input + row * depth + column, size);
#pragma GCC unroll 8
      for (int output = 0; output < outputs; ++output) sums[output][row] += value * factors[output];
    }
  };
#pragma GCC unroll 8
  for (int output = 0; output < outputs; ++output)
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) sums[output][row] = kept[output][row];
  const int64_t whole = count - count % step;
  for (int64_t column = 0; column < whole; column += step) add(column, std::integral_constant<int64_t, step>{});
  if (whole < count) add(whole, count - whole);
#pragma GCC unroll 8
  for (int output = 0; output < outputs; ++output)
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) kept[output][row] = sums[output][row];
}

// Outputs first..last, at most a group of them, of `rows` rows.
template <typename Element, int rows>
void some_rows(const SmallBatchGemv& call, int64_t first_row, int64_t first, int64_t last) {
  using Scalar = compute_t<Element>;
  constexpr int outputs = std::min(most_outputs, most_sums / rows);
  const Scalar* input = static_cast<const Scalar*>(call.input) + first_row * call.depth;
  const Element* weight = static_cast<const Element*>(call.weight) + first * call.depth;
  Vector<Scalar> kept[group_outputs][most_rows] = {};
  for (int64_t column = 0; column < call.depth; column += block_columns) {
    const int64_t next = column + block_columns, count = std::min(next, call.depth) - column;
    const int64_t ahead = next < call.depth ? block_columns : group_outputs * call.depth - column;
    const auto tile = [&](int64_t output, auto size) {
      add_tile<Element, rows, size>(
          input + column, weight + output * call.depth + column, call.depth, count, ahead, kept + output);
    };
    int64_t output = 0;
    for (; output + outputs <= last - first; output += outputs) tile(output, std::integral_constant<int, outputs>{});
    for (; output < last - first; ++output) tile(output, std::integral_constant<int, 1>{});
  }
  for (int64_t output = first; output < last; ++output)
    for (int row = 0; row < rows; ++row) finish<Element>(call, first_row + row, output, kept[output - first][row]);
}

// The rows that fill no tile.
template <typename Element, int rows>
void last_rows(const SmallBatchGemv& call, int64_t row, int64_t first, int64_t last) {
  if (call.rows - row == rows) return some_rows<Element, rows>(call, row, first, last);
  if constexpr (rows > 1) last_rows<Element, rows - 1>(call, row, first, last);
}

}  // namespace

void small_batch_gemv(Stored stored, const SmallBatchGemv& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    using Element = decltype(element);
    if (call.rows == 1) return one_row<Element>(call, first, last);
    for (int64_t output = first; output < last; output += group_outputs) {
      const int64_t stop = std::min(output + group_outputs, last);
      int64_t row = 0;
      for (; row + most_rows <= call.rows; row += most_rows) some_rows<Element, most_rows>(call, row, output, stop);
      last_rows<Element, most_rows>(call, row, output, stop);
    }
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
