// Codes of a row to and from the planes that they are packed in: of 64, 128 or 256 numbers in C registers of 64 bytes, of other
// numbers by way of memory.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

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

// The bits of `mask` from a, the others from b.
inline __m512i chosen(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xca);
}

// A row of codes of any length, a byte each, to its planes.
template <int bits>
[[gnu::always_inline]] inline void put_row(const char* codes, int64_t dim, char* out) {
    const int64_t half = dim / 2, quarter = dim / 4;
    const auto take = [&](int64_t i, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, codes + i); };
    if constexpr (bits != 3)
        for (int64_t j = 0; j < half; j += 64) {
            const __mmask64 mask = first_64(half - j);
            _mm512_mask_storeu_epi8(out + j, mask, chosen(0x0f, take(j, mask), above(take(j + half, mask), 4)));
        }
    if constexpr (bits == 3 || bits == 6) {
        char* plane = bits == 3 ? out : out + half;
        // Bits 4 and 5 of codes of six bits. What a shift brings from a byte's neighbour is not chosen.
        const auto at = [](__m512i v, int place) __attribute__((always_inline)) {
            const int shift = bits == 3 ? place : place - 4;
            return shift < 0 ? _mm512_srli_epi16(v, -shift) : _mm512_slli_epi16(v, shift);
        };
        for (int64_t j = 0; j < quarter; j += 64) {
            const __mmask64 mask = first_64(quarter - j);
            const __m512i two = chosen(0x03, at(take(j, mask), 0), at(take(j + quarter, mask), 2));
            const __m512i three = chosen(0x0f, two, at(take(j + 2 * quarter, mask), 4));
            _mm512_mask_storeu_epi8(plane + j, mask, chosen(0x3f, three, at(take(j + 3 * quarter, mask), 6)));
        }
    }
    if constexpr (bits == 3 || bits == 5) {
        char* plane = bits == 3 ? out + quarter : out + half;
        for (int64_t j = 0; j < dim; j += 64) {
            const __mmask64 mask = first_64(dim - j);
            const uint64_t single = _mm512_test_epi8_mask(take(j, mask), _mm512_set1_epi8(1 << (bits - 1)));
            const __mmask16 some = static_cast<__mmask16>(first_64((dim - j) / 8) & 0xff);
            _mm_mask_storeu_epi8(plane + j / 8, some, _mm_cvtsi64_si128(static_cast<int64_t>(single)));
        }
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

// The bits of n numbers from i on, or 64, in a plane of single bits that has `count`.
inline __mmask64 bits_at(const char* plane, int64_t i, int64_t n, int64_t count) {
    const int64_t first = i / 8, behind = (i + std::min<int64_t>(n, 64) + 7) / 8;
    const __mmask16 within = static_cast<__mmask16>(first_64(std::min(behind, count / 8) - first));
    const __m128i bytes = _mm_maskz_loadu_epi8(within, plane + first);
    const uint64_t low = static_cast<uint64_t>(_mm_cvtsi128_si64(bytes)), shift = static_cast<uint64_t>(i % 8);
    if (!shift) return low;
    return low >> shift | static_cast<uint64_t>(_mm_extract_epi64(bytes, 1)) << (64 - shift);
}

// A row of packed codes of any length to the int8 values of the table.
template <int bits>
[[gnu::always_inline]] inline void take_row(const char* codes, int64_t dim, int8_t* out) {
    static constexpr Register first = level_register<bits>(0), second = level_register<bits>(16);
    const int64_t half = dim / 2, quarter = dim / 4;
    // Numbers from i on, with the lower bits of their codes, and for 6 bits with the upper ones.
    const auto put = [&](int64_t i, int64_t n, __m512i low, __m512i upper) __attribute__((always_inline)) {
        __m512i found;
        if constexpr (bits == 6) {
            const __m512i code = _mm512_or_si512(low, above(upper, 4));
            found = _mm512_sub_epi8(_mm512_slli_epi16(code, 2), _mm512_set1_epi8(126));
        } else {
            if constexpr (bits == 3)
                low = _mm512_or_si512(low, _mm512_maskz_set1_epi8(bits_at(codes + quarter, i, n, dim), 4));
            found = _mm512_shuffle_epi8(table(first), low);
            if constexpr (bits == 5)
                found = _mm512_mask_shuffle_epi8(found, bits_at(codes + half, i, n, dim), table(second), low);
        }
        _mm512_mask_storeu_epi8(out + i, first_64(n), found);
    };
    if constexpr (bits == 3) {
        for (int64_t j = 0; j < quarter; j += 64) {
            const int64_t n = quarter - j;
            const __m512i four = _mm512_maskz_loadu_epi8(first_64(n), codes + j);
            put(j, n, field<0>(four, 3), four);
            put(j + quarter, n, field<2>(four, 3), four);
            put(j + half, n, field<4>(four, 3), four);
            put(j + half + quarter, n, field<6>(four, 3), four);
        }
    } else {
        const int64_t step = bits == 6 ? quarter : half;
        for (int64_t j = 0; j < step; j += 64) {
            const int64_t n = step - j;
            const __m512i two = _mm512_maskz_loadu_epi8(first_64(n), codes + j);
            const __m512i upper = bits == 6 ? _mm512_maskz_loadu_epi8(first_64(n), codes + half + j) : two;
            put(j, n, field<0>(two, 15), field<0>(upper, 3));
            put(j + half, n, field<4>(two, 15), field<4>(upper, 3));
            if constexpr (bits == 6) {
                const __m512i more = _mm512_maskz_loadu_epi8(first_64(n), codes + quarter + j);
                put(j + quarter, n, field<0>(more, 15), field<2>(upper, 3));
                put(j + half + quarter, n, field<4>(more, 15), field<6>(upper, 3));
            }
        }
    }
}

// Rows of packed codes to the int8 values of the table.
template <int bits>
void take_rows(const char* codes, int64_t n, int64_t dim, int8_t* out) {
    const auto in_registers = [&](auto count) {
        constexpr int C = count();
        __m512i levels[C];
        take_levels<bits>(codes, levels);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) _mm512_storeu_si512(out + 64 * c, levels[c]);
    };
    for (const int8_t* end = out + n * dim; out < end; out += dim, codes += dim / 8 * bits) {
        if (dim == 128) in_registers(std::integral_constant<int, 2>{});
        else if (dim == 64) in_registers(std::integral_constant<int, 1>{});
        else if (dim == 256) in_registers(std::integral_constant<int, 4>{});
        else take_row<bits>(codes, dim, out);
    }
}

}  // namespace
}  // namespace kvmmap
