// Whole numbers and quotients to bytes.
#pragma once

#include <immintrin.h>

namespace kvmmap {
namespace {

// Packs work within 128-bit lanes; this undoes that for 32 numbers of four registers.
inline __m256i side_by_side(__m256i packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 32 numbers' codes side by side.
inline __m256i pack(__m256i a, __m256i b, __m256i c, __m256i d) {
    return side_by_side(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
}

// As in pack_avx512.h.
inline __m256 quotient(__m256 x, __m256 divisor, __m256 reciprocal) {
    const __m256 near = _mm256_mul_ps(x, reciprocal);
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(near, divisor, x), reciprocal, near);
}

// The codes of 32 numbers, of which a to d are trunc(2q), side by side.
inline __m256i pack_halved(__m256i a, __m256i b, __m256i c, __m256i d) {
    const auto halved = [](__m256i twice) {
        const __m256i away = _mm256_add_epi16(twice, _mm256_srai_epi16(twice, 15));
        return _mm256_mulhrs_epi16(away, _mm256_set1_epi16(0x4000));
    };
    return side_by_side(_mm256_packs_epi16(halved(_mm256_packs_epi32(a, b)), halved(_mm256_packs_epi32(c, d))));
}

}  // namespace
}  // namespace kvmmap
