// CPU side of `rotary` and `rotary_`: checks, memory, threads.
#include "rotary.h"

#include "cpu/dispatch.h"

namespace megatron_retro {
namespace {

void run(const Tensor& heads, Rotary& call, const Tensor& output) {
  set_output(call, heads, output);
  const Stored stored = stored_type(heads, "heads");
  const int64_t rows = heads.numel() ? heads.size(0) * heads.size(1) : 0;
  torch::stable::parallel_for(0, rows, grain_of(call.heads * call.width), [&](int64_t first, int64_t last) {
    cpu::rotary(stored, call, first, last);
  });
}

Tensor rotary(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  Rotary call = rotary_arguments(heads, cosine, sine, interleaved, inverse);
  Tensor output = torch::stable::new_empty(heads, heads.sizes());
  run(heads, call, output);
  return output;
}

void rotary_(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  Rotary call = rotary_arguments(heads, cosine, sine, interleaved, inverse);
  run(heads, call, heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("rotary", TORCH_BOX(&rotary));
  library.impl("rotary_", TORCH_BOX(&rotary_));
}

}  // namespace megatron_retro
