// Stored types, 16-byte loads, reductions and shared memory: what kernels use, without torch.
//
// Compiled by nvcc for the device, and by a C++ compiler with csrc/shim/cuda_shim.h for tests on the host
// (MEGATRON_RETRO_SHIM): kernels use only what both have.
#pragma once

#include <cfloat>
#include <cstdint>

#ifdef MEGATRON_RETRO_SHIM
#include "cuda_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace megatron_retro {
namespace device {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }

#ifdef MEGATRON_RETRO_SHIM
__device__ __forceinline__ float widen(Half value) { return float(bits_as<_Float16>(value.bits)); }
__device__ __forceinline__ void narrow(float value, Half& to) { to.bits = bits_as<uint16_t>(_Float16(value)); }
__device__ __forceinline__ void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  to.bits = value == value ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}
#else
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ void narrow(float value, Half& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ void narrow(float value, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
#endif
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }

template <typename Element>
__device__ __forceinline__ float rounded(float value) {
  Element stored;
  narrow(value, stored);
  return widen(stored);
}

// `count` elements that are read and written together; 16 bytes when the tensor allows it, else one.
template <typename Element, int count>
struct alignas(sizeof(Element) * count) Pack {
  Element each[count];
};

template <typename Element, int count>
__device__ __forceinline__ Pack<Element, count> load_pack(const Element* from) {
  return *reinterpret_cast<const Pack<Element, count>*>(from);
}

template <typename Element, int count>
__device__ __forceinline__ void store_pack(Element* to, const Pack<Element, count>& pack) {
  *reinterpret_cast<Pack<Element, count>*>(to) = pack;
}

struct Sum {
  __device__ static float identity() { return 0.0f; }
  __device__ float operator()(float left, float right) const { return left + right; }
};
struct Maximum {
  __device__ static float identity() { return -INFINITY; }
  __device__ float operator()(float left, float right) const { return fmaxf(left, right); }
};

// Over neighbouring lanes of a warp, a power of two of them; each of them gets the result.
template <int lanes, typename Operation>
__device__ __forceinline__ float over_lanes(float value, Operation operation) {
#pragma unroll
  for (int away = lanes / 2; away > 0; away /= 2) value = operation(value, __shfl_xor_sync(0xffffffffu, value, away));
  return value;
}

template <typename Operation>
__device__ __forceinline__ float over_warp(float value, Operation operation) {
  return over_lanes<32>(value, operation);
}

// Every thread of the block gets the result; `scratch` holds 32 floats of shared memory.
template <typename Operation>
__device__ __forceinline__ float over_block(float value, Operation operation, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  value = over_warp(value, operation);
  __syncthreads();  // the scratch may still be read from the last call
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < warps ? scratch[lane] : Operation::identity();
  return over_warp(value, operation);
}

#ifdef MEGATRON_RETRO_SHIM
template <typename Type>
__device__ __forceinline__ Type* shared_memory() {
  return reinterpret_cast<Type*>(shim::running()->shared.data());
}
#else
template <typename Type>
__device__ __forceinline__ Type* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<Type*>(memory);
}
#endif

}  // namespace device
}  // namespace megatron_retro
