// The matrix instruction of a warp and the load of its operands, between the fibers of cuda_shim.h.
//
// Written from the tables of the PTX ISA (mma.m16n8k16 with 16-bit operands, ldmatrix.m8n8.x4), not from the kernels that
// use them: a number in the wrong lane or register is multiplied with the wrong partner here as on a device. A test
// compares both with products and tables of its own.
#pragma once

#include "cuda_shim.h"

namespace shim {

struct Operands {
  uint32_t left[4], right[2];
};

inline uint16_t half_of(uint32_t pair, int which) { return uint16_t(pair >> 16 * which); }

// Number (row, k) of the left operand, (k, column) of the right one, out of the registers of all lanes.
inline uint16_t left_at(const Operands* lanes, int row, int k) {
  return half_of(lanes[row % 8 * 4 + k % 8 / 2].left[row / 8 + k / 8 * 2], k % 2);
}
inline uint16_t right_at(const Operands* lanes, int k, int column) {
  return half_of(lanes[column * 4 + k % 8 / 2].right[k / 8], k % 2);
}

// sums += left x right; `widen` gives the value of 16 bits.
template <typename Widen>
inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], Widen widen) {
  Operands mine, lanes[32];
  std::copy_n(left, 4, mine.left);
  std::copy_n(right, 2, mine.right);
  running()->from_all_lanes(mine, lanes);
  const int group = lane_index() / 4, thread = lane_index() % 4;
  for (int at = 0; at < 4; ++at) {
    const int row = group + at / 2 * 8, column = thread * 2 + at % 2;
    for (int k = 0; k < 16; ++k) sums[at] += widen(left_at(lanes, row, k)) * widen(right_at(lanes, k, column));
  }
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed) {
  const uint16_t* rows[32];
  running()->from_all_lanes(static_cast<const uint16_t*>(row), rows);
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix takes rows that begin at 16 bytes");
  const int group = lane_index() / 4, thread = lane_index() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* const* first = rows + matrix * 8;
    const uint16_t low = transposed ? first[2 * thread][group] : first[group][2 * thread];
    const uint16_t high = transposed ? first[2 * thread + 1][group] : first[group][2 * thread + 1];
    matrices[matrix] = low | uint32_t(high) << 16;
  }
}

}  // namespace shim
