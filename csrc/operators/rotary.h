// What the CPU and the CUDA side of `rotary` share: checks and strides.
#pragma once

#include "tensors.h"

namespace megatron_retro {

inline void check_table(const Tensor& table, const char* what, const Tensor& heads) {
  check_device(table, what, heads, "heads");
  require(table.scalar_type() == ScalarType::Float, what, " must be float32");
  require(table.dim() == 3 && table.is_contiguous(), what, " must be contiguous [sequences or 1, positions, pairs]");
  require(
      (table.size(0) == 1 || table.size(0) == heads.size(0)) && table.size(1) == heads.size(1), what,
      " must have the sequences and positions of heads: got ", shape_of(table), " for ", shape_of(heads));
  require(2 * table.size(2) <= heads.size(3), what, " rotates ", 2 * table.size(2), " dimensions of a head of ", heads.size(3));
}

inline Rotary rotary_arguments(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
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

inline void set_output(Rotary& call, const Tensor& heads, const Tensor& output) {
  for (int dim = 0; dim < 3; ++dim) {
    call.input_strides[dim] = heads.stride(dim);
    call.output_strides[dim] = output.stride(dim);
  }
  call.output = output.mutable_data_ptr();
}

}  // namespace megatron_retro
