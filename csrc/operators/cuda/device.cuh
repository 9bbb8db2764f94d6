// What every CUDA kernel here uses: stored types, 16-byte loads, reductions, launches.
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

#include "tensors.h"

#ifdef MEGATRON_RETRO_SHIM
#define MEGATRON_RETRO_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(megatron_retro_shim, CPU, library)
#else
#define MEGATRON_RETRO_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CUDA, library)
#endif

#ifndef MEGATRON_RETRO_SHIM
// A torch without CUDA has no such symbols; the library loads there all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
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

template <typename Operation>
__device__ __forceinline__ float over_warp(float value, Operation operation) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = operation(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
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

// ---- host side --------------------------------------------------------------------------------

inline cudaStream_t stream_of(const Tensor& tensor) {
#ifdef MEGATRON_RETRO_SHIM
  return nullptr;
#else
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// Makes the tensor's device the current one while it lives.
struct OnDeviceOf {
#ifdef MEGATRON_RETRO_SHIM
  explicit OnDeviceOf(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {}
#endif
};

#ifndef MEGATRON_RETRO_SHIM
// torch's own check would need symbols that a torch without CUDA does not have.
inline void check(cudaError_t status) {
  require(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}
#endif

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef MEGATRON_RETRO_SHIM
  shim::note_launch(reinterpret_cast<const void*>(kernel));
  shim::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
#else
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError());
#endif
}

// Blocks for `work` items of which a block takes `each`; kernels loop where that is more than a grid has.
inline unsigned num_blocks(int64_t work, int64_t each, int64_t most = 1 << 20) {
  return unsigned(std::min<int64_t>(most, (work + each - 1) / each));
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <typename Visitor>
void for_element(const Tensor& tensor, const char* what, Visitor&& visit) {
  switch (stored_type(tensor, what)) {
    case Stored::float32: return visit(float{});
    case Stored::bfloat16: return visit(BFloat16{});
    case Stored::float16: return visit(Half{});
    default: require(false, what, " must be float32, bfloat16 or float16 on a GPU");
  }
}

}  // namespace device
}  // namespace megatron_retro
