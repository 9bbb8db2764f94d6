// What the library asks of a CUDA torch when it is loaded, and what it says of its own kernels.
#pragma once

#include <cstdint>

namespace megatron_retro {
namespace device {

// torch's current stream of a device; null until `megatron_retro_find_stream` has found it.
using CurrentStream = int32_t (*)(int32_t device, void** stream);
CurrentStream current_stream();

}  // namespace device
}  // namespace megatron_retro
