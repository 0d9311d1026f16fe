// The scales of a batch of rotated rows, worked out together: a number a row in one register.
#pragma once

#include <immintrin.h>

#include "codec_rows.h"
#include "floats_avx512.h"

namespace kvmmap {
namespace {

constexpr int rows_at_once = 16;

// What op makes of the 16 numbers in each of 16 registers, those 8, 4, 2 and 1 apart in this order: a number a register.
template <class Op>
inline __m512 fold(const __m512 (&rows)[rows_at_once], Op&& op) {
    __m512 eight[8], four[4], two[2];
    for (int r = 0; r < 8; ++r)
        eight[r] = op(_mm512_shuffle_f32x4(rows[r], rows[r + 8], 0x44), _mm512_shuffle_f32x4(rows[r], rows[r + 8], 0xee));
    for (int r = 0; r < 4; ++r)
        four[r] = op(_mm512_shuffle_f32x4(eight[r], eight[r + 4], 0x88), _mm512_shuffle_f32x4(eight[r], eight[r + 4], 0xdd));
    for (int r = 0; r < 2; ++r)
        two[r] = op(_mm512_shuffle_ps(four[r], four[r + 2], 0x44), _mm512_shuffle_ps(four[r], four[r + 2], 0xee));
    const __m512 one = op(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), one);
}

inline __m512 added(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 larger(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// Prefetches `bytes`, or a line, line by line. Asked for out of the order in which they lie, or many at once, lines take up to
// twice as long. Possibly past the end of the rows, where a prefetch does nothing.
template <int64_t bytes>
[[gnu::always_inline]] inline void fetch(const char* from) {
    __builtin_prefetch(from, 0, 2);
#pragma GCC unroll 8
    for (int64_t i = 64; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// `bits` is 8 for int8.
template <int bits>
class BatchScales {
  public:
    static constexpr bool by_largest = bits == 8 || bits == 6;

    int count;                           // rows
    alignas(64) float by[rows_at_once];  // twice what numbers are multiplied by
    alignas(64) float half_scale[bits == 8 ? rows_at_once : 1];

    // Adds R registers of a row to what its scale is worked out from.
    template <int R>
    [[gnu::always_inline]] static inline __m512 with(__m512 size, const __m512 (&v)[R]) {
#pragma GCC unroll 16
        for (int i = 0; i < (by_largest ? 0 : R); ++i) size = _mm512_add_ps(size, _mm512_mul_ps(v[i], v[i]));
        // The larger of |a + b| and |a - b|, which is a NaN only if both are: where an infinity makes one of them a NaN, the
        // other one is infinite.
        if (by_largest && R == 1) size = larger(size, _mm512_abs_ps(v[0]));
#pragma GCC unroll 8
        for (int i = 0; i < (by_largest ? R / 2 : 0); ++i) size = larger(size, _mm512_range_ps(v[i], v[i + R / 2], larger_size));
        return size;
    }

    // From what `with` gave for `rows` rows of `dim` numbers. Returns the first row that is not finite, or `rows`.
    [[gnu::always_inline]] inline int find(const __m512 (&sizes)[rows_at_once], int rows, int64_t dim) {
        count = rows;
        __m512 size = by_largest ? fold(sizes, larger) : fold(sizes, added);
        if (!by_largest) size = _mm512_sqrt_ps(_mm512_div_ps(size, _mm512_set1_ps(static_cast<float>(dim))));
        const __m512i infinity = _mm512_set1_epi32(0x7f800000);
        if (const unsigned bad = _mm512_mask_cmpge_epu32_mask(first16(count), _mm512_castps_si512(size), infinity))
            return __builtin_ctz(bad);
        if constexpr (bits == 8) {
            scale_ = _mm512_max_ps(_mm512_div_ps(size, _mm512_set1_ps(127.0f)), _mm512_set1_ps(min_scale));
            const __m512 half = _mm512_mul_ps(scale_, _mm512_set1_ps(0.5f));
            _mm512_store_ps(half_scale, half);
            _mm512_store_ps(by, _mm512_div_ps(_mm512_set1_ps(1.0f), half));
        } else {
            constexpr float aim = bits == 6 ? 127.0f : levels_of<bits == 8 ? 6 : bits>.deviation;
            tiny_ = _mm512_cmplt_ps_mask(size, _mm512_set1_ps(least_size));
            _mm512_store_ps(by, _mm512_maskz_div_ps(static_cast<__mmask16>(~tiny_), _mm512_set1_ps(2 * aim), size));
        }
        return count;
    }

    // Writes the scales of int8.
    void put(char* scales) const { _mm512_mask_storeu_ps(scales, first16(count), scale_); }

    // Writes the scales of least squared error for levels. Returns the first row whose scale is beyond f16, or `count`.
    // Products are those of numbers and 2^24 times their levels.
    [[gnu::always_inline]] inline int put_fitted(const __m512 (&products)[rows_at_once], __m512i squares, char* scales) const {
        const __mmask16 rows = first16(count);
        const __m512 product = _mm512_mul_ps(fold(products, added), _mm512_set1_ps(0x1p-24f));
        const __m512 fitted = _mm512_maskz_div_ps(static_cast<__mmask16>(~tiny_), product, _mm512_cvtepi32_ps(squares));
        const __m256i halves = _mm512_cvtps_ph(fitted, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const unsigned bad = _mm256_mask_cmpge_epu16_mask(rows, halves, _mm256_set1_epi16(0x7c00));
        if (bad) return __builtin_ctz(bad);
        _mm256_mask_storeu_epi16(scales, rows, halves);
        return count;
    }

  private:
    static constexpr int larger_size = 0xb;  // of vrangeps: the one of larger size, as a positive number

    __m512 scale_;
    __mmask16 tiny_;
};

}  // namespace
}  // namespace kvmmap
