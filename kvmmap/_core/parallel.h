// Splitting one call's work over threads.
//
// Work is cut into more pieces than there are threads, and the next free thread takes the next one: a helper that starts late,
// or whose processor has something else to do, costs a call nothing but its help.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace kvmmap {

// Calls body(context, piece) once for every piece in [0, count), on the calling thread and on up to threads - 1 helpers,
// in any order. An exception ends the work, and is thrown here.
void run_pieces(int64_t count, int threads, void (*body)(void* context, int64_t piece), void* context);

// Has calls of the calling thread, from now on, use its team of an OpenMP runtime in place of helpers.
//
// `fork` is the address of that runtime's GOMP_parallel, and `threads` how many the team has, the caller among them; of
// fewer than two, or after a fork, there is no team.
void use_team(uintptr_t fork, int threads);

// run_pieces for anything that is called as body(piece).
template <class Body>
void parallel_pieces(int64_t count, int threads, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_pieces(
        count, threads, [](void* context, int64_t piece) { (*static_cast<Plain*>(context))(piece); },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// Pieces that work is cut into, for each thread that takes part.
constexpr int64_t pieces_each = 4;

// Calls body(begin, end) for even ranges of [0, count).
template <class Body>
void parallel_ranges(int64_t count, int threads, Body&& body) {
    const int64_t pieces = threads > 1 ? std::min<int64_t>(count, threads * pieces_each) : 1;
    auto bound = [=](int64_t piece) { return count / pieces * piece + count % pieces * piece / pieces; };
    parallel_pieces(pieces, threads, [&](int64_t piece) { body(bound(piece), bound(piece + 1)); });
}

}  // namespace kvmmap
