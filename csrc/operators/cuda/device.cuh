// What every CUDA source here uses: elements.cuh for its kernels, and on the host streams, launches and dispatch.
#pragma once

#include "cuda/elements.cuh"
#include "cuda_library.h"
#include "tensors.h"

#ifdef MEGATRON_RETRO_SHIM
#define MEGATRON_RETRO_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(megatron_retro_shim, CPU, library)
#else
#define MEGATRON_RETRO_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CUDA, library)
#endif

namespace megatron_retro {
namespace device {

inline cudaStream_t stream_of(const Tensor& tensor) {
#ifdef MEGATRON_RETRO_SHIM
  return nullptr;
#else
  require(current_stream() != nullptr, "CUDA: torch's current stream was not found when the library was loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream()(tensor.get_device_index(), &stream));
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
