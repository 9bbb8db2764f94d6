// Rows shared out to threads; few rows stay in the calling one. An exception of any thread is thrown on by the caller.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace host {

constexpr int64_t cost_worth_a_thread = 200000;

// Calls work(first, last) on shares of [0, rows); `cost_of_row` is about the nanoseconds of a row.
template <typename Work>
void over_rows(int64_t rows, int64_t threads, int64_t cost_of_row, const Work& work) {
    const int64_t worth = std::max<int64_t>(1, rows * cost_of_row / cost_worth_a_thread);
    const int64_t parts = std::max<int64_t>(1, std::min({threads, rows, worth}));
    if (parts == 1) return work(int64_t{0}, rows);
    std::vector<std::exception_ptr> failures(parts);
    std::vector<std::thread> others;
    const auto run = [&](int64_t part) {
        try {
            work(rows * part / parts, rows * (part + 1) / parts);
        } catch (...) {
            failures[part] = std::current_exception();
        }
    };
    for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
    run(0);
    for (std::thread& other : others) other.join();
    for (const std::exception_ptr& failure : failures) {
        if (failure) std::rethrow_exception(failure);
    }
}

}  // namespace host
