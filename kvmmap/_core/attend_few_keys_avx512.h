// Products of one row of queries and 16 keys of 4 or 5 bits, four keys at a time.
//
// Interleaving four keys takes two levels of unpacking, where all 16 take four. A register then has four numbers of each of four
// keys in each of its quarters, other numbers in each: quarters are summed in the end. Bytes are interleaved before they are
// looked up, half as many. Every group of keys takes its shuffles beside its products, so that both of the processor's ports for
// 64 bytes are busy: interleaving 16 keys before the first product took 1.4 times as long.
#pragma once

#include "attend_products_avx512.h"

namespace kvmmap {
namespace {

// A query as multiply_halves wants it: its header, then [64 bytes of a row][lower or upper halves][one of four registers][digit],
// each of them 64 bytes: for each quarter four times the digits of the numbers that the register has there.
template <int digits>
constexpr int64_t spread_bytes(int64_t dim) { return query_header + 4 * digits * dim; }

template <int digits>
void spread_query(const char* query, int64_t dim, char* out) {
    std::memcpy(out, query, sizeof(Digits));
    query += query_header, out += query_header;
    const int64_t half = dim / 8 * step_bytes<digits>;
    for (int64_t d = 0; d < dim / 2; d += 64, query += 16 * step_bytes<digits>)
        for (const char* from : {query, query + half})
            for (int64_t i = 0; i < 4; ++i)
                for (int64_t digit = 0; digit < digits; ++digit, out += 64)
                    for (int64_t q = 0; q < 4; ++q)
                        _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * q),
                                        _mm512_castsi512_si128(four_bytes(from + (4 * q + i) * step_bytes<digits> + 4 * digit)));
}

// Sums over four keys, quarter by quarter.
template <int digits>
struct FourSums {
    static constexpr bool three = digits == 3;
    __m512i low, middle, high;

    [[gnu::always_inline]] explicit FourSums(const Digits& row)
        : low(once(row.start[0])), middle(once(row.start[1])), high(once(row.start[digits - 1])) {}
    [[gnu::always_inline]] static __m512i once(int32_t start) { return _mm512_maskz_set1_epi32(0x000f, start); }

    [[gnu::always_inline]] void add(__m512i keys, const char* step) {
        add_64(low, keys, step);
        if constexpr (three) add_64(middle, keys, step + 64);
        add_64(high, keys, step + 64 * (digits - 1));
    }
    // As add_products, from memory: that is one instruction.
    [[gnu::always_inline]] static void add_64(__m512i& sum, __m512i unsigned_bytes, const char* signed_bytes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "m"(*reinterpret_cast<const char(*)[64]>(signed_bytes)));
    }
};

// Fifth bits of four keys' 128 codes: lane l has 16 of key l % 4 in the lower halves, from 16 (l / 4) on, and as many in the upper
// ones. Those of the lower halves start at `plane`, of the upper ones `apart` bytes behind.
[[gnu::always_inline]] inline __m512i fifth_bits(const char* plane, int64_t stride, int64_t apart) {
    const auto both = [&](int64_t i) __attribute__((always_inline)) {
        const char* p = plane + i * stride;
        if (apart == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), reinterpret_cast<const double*>(p + apart)));
    };
    __m512i all = _mm512_castsi128_si512(both(0));
    all = _mm512_inserti32x4(all, both(1), 1);
    all = _mm512_inserti32x4(all, both(2), 2);
    all = _mm512_inserti32x4(all, both(3), 3);
    const __m512i order = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2,
                                           29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    return _mm512_permutexvar_epi16(order, all);
}

template <int digits, int bits>
[[gnu::always_inline]] inline FourSums<digits> multiply_four(const LevelTable<bits, true>& table, const char* keys, int64_t stride,
                                                             int64_t dim, const char* query) {
    constexpr int64_t step = 64 * digits;
    const int64_t half = dim / 2;
    FourSums<digits> sums(*reinterpret_cast<const Digits*>(query));
    query += query_header;
    for (int64_t d = 0; d < half; d += 64, query += 8 * step) {
        const char* p = keys + d;
        const __m512i v0 = _mm512_loadu_si512(p), v1 = _mm512_loadu_si512(p + stride);
        const __m512i v2 = _mm512_loadu_si512(p + 2 * stride), v3 = _mm512_loadu_si512(p + 3 * stride);
        const __m512i a = _mm512_unpacklo_epi32(v0, v1), b = _mm512_unpackhi_epi32(v0, v1);
        const __m512i c = _mm512_unpacklo_epi32(v2, v3), e = _mm512_unpackhi_epi32(v2, v3);
        const __m512i v[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, e),
                              _mm512_unpackhi_epi64(b, e)};
        if constexpr (bits == 5) {
            const __m512i fifth = fifth_bits(keys + half + d / 8, stride, half / 8);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                sums.add(table.lower(v[i], table.from_lanes(fifth, i)), query + i * step);
                sums.add(table.upper(v[i], table.from_lanes(fifth, 4 + i)), query + (4 + i) * step);
            }
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                sums.add(table.lower(v[i]), query + i * step);
                sums.add(table.upper(v[i]), query + (4 + i) * step);
            }
        }
    }
    return sums;
}

// Lane l: lanes l % 4 of the quarters of register l / 4, summed.
[[gnu::always_inline]] inline __m512i sum_quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
    const auto halves = [](__m512i x, __m512i y) __attribute__((always_inline)) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
    };
    return halves(halves(a, b), halves(c, d));
}

// Of a multiple of 128 numbers.
template <int digits, int bits>
void multiply_halves(const char* keys, int64_t stride, int64_t dim, const char* query, float* out) {
    const LevelTable<bits, true> table;
    const auto run = [&](int64_t all) __attribute__((always_inline)) {
        const auto four = [&](int64_t i) __attribute__((always_inline)) {
            return multiply_four<digits, bits>(table, keys + i * stride, stride, all, query);
        };
        const FourSums<digits> a = four(0), b = four(4), c = four(8), d = four(12);
        const __m512i low = sum_quarters(a.low, b.low, c.low, d.low), high = sum_quarters(a.high, b.high, c.high, d.high);
        const __m512 worth = _mm512_set1_ps(reinterpret_cast<const Digits*>(query)->worth);
        if constexpr (digits == 3) {
            const __m512i middle = sum_quarters(a.middle, b.middle, c.middle, d.middle);
            _mm512_store_ps(out, _mm512_mul_ps(put_together(low, middle, high), worth));
        } else {
            _mm512_store_ps(out, _mm512_mul_ps(put_together(low, high), worth));
        }
    };
    dim == 128 ? run(128) : run(dim);
}

}  // namespace
}  // namespace kvmmap
