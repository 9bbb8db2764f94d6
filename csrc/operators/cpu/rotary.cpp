// Rotary positions: each head read once and written once, in place where input and output are the same memory.
#include "cpu/for_stored.h"
#include "cpu/rope.h"

namespace megatron_retro {
namespace INSTRUCTION_SET {
namespace {

template <typename Element>
void rotate_row(const Rotary& call, int64_t row) {
  const int64_t sequence = row / call.positions, position = row % call.positions, half = call.rotated / 2;
  const auto* input = static_cast<const Element*>(call.input) + sequence * call.input_strides[0] + position * call.input_strides[1];
  auto* output = static_cast<Element*>(call.output) + sequence * call.output_strides[0] + position * call.output_strides[1];
  const int64_t table = sequence * call.table_stride + position * half;
  const double sign = call.inverse ? -1 : 1;
  for (int64_t head = 0; head < call.heads; ++head) {
    const Element* from = input + head * call.input_strides[2];
    Element* to = output + head * call.output_strides[2];
    rotate(from, to, call.cosine + table, call.sine + table, sign, half, call.interleaved);
    if (from != to && call.rotated < call.width)
      std::memcpy(to + call.rotated, from + call.rotated, (call.width - call.rotated) * sizeof(Element));
  }
}

}  // namespace

void rotary(Stored stored, const Rotary& call, int64_t first, int64_t last) {
  for_stored(stored, [&](auto element) {
    for (int64_t row = first; row < last; ++row) rotate_row<decltype(element)>(call, row);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
