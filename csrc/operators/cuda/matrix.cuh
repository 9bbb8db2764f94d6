// Tensor cores, warp by warp: the matrix instruction of sm_80 and later, what loads its operands, asynchronous copies.
//
// A warp multiplies 16 x 16 by 16 x 8 numbers of 16 bits and adds to 16 x 8 sums in float32. Each operand is spread over
// the lanes as the PTX ISA has it for mma.m16n8k16: with g = lane / 4 and t = lane % 4, a lane holds
//   left    rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9, two numbers to a register:
//           (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   right   rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g
//   sums    row g columns 2t, 2t + 1, then row g + 8 columns 2t, 2t + 1
// So the sums of two products side by side, rounded, are a left operand already: `as_left`.
// On the host csrc/shim/matrix_shim.h executes the same three instructions between lanes that are fibers.
#pragma once

#include "cuda/elements.cuh"

#ifdef MEGATRON_RETRO_SHIM
#include "matrix_shim.h"
#endif

namespace megatron_retro {
namespace device {

// Row and column of a lane's sum `at` of four.
__device__ __forceinline__ int sum_row(int at) { return threadIdx.x % 32 / 4 + at / 2 * 8; }
__device__ __forceinline__ int sum_column(int at) { return threadIdx.x % 4 * 2 + at % 2; }

#ifdef MEGATRON_RETRO_SHIM

template <typename Element>
inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  shim::multiply_add(sums, left, right, [](uint16_t bits) { return widen(Element{bits}); });
}
inline void load_matrices(uint32_t (&matrices)[4], const void* row) { shim::load_matrices(matrices, row, false); }
inline void load_transposed(uint32_t (&matrices)[4], const void* row) { shim::load_matrices(matrices, row, true); }
inline void copy_16_bytes(void* shared, const void* from) { shim::running()->copy_later(shared, from, 16); }
inline void wait_for_copies() { shim::running()->copy_now(); }

#else

// Compiled for an older device too, where nothing calls it: see `has_matrix_instruction`.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define MEGATRON_RETRO_PTX(...) asm volatile(__VA_ARGS__)
#else
#define MEGATRON_RETRO_PTX(...) __trap()
#endif

#define MEGATRON_RETRO_MULTIPLY_ADD(type)                                                             \
  MEGATRON_RETRO_PTX(                                                                                 \
      "mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                  \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                    \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]))

template <typename Element>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  if constexpr (std::is_same_v<Element, BFloat16>)
    MEGATRON_RETRO_MULTIPLY_ADD("bf16");
  else
    MEGATRON_RETRO_MULTIPLY_ADD("f16");
}
#undef MEGATRON_RETRO_MULTIPLY_ADD

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices of 16-bit numbers out of shared memory: lane i names the 16 bytes of row i % 8 of matrix i / 8, and
// gets from each matrix (row g, columns 2t, 2t + 1), or (rows 2t, 2t + 1, column g) where it is transposed on the way.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  MEGATRON_RETRO_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(shared_address(row))
                     : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&matrices)[4], const void* row) {
  MEGATRON_RETRO_PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// Into shared memory without passing through registers; zeros where `from` is null. The bytes are there for this thread
// after `wait_for_copies`, and for others after a barrier behind it.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* from) {
  MEGATRON_RETRO_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(__cvta_generic_to_global(from)), "r"(from ? 16 : 0)
                     : "memory");
}
__device__ __forceinline__ void wait_for_copies() { MEGATRON_RETRO_PTX("cp.async.wait_all;" ::: "memory"); }

#undef MEGATRON_RETRO_PTX
#endif

// Two numbers in one register, as the instruction wants them: the first in the lower half.
template <typename Element>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  Pack<Element, 2> pair;
  narrow(first, pair.each[0]);
  narrow(second, pair.each[1]);
  return bits_as<uint32_t>(pair);
}

// Sums of columns 0..7 and 8..15, rounded.
template <typename Element>
__device__ __forceinline__ void as_left(const float (&low)[4], const float (&high)[4], uint32_t (&left)[4]) {
  left[0] = packed<Element>(low[0], low[1]);
  left[1] = packed<Element>(low[2], low[3]);
  left[2] = packed<Element>(high[0], high[1]);
  left[3] = packed<Element>(high[2], high[3]);
}

// 16 x 16 numbers in shared memory, rows `stride` apart, as a left operand.
template <typename Element>
__device__ __forceinline__ void load_left(const Element* corner, int stride, uint32_t (&left)[4]) {
  const int lane = threadIdx.x % 32;
  load_matrices(left, corner + lane % 16 * stride + lane / 16 * 8);
}

// The same numbers as the right operands of two products: columns 0..7 and 8..15.
template <typename Element>
__device__ __forceinline__ void load_right(const Element* corner, int stride, uint32_t (&right)[2][2]) {
  const int lane = threadIdx.x % 32;
  uint32_t matrices[4];
  load_transposed(matrices, corner + lane % 16 * stride + lane / 16 * 8);
  right[0][0] = matrices[0], right[0][1] = matrices[1], right[1][0] = matrices[2], right[1][1] = matrices[3];
}

// Their transpose: what was a row is a column.
template <typename Element>
__device__ __forceinline__ void load_right_transpose(const Element* corner, int stride, uint32_t (&right)[2][2]) {
  const int lane = threadIdx.x % 32;
  uint32_t matrices[4];
  load_matrices(matrices, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  right[0][0] = matrices[0], right[0][1] = matrices[1], right[1][0] = matrices[2], right[1][1] = matrices[3];
}

}  // namespace device
}  // namespace megatron_retro
