// The rotation of a row, block by block in registers of 16 numbers.
#pragma once

#include <immintrin.h>

#include "floats_avx512.h"
#include "rotation.h"

namespace kvmmap {
namespace {

// The transform of blocks shorter than a register, side by side in one: those of 8, 4 and 2 numbers that the binary digits of
// `count` say.
[[gnu::always_inline]] inline __m512 transform_short(__m512 v, int count) {
    const auto stage = [&](__m512 partner, int lanes, int upper) {
        const __m512 sign = _mm512_mask_blend_ps(static_cast<__mmask16>(upper), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
        return _mm512_mask_fmadd_ps(v, first16(lanes), sign, partner);
    };
    v = stage(_mm512_permute_ps(v, 0xb1), count, 0xaaaa);
    v = stage(_mm512_permute_ps(v, 0x4e), count & 12, 0xcccc);
    return stage(_mm512_shuffle_f32x4(v, v, 0xb1), count & 8, 0xf0f0);
}

// Transforms `rows` rows of `dim` numbers, a block of all rows after another. source(row, i, mask) gives numbers 16 * i and up of
// a row; sink(row, i, v, mask) takes as many registers as v has. `room` holds the largest block, if it is larger than 16
// registers.
template <class Source, class Sink>
[[gnu::always_inline]] inline void transform_rows(int64_t dim, int rows, float* room, Source&& source, Sink&& sink) {
    constexpr __mmask16 all = 0xffff;
    const auto block = [&](int64_t first, auto count) __attribute__((always_inline)) {
        constexpr int R = count();
        for (int row = 0; row < rows; ++row) {
            __m512 v[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) v[i] = source(row, first + i, all);
            Hadamard<16>::transform(v);
            sink(row, first, v, all);
        }
    };
    const auto long_block = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        for (int row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < count; ++i) _mm512_storeu_ps(room + 16 * i, source(row, first + i, all));
            Hadamard<16>::run(room, 16 * count);
            for (int64_t i = 0; i < count; ++i) {
                const __m512 v[1] = {_mm512_loadu_ps(room + 16 * i)};
                sink(row, first + i, v, all);
            }
        }
    };
    for (int64_t first = 0, rest = dim / 16; rest;) {
        const int64_t registers = int64_t{1} << (63 - __builtin_clzll(static_cast<uint64_t>(rest)));
        switch (registers) {
            case 1: block(first, std::integral_constant<int, 1>{}); break;
            case 2: block(first, std::integral_constant<int, 2>{}); break;
            case 4: block(first, std::integral_constant<int, 4>{}); break;
            case 8: block(first, std::integral_constant<int, 8>{}); break;
            case 16: block(first, std::integral_constant<int, 16>{}); break;
            default: long_block(first, registers);
        }
        first += registers;
        rest -= registers;
    }
    if (const int count = static_cast<int>(dim % 16)) {
        const __mmask16 mask = first16(count);
        for (int row = 0; row < rows; ++row) {
            const __m512 v[1] = {transform_short(source(row, dim / 16, mask), count)};
            sink(row, dim / 16, v, mask);
        }
    }
}

}  // namespace
}  // namespace kvmmap
