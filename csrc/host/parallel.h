// Rows shared out to threads; few rows stay in the calling one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace host {

template <typename Work>
void over_rows(int64_t rows, int threads, const Work& work) {
    constexpr int64_t fewest = 256;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows / fewest));
    std::vector<std::thread> others;
    for (int64_t part = 1; part < parts; ++part) {
        others.emplace_back([=, &work] { work(rows * part / parts, rows * (part + 1) / parts); });
    }
    work(0, rows / parts);
    for (std::thread& other : others) other.join();
}

}  // namespace host
