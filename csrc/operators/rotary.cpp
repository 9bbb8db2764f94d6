// CPU side of `rotary` and `rotary_`: checks, memory, threads.
#include "cpu/dispatch.h"
#include "tensors.h"

namespace megatron_retro {
namespace {

void check_table(const Tensor& table, const char* what, const Tensor& heads) {
  require(table.scalar_type() == ScalarType::Float, what, " must be float32");
  require(table.dim() == 3 && table.is_contiguous(), what, " must be contiguous [sequences or 1, positions, pairs]");
  require(
      (table.size(0) == 1 || table.size(0) == heads.size(0)) && table.size(1) == heads.size(1), what,
      " must have the sequences and positions of heads: got ", shape_of(table), " for ", shape_of(heads));
  require(2 * table.size(2) <= heads.size(3), what, " turns ", 2 * table.size(2), " dimensions of a head of ", heads.size(3));
}

Rotary arguments(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  require(heads.dim() == 4, "heads must be [sequences, positions, heads, head size], got ", shape_of(heads));
  require(heads.size(3) <= 1 || heads.stride(3) == 1, "the last dimension of heads must be contiguous");
  check_table(cosine, "cosine", heads);
  check_table(sine, "sine", heads);
  check_same_shape(sine, "sine", cosine, "cosine");
  Rotary call{};
  call.interleaved = interleaved;
  call.inverse = inverse;
  call.positions = heads.size(1);
  call.heads = heads.size(2);
  call.width = heads.size(3);
  call.rotated = 2 * cosine.size(2);
  call.table_stride = cosine.size(0) == 1 ? 0 : cosine.size(1) * cosine.size(2);
  call.input = heads.const_data_ptr();
  call.cosine = static_cast<const float*>(cosine.const_data_ptr());
  call.sine = static_cast<const float*>(sine.const_data_ptr());
  return call;
}

void run(const Tensor& heads, Rotary& call, const Tensor& output) {
  for (int dim = 0; dim < 3; ++dim) {
    call.input_strides[dim] = heads.stride(dim);
    call.output_strides[dim] = output.stride(dim);
  }
  call.output = output.mutable_data_ptr();
  const Stored stored = stored_type(heads, "heads");
  const int64_t rows = heads.numel() ? heads.size(0) * heads.size(1) : 0;
  torch::stable::parallel_for(0, rows, grain_of(call.heads * call.width), [&](int64_t first, int64_t last) {
    cpu::rotary(stored, call, first, last);
  });
}

Tensor rotary(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  Rotary call = arguments(heads, cosine, sine, interleaved, inverse);
  Tensor output = torch::stable::new_empty(heads, heads.sizes());
  run(heads, call, output);
  return output;
}

void rotary_(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  Rotary call = arguments(heads, cosine, sine, interleaved, inverse);
  run(heads, call, heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_retro, CPU, library) {
  library.impl("rotary", TORCH_BOX(&rotary));
  library.impl("rotary_", TORCH_BOX(&rotary_));
}

}  // namespace megatron_retro
