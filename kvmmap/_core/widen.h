// W numbers of a row, int8 codes or floats of 16 bits, to W floats. Intrinsics, because the compiler's own conversion of vectors goes by way of single numbers:
// GCC 12 makes 8 cvtsi2ss of the 8 that one vpmovsxbd and one vcvtdq2ps convert, and the same on AArch64.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "half.h"
#include "lanes.h"

namespace kvmmap {
namespace {

// Numbers of 16 bits, as they are stored.
struct F16 {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

template <int W>
inline typename Lanes<W>::F widen(const int8_t* codes) {
    float numbers[W];
    for (int i = 0; i < W; ++i) numbers[i] = codes[i];
    return Lanes<W>::load(numbers);
}

template <int W>
inline typename Lanes<W>::F widen(const F16* halves) {
    float numbers[W];
    for (int i = 0; i < W; ++i) numbers[i] = f16_to_f32(halves[i].bits);
    return Lanes<W>::load(numbers);
}

template <int W>
inline typename Lanes<W>::F widen(const Bf16* halves) {
    uint16_t bits[W];
    std::memcpy(bits, halves, sizeof bits);
    uint32_t wide[W];
    for (int i = 0; i < W; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
    typename Lanes<W>::F numbers;
    std::memcpy(&numbers, wide, sizeof numbers);
    return numbers;
}

#if defined(__x86_64__)

template <>
inline Lanes<4>::F widen<4>(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    const __m128i bytes = _mm_cvtsi32_si128(four);
    const __m128i twice = _mm_unpacklo_epi8(bytes, bytes);  // SSE2 has no sign extension: each byte four times, shifted
    return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
}

#if defined(__AVX2__)
template <>
inline Lanes<8>::F widen<8>(const int8_t* codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}
#endif

#if defined(__F16C__)
template <>
inline Lanes<8>::F widen<8>(const F16* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}
#endif

#if defined(__AVX512F__)
template <>
inline Lanes<16>::F widen<16>(const F16* halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

template <>
inline Lanes<16>::F widen<16>(const Bf16* halves) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <>
inline Lanes<16>::F widen<16>(const int8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
#endif

#elif defined(__aarch64__)

template <>
inline Lanes<4>::F widen<4>(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}

template <>
inline Lanes<4>::F widen<4>(const F16* halves) {
    uint16_t bits[4];
    std::memcpy(bits, halves, sizeof bits);
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits)));
}

#endif

// Numbers that are wide already.
template <int W>
inline typename Lanes<W>::F widen(const float* numbers) {
    return Lanes<W>::load(numbers);
}

}  // namespace
}  // namespace kvmmap
