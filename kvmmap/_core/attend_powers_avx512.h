// Exponents and logarithms of 16 numbers, as exact as weights of 16 bits are worth, and what goes across 16 rows of numbers.
#pragma once

#include "attend_digits_avx512.h"

namespace kvmmap {
namespace {

// 1 / x to 2^-23 or so, for x within [2^-41, 2^41]; a division takes five times as long.
inline __m512 reciprocal(__m512 x) {
    const __m512 r = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2)));
}

// log2 of numbers in [2^-40, 1], to 3e-7: of the mantissa in [2/3, 4/3), by atanh's series.
inline __m512 logarithm(__m512 x) {
    const __m512 third = _mm512_mul_ps(x, _mm512_set1_ps(1.5f)), one = _mm512_set1_ps(1);
    const __m512 exponent = _mm512_getexp_ps(third), m = _mm512_scalef_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
    const __m512 t = _mm512_mul_ps(_mm512_sub_ps(m, one), reciprocal(_mm512_add_ps(m, one))), z = _mm512_mul_ps(t, t);
    constexpr float unit = 2.88539008177792681f;  // 2 / ln 2
    __m512 p = _mm512_set1_ps(unit / 9);
    for (const int n : {7, 5, 3, 1}) p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(unit / static_cast<float>(n)));
    return _mm512_fmadd_ps(p, t, exponent);
}

// 2^x times `unit`, a constant, to 2.6e-6 of the result.
inline __m512 power(__m512 x, float unit = 1.0f) {
    const __m512 f = _mm512_reduce_ps(x, 0x9);  // what is above the next lower whole number
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.013534171982586841f * unit), _mm512_set1_ps(0.05201146457510353f * unit));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2414427450315753f * unit));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6930038398500464f * unit));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000025928535303f * unit));
    return _mm512_scalef_ps(p, x);
}

// Scores of 16-bit queries beyond this are kept at it: their difference to the highest must be a number.
constexpr float most_score = 0x1p126f;

// The largest weight that two digits hold, and its logarithm.
constexpr float most_weight = 65535, log_most_weight = 15.9999779861f;

// Scales of values become logarithms to the largest of them, which is returned, and `inverses` 1 over what they are to it. What is
// 2^40 times smaller than the largest weighs nothing beside it, and counts as that. `count` is a multiple of 16.
inline float take_logarithms(float* scales, float* inverses, int64_t count) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) most = _mm512_max_ps(most, _mm512_load_ps(scales + j));
    const float largest = std::max(highest(most), 0x1p-126f);
    const __m512 unit = _mm512_set1_ps(1 / largest), least = _mm512_set1_ps(0x1p-40f);
    for (int64_t j = 0; j < count; j += 16) {
        const __m512 scale = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(scales + j), unit), least);
        _mm512_store_ps(inverses + j, reciprocal(scale));
        _mm512_store_ps(scales + j, logarithm(scale));
    }
    return largest;
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
