// NumPy arrays as plain C++: shapes checked once at the border, raw pointers inside; threads over rows.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// One source, several instruction sets: the loader picks the widest that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address)
#endif

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Calls work(first, last) on shares of [0, count); small jobs stay on the calling thread.
template <typename Work>
void over_rows(int64_t count, int64_t threads, int64_t cost_of_row, const Work& work) {
  const int64_t worth = std::max<int64_t>(1, count * cost_of_row / 200000);
  const int64_t share_count = std::max<int64_t>(1, std::min({threads, count, worth}));
  if (share_count == 1) return work(int64_t{0}, count);
  std::vector<std::thread> pool;
  for (int64_t share = 0; share < share_count; ++share)
    pool.emplace_back([&, share] { work(count * share / share_count, count * (share + 1) / share_count); });
  for (auto& thread : pool) thread.join();
}
