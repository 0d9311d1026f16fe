// Splitting one call's work over threads that live for that call only: an embedded store keeps no pool behind
// its user's back. Starting a thread costs some 10 us, so callers split only work of milliseconds.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace kvmmap {

// Calls body(begin, end, worker) over [0, count) in `threads` even stretches; the last runs on the calling thread.
template <class Body>
void parallel_ranges(int64_t count, int threads, Body&& body) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        body(int64_t{0}, count, 0);
        return;
    }
    std::vector<std::thread> workers;
    workers.reserve(threads - 1);
    int64_t begin = 0;
    for (int i = 0; i < threads; ++i) {
        int64_t end = count / threads * (i + 1) + count % threads * (i + 1) / threads;
        bool started = false;
        if (i + 1 < threads) {
            try {
                workers.emplace_back([=, &body] { body(begin, end, i); });
                started = true;
            } catch (const std::system_error&) {
                // No thread to be had (a process limit): do this stretch here.
            }
        }
        if (!started) body(begin, end, i);
        begin = end;
    }
    for (auto& worker : workers) worker.join();
}

}  // namespace kvmmap
