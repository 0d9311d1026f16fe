// Exponents and logarithms of 16 numbers, as exact as weights of 16 bits are worth, and what goes across 16 rows of numbers.
#pragma once

#include "attend_digits_avx512.h"

namespace kvmmap {
namespace {

// log2 of numbers in [2^-40, 1], to 3e-7: of the mantissa in [2/3, 4/3), by atanh's series.
inline __m512 logarithm(__m512 x) {
    const __m512 third = _mm512_mul_ps(x, _mm512_set1_ps(1.5f)), one = _mm512_set1_ps(1);
    const __m512 exponent = _mm512_getexp_ps(third), m = _mm512_scalef_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
    const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), z = _mm512_mul_ps(t, t);
    constexpr float unit = 2.88539008177792681f;  // 2 / ln 2
    __m512 p = _mm512_set1_ps(unit / 9);
    for (const int n : {7, 5, 3, 1}) p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(unit / static_cast<float>(n)));
    return _mm512_fmadd_ps(p, t, exponent);
}

// 2^x, to 2.6e-6 of the result.
inline __m512 power(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, 0x9);  // what is above the next lower whole number
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.013534171982586841f), _mm512_set1_ps(0.05201146457510353f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2414427450315753f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6930038398500464f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000025928535303f));
    return _mm512_scalef_ps(p, x);
}

// Lane r: row r's lanes, put together.
template <class Together>
inline __m512 across(const __m512 (&rows)[16], Together&& together) {
    __m512i v[16];
    for (int64_t r = 0; r < 16; ++r) v[r] = _mm512_castps_si512(rows[r]);
    transpose_16(v);
    __m512 all = _mm512_castsi512_ps(v[0]);
    for (int64_t i = 1; i < 16; ++i) all = together(all, _mm512_castsi512_ps(v[i]));
    return all;
}

}  // namespace
}  // namespace kvmmap
