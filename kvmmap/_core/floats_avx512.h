// Rows of f32, f16 and bf16 as registers of 16 f32.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace kvmmap {
namespace {

template <Dtype D>
constexpr int64_t item_bytes = D == Dtype::f32 ? 4 : 2;

inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __mmask32 first32(int64_t n) { return (1u << n) - 1; }

// 16 numbers as f32; those outside of the mask are not read, and are zero.
template <Dtype D>
inline __m512 load(const char* p, __mmask16 mask = 0xffff) {
    if constexpr (D == Dtype::f32) {
        return _mm512_maskz_loadu_ps(mask, p);
    } else {
        const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
        if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
}

template <Dtype D>
inline void store(char* out, __m512 v, __mmask16 mask = 0xffff) {
    if constexpr (D == Dtype::f32) {
        _mm512_mask_storeu_ps(out, mask, v);
    } else if constexpr (D == Dtype::f16) {
        _mm256_mask_storeu_epi16(out, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
        // In integers, as half.h does it: the processor's own conversion flushes denormals.
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm256_mask_storeu_epi16(out, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}

}  // namespace
}  // namespace kvmmap
