// A fuzzer's bytes as the arguments of entry points. Arrays lie in memory of exactly their size, so that a read beyond
// one is seen; `tests/faults/fuzzing.py` writes the same format for its seeds.
#pragma once

#include <pybind11/embed.h>
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fuzz {

namespace py = pybind11;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), left_(size) {}

  // Missing bytes are zero.
  template <typename T = int64_t>
  T number() {
    T value = 0;
    take(&value, sizeof value);
    return value;
  }

  // Two bytes say how many numbers follow; those that are missing are left out.
  template <typename T>
  std::vector<T> list() {
    const size_t count = std::min<size_t>(number<uint16_t>(), left_ / sizeof(T));
    std::vector<T> values(count);
    take(values.data(), count * sizeof(T));
    return values;
  }

  template <typename T>
  py::array_t<T> array() {
    const std::vector<T> values = list<T>();
    return owned(values, {py::ssize_t(values.size())});
  }

  // As many rows as the numbers fill; the last two sizes come first.
  template <typename T>
  py::array_t<T> table(int dimensions = 2) {
    std::vector<py::ssize_t> shape(dimensions);
    py::ssize_t row = 1;
    for (int axis = 1; axis < dimensions; ++axis) row *= shape[axis] = number<uint8_t>() % 64;
    std::vector<T> values = list<T>();
    shape[0] = row ? py::ssize_t(values.size()) / row : number<uint8_t>() % 8;
    values.resize(shape[0] * row);
    return owned(values, shape);
  }

 private:
  template <typename T>
  static py::array_t<T> owned(const std::vector<T>& values, const std::vector<py::ssize_t>& shape) {
    T* memory = static_cast<T*>(std::malloc(values.size() * sizeof(T)));
    if (!values.empty()) std::memcpy(memory, values.data(), values.size() * sizeof(T));
    return py::array_t<T>(shape, memory, py::capsule(memory, [](void* pointer) { std::free(pointer); }));
  }

  void take(void* target, size_t size) {
    const size_t count = std::min(size, left_);
    if (count) std::memcpy(target, at_, count);
    at_ += count, left_ -= count;
  }

  const uint8_t* at_;
  size_t left_;
};

using Entries = std::map<std::string, std::function<void(Bytes&)>>;

}  // namespace fuzz

extern const fuzz::Entries entries;  // by name; FUZZED_ENTRY in the environment says which one is fuzzed
