// Small matrix products that stay in cache: c[i][j] (+)= sum over k of a[i][k] * b[k][j].
//
// `a` is read an element at a time with any strides, so it may be a transpose; the columns of `b` and `c` lie in
// vectors, their number a multiple of lanes<Scalar>.
#pragma once

#include <algorithm>

#include "cpu/vector.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {

// A tile of accumulators that fits the registers.
#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_vectors = 2;
#else
constexpr int tile_rows = 2, tile_vectors = 4;
#endif

template <typename Scalar>
struct Matrix {
  const Scalar* data;
  int64_t row, column;  // strides
};

template <int rows, int vectors, typename Scalar>
inline void multiply_tile(
    int64_t depth, Matrix<Scalar> a, const Scalar* b, int64_t b_row, Scalar* c, int64_t c_row, bool add) {
  constexpr int64_t step = lanes<Scalar>;
  Vector<Scalar> sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = add ? load(c + i * c_row + j * step) : Vector<Scalar>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<Scalar> line[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) line[j] = load(b + k * b_row + j * step);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector<Scalar> factor = splat(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += factor * line[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * step, sum[i][j]);
}

template <int vectors, typename Scalar>
inline void multiply_panel(
    int64_t rows, int64_t depth, Matrix<Scalar> a, const Scalar* b, int64_t b_row, Scalar* c, int64_t c_row, bool add) {
  int64_t row = 0;
  for (; row + tile_rows <= rows; row += tile_rows)
    multiply_tile<tile_rows, vectors>(depth, {a.data + row * a.row, a.row, a.column}, b, b_row, c + row * c_row, c_row, add);
  for (; row + 2 <= rows; row += 2)
    multiply_tile<2, vectors>(depth, {a.data + row * a.row, a.row, a.column}, b, b_row, c + row * c_row, c_row, add);
  if (row < rows)
    multiply_tile<1, vectors>(depth, {a.data + row * a.row, a.row, a.column}, b, b_row, c + row * c_row, c_row, add);
}

template <typename Scalar>
inline void multiply(
    int64_t rows, int64_t columns, int64_t depth, Matrix<Scalar> a, const Scalar* b, int64_t b_row, Scalar* c,
    int64_t c_row, bool add) {
  constexpr int64_t step = lanes<Scalar>;
  int64_t column = 0;
  for (; column + tile_vectors * step <= columns; column += tile_vectors * step)
    multiply_panel<tile_vectors>(rows, depth, a, b + column, b_row, c + column, c_row, add);
  for (; column < columns; column += step)
    multiply_panel<1>(rows, depth, a, b + column, b_row, c + column, c_row, add);
}

// to[column][row] from from[row][column], both with rows of their own stride.
template <typename Scalar>
inline void transpose(int64_t rows, int64_t columns, const Scalar* from, int64_t from_row, Scalar* to, int64_t to_row) {
  constexpr int64_t block = 8;
  for (int64_t top = 0; top < rows; top += block)
    for (int64_t left = 0; left < columns; left += block)
      for (int64_t column = left; column < std::min(left + block, columns); ++column)
        for (int64_t row = top; row < std::min(top + block, rows); ++row)
          to[column * to_row + row] = from[row * from_row + column];
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
