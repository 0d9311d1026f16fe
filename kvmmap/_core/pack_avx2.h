// Whole numbers of 32 bits to bytes.
#pragma once

#include <immintrin.h>

namespace kvmmap {
namespace {

// 32 numbers' codes side by side. The packs work within 128-bit lanes; the permutation undoes that.
inline __m256i pack(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

}  // namespace
}  // namespace kvmmap
