// Vectors as wide as the registers, written once for every instruction set. A compiler computes wider ones lane by lane
// where it compares them, and keeps tiles of them in memory.
//
// Every kernel file under cpu/ is compiled several times, each time with another INSTRUCTION_SET as the name of its
// namespace, so nothing here may have external linkage outside of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef INSTRUCTION_SET
#define INSTRUCTION_SET generic
#endif

namespace megatron_retro {
namespace INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename Element, int bytes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(bytes)));
};

// What a stored element is computed in.
template <typename Stored>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename Stored>
using compute_t = typename Compute<Stored>::type;

template <typename Scalar>
constexpr int64_t lanes = vector_bytes / sizeof(Scalar);
template <typename Scalar>
using Vector = typename VectorOf<Scalar, vector_bytes>::type;

using IntVector = typename VectorOf<int32_t, vector_bytes>::type;
using BitVector = typename VectorOf<uint32_t, vector_bytes>::type;
using ShortVector = typename VectorOf<uint16_t, vector_bytes / 2>::type;

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Scalar>
inline Vector<Scalar> splat(Scalar value) {
  return value - Vector<Scalar>{};
}

// ---- loads and stores -------------------------------------------------------------------------

inline Vector<float> widen(ShortVector stored, const BFloat16*) {
  return bits_as<Vector<float>>(__builtin_convertvector(stored, BitVector) << 16);
}

inline ShortVector narrow(Vector<float> value, const BFloat16*) {
  const BitVector bits = bits_as<BitVector>(value);
  const BitVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVector chosen = value == value ? rounded : BitVector{} + 0x7fc0u;
  return __builtin_convertvector(chosen, ShortVector);
}

inline Vector<float> widen(ShortVector stored, const Half*) {
  Vector<float> value;
  for (int lane = 0; lane < lanes<float>; ++lane)
    value[lane] = static_cast<float>(bits_as<_Float16>(uint16_t(stored[lane])));
  return value;
}

inline ShortVector narrow(Vector<float> value, const Half*) {
  ShortVector stored;
  for (int lane = 0; lane < lanes<float>; ++lane) stored[lane] = bits_as<uint16_t>(static_cast<_Float16>(value[lane]));
  return stored;
}

template <typename Stored>
inline Vector<compute_t<Stored>> load(const Stored* from) {
  if constexpr (sizeof(Stored) == 2) {
    ShortVector stored;
    std::memcpy(&stored, from, sizeof(stored));
    return widen(stored, from);
  } else {
    Vector<Stored> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <typename Stored>
inline void store(Stored* to, Vector<compute_t<Stored>> value) {
  if constexpr (sizeof(Stored) == 2) {
    const ShortVector stored = narrow(value, to);
    std::memcpy(to, &stored, sizeof(stored));
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

// The first `count` lanes only; the others read as zero.
template <typename Stored>
inline Vector<compute_t<Stored>> load(const Stored* from, int64_t count) {
  constexpr int64_t width = lanes<compute_t<Stored>>;
  if (count >= width) return load(from);
  Stored padded[width] = {};
  std::memcpy(padded, from, count * sizeof(Stored));
  return load(padded);
}

template <typename Stored>
inline void store(Stored* to, Vector<compute_t<Stored>> value, int64_t count) {
  constexpr int64_t width = lanes<compute_t<Stored>>;
  if (count >= width) return store(to, value);
  Stored padded[width];
  store(padded, value);
  std::memcpy(to, padded, count * sizeof(Stored));
}

template <typename Stored>
inline compute_t<Stored> load_one(const Stored* from) {
  return load(from, 1)[0];
}

template <typename Stored>
inline void store_one(Stored* to, compute_t<Stored> value) {
  store(to, splat(value), 1);
}

// ---- reductions -------------------------------------------------------------------------------

// Lanes i and i + half together, then the halves of that.
template <typename Wide>
inline auto sum_of_lanes(Wide value) {
  using Scalar = std::decay_t<decltype(value[0])>;
  if constexpr (sizeof(Wide) == 2 * sizeof(Scalar)) {
    return value[0] + value[1];
  } else {
    typename VectorOf<Scalar, sizeof(Wide) / 2>::type halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return sum_of_lanes(halves[0] + halves[1]);
  }
}

template <typename Wide>
inline auto largest_lane(Wide value) {
  constexpr int count = sizeof(Wide) / sizeof(value[0]);
  auto largest = value[0];
  for (int lane = 1; lane < count; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

template <typename Wide>
inline Wide larger(Wide left, Wide right) {
  return left > right ? left : right;
}

template <typename Wide>
inline Wide smaller(Wide left, Wide right) {
  return left < right ? left : right;
}

// ---- functions --------------------------------------------------------------------------------

// e^x to one unit in the last place; below -87.3 it is 0, above 88.7 infinity.
inline Vector<float> exponential(Vector<float> x) {
  const Vector<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vector<float> bounded = larger(smaller(x, splat(88.73f)), splat(-87.34f));
  const Vector<float> shifted = bounded * 1.44269504f + magic;
  const Vector<float> whole = shifted - magic;
  Vector<float> rest = bounded - whole * 0.693145752f;
  rest = rest - whole * 1.42860677e-6f;
  Vector<float> power = splat(1.38319808e-3f);
  power = power * rest + 8.37550033e-3f;
  power = power * rest + 4.16689515e-2f;
  power = power * rest + 1.66664466e-1f;
  power = power * rest + 4.99999851e-1f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  // Half of the exponent at a time, so that 2^128 overflows to infinity instead of wrapping.
  const IntVector exponent = __builtin_convertvector(whole, IntVector);
  const IntVector first = exponent >> 1;
  power = power * bits_as<Vector<float>>((first + 127) << 23);
  power = power * bits_as<Vector<float>>((exponent - first + 127) << 23);
  power = x < -87.34f ? Vector<float>{} : power;
  return x == x ? power : x;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// The error function to one unit in the last place: a polynomial near zero, one in the exponent further out.
inline Vector<float> error_function(Vector<float> x) {
  const Vector<float> size = x < 0.0f ? -x : x;
  const Vector<float> square = x * x;
  Vector<float> far = -1.72853470e-5f * size + 3.83197126e-4f;
  far = far * square + (-3.88396438e-3f * size + 2.42546219e-2f);
  far = far * size - 1.06777877e-1f;
  far = far * size - 6.34846687e-1f;
  far = far * size - 1.28717512e-1f;
  far = far * size - size;
  far = 1.0f - exponential(size > 4.0f ? splat(-88.0f) : far);
  far = x < 0.0f ? -far : far;
  Vector<float> near = splat(-5.96761703e-4f);
  near = near * square + 4.99119423e-3f;
  near = near * square - 2.67681349e-2f;
  near = near * square + 1.12819925e-1f;
  near = near * square - 3.76125336e-1f;
  near = near * square + 1.28379166e-1f;
  near = near * x + x;
  return size > 0.927734375f ? far : near;
}

inline Vector<double> error_function(Vector<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = std::erf(x[lane]);
  return x;
}

// 1 / (1 + e^-x), and one minus it without cancellation.
template <typename Wide>
inline Wide sigmoid(Wide x, Wide& complement) {
  const Wide tail = exponential(x < 0 ? x : -x);
  const Wide larger_share = 1 / (1 + tail), smaller_share = tail * larger_share;
  complement = x < 0 ? larger_share : smaller_share;
  return x < 0 ? smaller_share : larger_share;
}

}  // namespace INSTRUCTION_SET
}  // namespace megatron_retro
