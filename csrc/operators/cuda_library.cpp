// Plain C functions that `megatron_retro/ops/library.py` calls after loading.
//
// torch's stream lives in libtorch_cuda, which is loaded without its names being global: neither linking (a CPU torch
// has no such library) nor a weak symbol (it stays null) finds it. So it is asked for by name, once, at load.
#include "cuda_library.h"

#include <dlfcn.h>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace megatron_retro {
namespace device {

namespace {
CurrentStream found = nullptr;
}

CurrentStream current_stream() { return found; }

}  // namespace device
}  // namespace megatron_retro

// Null, or why torch's stream cannot be found in a `library` that torch has loaded.
EXPORTED const char* megatron_retro_find_stream(const char* library) {
  using megatron_retro::device::CurrentStream;
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return "it is not loaded";
  void* symbol = dlsym(handle, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr) return "it has no aoti_torch_get_current_cuda_stream";
  megatron_retro::device::found = reinterpret_cast<CurrentStream>(symbol);
  return nullptr;
}

// `80 90 100 120 90+ptx`: what nvcc made; empty without nvcc.
EXPORTED const char* megatron_retro_cuda_architectures() {
#ifdef MEGATRON_RETRO_ARCHITECTURES
  return MEGATRON_RETRO_ARCHITECTURES;
#else
  return "";
#endif
}

// `13.0`: the CUDA that the kernels were built with; empty without nvcc.
EXPORTED const char* megatron_retro_cuda_version() {
#ifdef MEGATRON_RETRO_CUDA_VERSION
  return MEGATRON_RETRO_CUDA_VERSION;
#else
  return "";
#endif
}
