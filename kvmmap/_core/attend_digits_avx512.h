// Numbers as bytes, for AVX-512's dot product of bytes (VNNI: vpdpbusd, 64 products an instruction).
//
// Keys and values are bytes already. Queries of f32 and their weights become whole numbers of 24 bits, split into three
// digits of 8: three byte products take 3/64 of an instruction a number, against 1/16 for a fused multiply-add on floats
// plus the widening, and are exact, so that the result is better than f32's (2^-23 of the largest query or weight is lost,
// and nothing in summing). Queries that were given in 16 bits, and their weights, become two digits, which lose 2^-15 of the
// largest: a hundredth of what rounding the queries to bf16 has lost.
//
// vpdpbusd multiplies unsigned by signed. Weights are never negative: their digits are the unsigned side. Queries have
// signed digits; there keys are the unsigned side, with 128 added, and a sum starts at -128 * (sum of digits) instead.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace kvmmap {
namespace {

// Queries become whole numbers within this, which is half a step less than so many signed digits hold.
template <int digits>
constexpr double query_unit = digits == 2 ? 127 * 256 : 127 * 65536;

// Bytes of a step: four numbers' low digits, their middle ones, their high ones, and room; or their low and their high ones.
template <int digits>
constexpr int64_t step_bytes = digits == 2 ? 8 : 16;

constexpr int64_t query_header = 64;     // bytes before the digits of a query: its Digits

constexpr int64_t to_64(int64_t n) { return (n + 63) / 64 * 64; }

// A row of numbers, as digits: what follows it, step by step.
struct Digits {
    float worth;       // of one unit
    int32_t start[3];  // what the sums of low, middle and high digits start at; of low and high ones, where there are two
};

// 16 whole numbers -> their digits, in steps: the bytes of four numbers are put in order of their weight.
template <int digits>
inline void store_digits(__m512i whole, char* out) {
    if constexpr (digits == 2) {
        const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
        _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(whole), order));
        return;
    }
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    _mm512_store_si512(out, _mm512_shuffle_epi8(whole, order));
}

[[gnu::always_inline]] inline void transpose_16(__m512i (&v)[16]) {  // 16 x 16 of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// vpdpbusd in place: sum += products of four unsigned and four signed bytes. From the intrinsic, GCC 12 copies every sum
// to another register and to the stack and back.
[[gnu::always_inline]] inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// The same four signed bytes for every lane.
[[gnu::always_inline]] inline void add_products(__m512i& sum, __m512i unsigned_bytes, const char* signed_bytes) {
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(unsigned_bytes), "m"(*reinterpret_cast<const char(*)[4]>(signed_bytes)));
}

inline __m512i four_bytes(const char* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}

inline __m512 put_together(__m512i low, __m512i high) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

inline __m512 put_together(__m512i low, __m512i middle, __m512i high) {
    const __m512 small = _mm512_fmadd_ps(_mm512_cvtepi32_ps(middle), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), small);
}

// Infinities become the largest numbers, as the product of one and a scale of zero is none; a NaN stays one.
inline __m512 within_floats(__m512 v) {
    constexpr float most = std::numeric_limits<float>::max();
    return _mm512_max_ps(_mm512_set1_ps(-most), _mm512_min_ps(_mm512_set1_ps(most), v));
}

inline float highest(__m512 v) { return _mm512_reduce_max_ps(v); }

inline __m512 load_some(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0, p);
}

// A query times `factor` becomes its Digits, and digits that pad it to a multiple of 64 numbers.
template <int digits>
inline void store_query(const float* query, int64_t dim, float factor, void* prepared) {
    auto* row = static_cast<Digits*>(prepared);
    char* out = static_cast<char*>(prepared) + query_header;
    __m512 sizes = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 16) sizes = _mm512_max_ps(sizes, _mm512_abs_ps(load_some(query + d, dim - d)));
    const double size = highest(sizes);
    // In double: queries are given as they are, and rounded once.
    const __m512d inverse = _mm512_set1_pd(size > 0 ? query_unit<digits> / size : 0);
    __m512i lows = _mm512_setzero_si512(), middles = lows, highs = lows;
    for (int64_t d = 0; d < to_64(dim); d += 16) {
        const __m512 x = load_some(query + d, dim - d);
        const __m256i first = _mm512_cvtpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), inverse));
        const __m256i second =
            _mm512_cvtpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)), inverse));
        const __m512i whole = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        // Each digit is a signed byte; what it is short of goes into the next.
        const __m512i half = _mm512_set1_epi32(128), byte = _mm512_set1_epi32(255);
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, half), 8);
        lows = _mm512_add_epi32(lows, _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24));
        if constexpr (digits == 2) {
            highs = _mm512_add_epi32(highs, upper);
            store_digits<2>(_mm512_or_si512(_mm512_and_si512(whole, byte), _mm512_slli_epi32(upper, 8)), out + d / 4 * step_bytes<2>);
            continue;
        }
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(upper, half), 8);
        middles = _mm512_add_epi32(middles, _mm512_srai_epi32(_mm512_slli_epi32(upper, 24), 24));
        highs = _mm512_add_epi32(highs, high);
        const __m512i low_bytes = _mm512_or_si512(_mm512_and_si512(whole, byte),
                                                  _mm512_slli_epi32(_mm512_and_si512(upper, byte), 8));
        store_digits<3>(_mm512_or_si512(low_bytes, _mm512_slli_epi32(high, 16)), out + d / 4 * step_bytes<3>);
    }
    // Bounded, so that a product of zero stays zero.
    row->worth = static_cast<float>(std::min(size / query_unit<digits> * factor, 3e38));
    row->start[0] = -128 * _mm512_reduce_add_epi32(lows);
    row->start[1] = -128 * _mm512_reduce_add_epi32(digits == 2 ? highs : middles);
    row->start[2] = digits == 2 ? 0 : -128 * _mm512_reduce_add_epi32(highs);
}

constexpr int least_exponent = -100;  // what is smaller is nothing beside any sum

// x < 2^exponent_of(x)
inline int exponent_of(float x) { return (_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(x))) >> 23 & 0xff) - 126; }

inline float power_of_two(int exponent) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((exponent + 127) << 23)));
}

// Weights, none below 0, become digits, which may take their place; returns what one unit is worth. The largest becomes
// a number of as many bits as the digits have, by a power of two: with three digits that is its own 24 bits, and there is
// nothing to divide by. `count` is a multiple of 16.
template <int digits>
inline float store_weights(const float* weights, int64_t count, float largest, char* out) {
    constexpr int bits = 8 * digits;
    const int exponent = std::max(exponent_of(largest), least_exponent);
    const __m512 factor = _mm512_set1_ps(power_of_two(bits - exponent));
    for (int64_t j = 0; j < count; j += 16, out += 4 * step_bytes<digits>) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(weights + j), factor));
        // Two digits have fewer bits than a weight, and the largest may be rounded up beyond them.
        if constexpr (digits == 2) whole = _mm512_min_epi32(whole, _mm512_set1_epi32(65535));
        store_digits<digits>(whole, out);
    }
    return power_of_two(exponent - bits);
}

template <int digits>
inline float store_weights(const float* weights, int64_t count, char* out) {
    __m512 most = _mm512_load_ps(weights);
    for (int64_t j = 16; j < count; j += 16) most = _mm512_max_ps(most, _mm512_load_ps(weights + j));
    return store_weights<digits>(weights, count, highest(most), out);
}

}  // namespace
}  // namespace kvmmap
