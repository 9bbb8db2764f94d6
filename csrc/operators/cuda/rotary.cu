// `rotary` and `rotary_` on the GPU: a thread rotates the pairs of one pack, or copies a pack that does not rotate.
#include "cuda/device.cuh"
#include "rotary.h"

namespace megatron_retro {
namespace device {
namespace {

constexpr int threads = 256;

// `count` pairs at a time: (i, i + half) as two packs, or neighbours (2i, 2i + 1) as one pack of twice the length.
template <typename Element, int count>
__global__ void __launch_bounds__(threads) rotate(Rotary call, int64_t packs, bool copy_rest) {
  const int64_t half = call.rotated / 2, rotating = half / count, rest = copy_rest ? (call.width - call.rotated) / count : 0;
  const int64_t per_head = rotating + rest, step = int64_t(gridDim.x) * threads;
  const float sign = call.inverse ? -1.0f : 1.0f;
  for (int64_t pack = int64_t(blockIdx.x) * threads + threadIdx.x; pack < packs; pack += step) {
    const int64_t place = pack % per_head, head = pack / per_head % call.heads, row = pack / per_head / call.heads;
    const int64_t sequence = row / call.positions, position = row % call.positions;
    const Element* from = static_cast<const Element*>(call.input) + sequence * call.input_strides[0] +
                          position * call.input_strides[1] + head * call.input_strides[2];
    Element* to = static_cast<Element*>(call.output) + sequence * call.output_strides[0] +
                  position * call.output_strides[1] + head * call.output_strides[2];
    if (place >= rotating) {
      const int64_t column = call.rotated + (place - rotating) * count;
      store_pack(to + column, load_pack<Element, count>(from + column));
      continue;
    }
    const int64_t pair = place * count, table = sequence * call.table_stride + position * half + pair;
    const int64_t at = call.interleaved ? 2 * pair : pair, other = call.interleaved ? 2 * pair + count : half + pair;
    const auto left = load_pack<Element, count>(from + at), right = load_pack<Element, count>(from + other);
    float in[2 * count], out[2 * count];
#pragma unroll
    for (int i = 0; i < count; ++i) in[i] = widen(left.each[i]), in[count + i] = widen(right.each[i]);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float cosine = call.cosine[table + i], sine = call.sine[table + i] * sign;
      const float first = call.interleaved ? in[2 * i] : in[i], second = call.interleaved ? in[2 * i + 1] : in[count + i];
      const float rotated_first = first * cosine - second * sine, rotated_second = second * cosine + first * sine;
      if (call.interleaved)
        out[2 * i] = rotated_first, out[2 * i + 1] = rotated_second;
      else
        out[i] = rotated_first, out[count + i] = rotated_second;
    }
    Pack<Element, count> rotated_left, rotated_right;
#pragma unroll
    for (int i = 0; i < count; ++i) narrow(out[i], rotated_left.each[i]), narrow(out[count + i], rotated_right.each[i]);
    store_pack(to + at, rotated_left);
    store_pack(to + other, rotated_right);
  }
}

template <typename Element, int count>
void run(const Rotary& call, const Tensor& heads, bool copy_rest) {
  const int64_t per_head = call.rotated / 2 / count + (copy_rest ? (call.width - call.rotated) / count : 0);
  const int64_t packs = heads.size(0) * call.positions * call.heads * per_head;
  launch(rotate<Element, count>, num_blocks(packs, threads), threads, 0, stream_of(heads), call, packs, copy_rest);
}

bool strides_line_up(const int64_t* strides, int64_t count) {
  return strides[0] % count == 0 && strides[1] % count == 0 && strides[2] % count == 0;
}

void run(Rotary& call, const Tensor& heads, const Tensor& output, bool copy_rest) {
  const OnDeviceOf guard(heads);
  set_output(call, heads, output);
  for_element(heads, "heads", [&](auto element) {
    using Element = decltype(element);
    constexpr int wide = 16 / sizeof(Element);
    const bool lines_up = aligned(call.input) && aligned(call.output) && strides_line_up(call.input_strides, wide) &&
                          strides_line_up(call.output_strides, wide);
    const bool whole = call.rotated / 2 % wide == 0 && (call.width - call.rotated) % wide == 0;
    lines_up && whole ? run<Element, wide>(call, heads, copy_rest) : run<Element, 1>(call, heads, copy_rest);
  });
}

Tensor rotary(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  Rotary call = rotary_arguments(heads, cosine, sine, interleaved, inverse);
  Tensor output = torch::stable::new_empty(heads, heads.sizes());
  run(call, heads, output, true);
  return output;
}

void rotary_(const Tensor& heads, const Tensor& cosine, const Tensor& sine, bool interleaved, bool inverse) {
  Rotary call = rotary_arguments(heads, cosine, sine, interleaved, inverse);
  run(call, heads, heads, false);
}

}  // namespace
}  // namespace device

MEGATRON_RETRO_CUDA_LIBRARY(library) {
  library.impl("rotary", TORCH_BOX(&device::rotary));
  library.impl("rotary_", TORCH_BOX(&device::rotary_));
}

}  // namespace megatron_retro
