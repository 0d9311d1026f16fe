// Threads that share out pieces, under ThreadSanitizer: every piece once, by any thread; many callers at a time; calls
// within calls; exceptions; and helpers that end while somebody is about to ask them.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../kvmmap/_core/parallel.h"

using namespace kvmmap;

namespace {

std::atomic<int> wrong{0};

void expect(bool right, const char* what) {
    if (!right && wrong++ < 10) std::printf("wrong: %s\n", what);
}

void every_piece_once(int64_t count, int threads) {
    std::vector<int> taken(count, 0);  // not atomic: pieces are apart, and have been done when the call returns
    parallel_pieces(count, threads, [&](int64_t piece) { ++taken[piece]; });
    for (int times : taken) expect(times == 1, "a piece was not taken once");
}

void stretches_cover(int64_t count, int threads) {
    std::vector<int> covered(count, 0);
    parallel_ranges(count, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++covered[i];
    });
    for (int times : covered) expect(times == 1, "a number is not in exactly one range");
}

void exceptions_are_told(int threads) {
    std::atomic<int> begun{0};
    try {
        parallel_pieces(1000, threads, [&](int64_t piece) {
            ++begun;
            if (piece == 5) throw std::runtime_error("piece 5");
        });
        expect(false, "nothing was thrown");
    } catch (const std::runtime_error& error) {
        expect(std::string(error.what()) == "piece 5", "something else was thrown");
    }
    expect(begun >= 6, "pieces before were left out");
}

void calls_within_calls() {
    std::atomic<int> done{0};
    parallel_pieces(6, 3, [&](int64_t) { parallel_pieces(5, 2, [&](int64_t) { ++done; }); });
    expect(done == 30, "calls within calls");
}

}  // namespace

int main() {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([caller] {
            for (int round = 0; round < 300; ++round) {
                for (int threads : {1, 2, 4}) {
                    for (int64_t count : {0, 1, 2, 7, 100}) every_piece_once(count, threads), stretches_cover(count, threads);
                    exceptions_are_told(threads);
                }
                calls_within_calls();
                // About as long as helpers wait for work.
                if (round % 50 == caller) std::this_thread::sleep_for(std::chrono::microseconds(49'900 + round));
            }
        });
    }
    for (auto& caller : callers) caller.join();
    std::printf("pieces: %d wrong\n", wrong.load());
    return wrong ? 1 : 0;
}
