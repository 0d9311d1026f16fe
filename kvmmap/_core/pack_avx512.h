// Whole numbers of 32 bits to bytes.
#pragma once

#include <immintrin.h>

namespace kvmmap {
namespace {

// Packs work within 128-bit lanes; this undoes that for 64 numbers of four registers.
inline __m512i side_by_side(__m512i packed) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, packed);
}

// 64 numbers' codes side by side.
inline __m512i pack(__m512i a, __m512i b, __m512i c, __m512i d) {
    return side_by_side(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}

}  // namespace
}  // namespace kvmmap
