// Packed codes of 64, 128 or 256 numbers, C registers of 64 bytes, to and from their planes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "levels_avx512.h"

namespace kvmmap {
namespace {

inline __m256i low_half(__m512i v) { return _mm512_castsi512_si256(v); }
inline __m256i high_half(__m512i v) { return _mm512_extracti64x4_epi64(v, 1); }
inline __m512i above(__m512i codes, int bits) { return _mm512_slli_epi16(codes, bits); }

// A plane of four bits of 64 * C codes; they are below 16.
template <int C>
inline void put_four_bits(const __m512i (&codes)[C], char* out) {
    if constexpr (C == 1)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(low_half(codes[0]),
                                                                             _mm256_slli_epi16(high_half(codes[0]), 4)));
    for (int c = 0; c < C / 2; ++c)
        _mm512_storeu_si512(out + 64 * c, _mm512_or_si512(codes[c], above(codes[c + C / 2], 4)));
}

// A plane of two bits; codes are below 4.
template <int C>
inline void put_two_bits(const __m512i (&codes)[C], char* out) {
    if constexpr (C == 4) {
        const __m512i low = _mm512_or_si512(codes[0], above(codes[1], 2));
        _mm512_storeu_si512(out, _mm512_or_si512(low, above(_mm512_or_si512(codes[2], above(codes[3], 2)), 4)));
    } else if constexpr (C == 2) {
        const __m512i pairs = _mm512_or_si512(codes[0], above(codes[1], 4));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                            _mm256_or_si256(low_half(pairs), _mm256_slli_epi16(high_half(pairs), 2)));
    } else {
        const __m256i pairs = _mm256_or_si256(low_half(codes[0]), _mm256_slli_epi16(high_half(codes[0]), 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         _mm_or_si128(_mm256_castsi256_si128(pairs), _mm_slli_epi16(_mm256_extracti128_si256(pairs, 1), 2)));
    }
}

template <int bits, int C>
[[gnu::always_inline]] inline void put_codes(const __m512i (&codes)[C], char* out) {
    constexpr int64_t dim = 64 * C;
    __m512i low[C], high[C];
    for (int c = 0; c < C; ++c) {
        low[c] = bits == 4 ? codes[c] : field<0>(codes[c], bits == 3 ? 3 : 15);
        if (bits == 6) high[c] = field<4>(codes[c], 3);
    }
    if constexpr (bits == 3) put_two_bits<C>(low, out);
    else put_four_bits<C>(low, out);
    if constexpr (bits == 6) put_two_bits<C>(high, out + dim / 2);
    if constexpr (bits == 3 || bits == 5)
        for (int c = 0; c < C; ++c) {
            const uint64_t plane = _mm512_test_epi8_mask(codes[c], _mm512_set1_epi8(1 << (bits - 1)));
            std::memcpy(out + dim * (bits == 3 ? 2 : 4) / 8 + 8 * c, &plane, 8);
        }
}

// The reverse of put_four_bits.
template <int C>
[[gnu::always_inline]] inline void take_four_bits(const char* in, __m512i (&codes)[C]) {
    if constexpr (C == 1) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
        const __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
        codes[0] = field<0>(wide, 15);
    }
#pragma GCC unroll 2
    for (int c = 0; c < C / 2; ++c) {
        const __m512i both = _mm512_loadu_si512(in + 64 * c);
        codes[c] = field<0>(both, 15);
        codes[c + C / 2] = field<4>(both, 15);
    }
}

template <int C>
[[gnu::always_inline]] inline void take_two_bits(const char* in, __m512i (&codes)[C]) {
    if constexpr (C == 4) {
        const __m512i all = _mm512_loadu_si512(in);
        codes[0] = field<0>(all, 3);
        codes[1] = field<2>(all, 3);
        codes[2] = field<4>(all, 3);
        codes[3] = field<6>(all, 3);
    } else if constexpr (C == 2) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
        const __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(all), _mm256_srli_epi16(all, 2), 1);
        codes[0] = field<0>(wide, 3);
        codes[1] = field<4>(wide, 3);
    } else {
        const __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
        const __m512i by = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);  // bits of a byte's neighbour are masked out
        codes[0] = _mm512_and_si512(_mm512_srlv_epi64(wide, by), _mm512_set1_epi8(3));
    }
}

// Packed codes to the int8 values of the table.
template <int bits, int C>
[[gnu::always_inline]] inline void take_levels(const char* in, __m512i (&levels)[C]) {
    constexpr int64_t dim = 64 * C;
    static constexpr Register first = level_register<bits>(0), second = level_register<bits>(16);
    __m512i low[C], high[C];
    if constexpr (bits == 3) take_two_bits<C>(in, low);
    else take_four_bits<C>(in, low);
    if constexpr (bits == 6) take_two_bits<C>(in + dim / 2, high);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        __mmask64 plane = 0;
        if constexpr (bits == 3 || bits == 5) std::memcpy(&plane, in + dim * (bits == 3 ? 2 : 4) / 8 + 8 * c, 8);
        if constexpr (bits == 3) low[c] = _mm512_or_si512(low[c], _mm512_maskz_set1_epi8(plane, 4));
        if constexpr (bits == 6) {
            const __m512i code = _mm512_or_si512(low[c], _mm512_slli_epi16(high[c], 4));
            levels[c] = _mm512_sub_epi8(_mm512_slli_epi16(code, 2), _mm512_set1_epi8(126));
        } else {
            levels[c] = _mm512_shuffle_epi8(table(first), low[c]);
            if constexpr (bits == 5) levels[c] = _mm512_mask_shuffle_epi8(levels[c], plane, table(second), low[c]);
        }
    }
}

}  // namespace
}  // namespace kvmmap
