// Rotated rows of 64, 128 and 256 numbers, which stay in registers while they are rotated and coded.
#pragma once

#include <immintrin.h>

#include "codec_rows.h"
#include "floats_avx512.h"
#include "levels_avx512.h"
#include "pack_avx512.h"
#include "planes_avx512.h"
#include "rotation.h"
#include "scales_avx512.h"

namespace kvmmap {
namespace {

inline __m512 added_whole(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// A batch of rows of R registers: their number known, they take 0.8 to 0.95 of the time of rows of any length.
template <int bits, int R, Dtype D>
class RotatedRows {
    static constexpr int64_t dim = 16 * R, bytes = 16 * item_bytes<D>, row_bytes = dim * item_bytes<D>;
    static constexpr int C = R / 4;

  public:
    static constexpr int64_t batch_of(int64_t) { return rows_at_once; }

    explicit RotatedRows(int64_t) {}

    int count() const { return scales_.count; }

    // Rotates `rows` rows and finds their scales. Returns the first one that is not finite, or `rows`.
    int rotate(const char* x, int64_t stride, int rows, const float* factors) {
        __m512 sizes[rows_at_once];
        for (int r = rows; r < rows_at_once; ++r) sizes[r] = _mm512_setzero_ps();
        for (int r = 0; r < rows; ++r) {
            const char* in = x + r * stride;
            fetch_half(x, stride, r);
            __m512 v[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) v[i] = _mm512_mul_ps(load<D>(in + i * bytes), _mm512_loadu_ps(factors + 16 * i));
            Hadamard<16>::transform(v);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) _mm512_store_ps(room_ + r * dim + 16 * i, v[i]);
            sizes[r] = BatchScales<bits>::with(_mm512_setzero_ps(), v);
        }
        return scales_.find(sizes, rows, dim);
    }

    // Codes the rows that were rotated; x are those that are rotated meanwhile. Returns the first one whose scale is beyond
    // f16, or their number.
    int code(const char* x, int64_t stride, char* codes, char* scales) {
        if constexpr (bits == 8) {
            scales_.put(scales);
            for (int r = 0; r < count(); ++r) {
                fetch_half(x, stride, rows_at_once + r);
                code_bytes_of(r, codes + r * dim);
            }
            return count();
        } else {
            __m512 products[rows_at_once], squares[rows_at_once];
            for (int r = count(); r < rows_at_once; ++r) products[r] = squares[r] = _mm512_setzero_ps();
            for (int r = 0; r < count(); ++r) {
                fetch_half(x, stride, rows_at_once + r);
                code_levels(r, codes + r * (dim / 8 * bits), products[r], squares[r]);
            }
            return scales_.put_fitted(products, _mm512_castps_si512(fold(squares, added_whole)), scales);
        }
    }

  private:
    alignas(64) float room_[rows_at_once * dim];
    BatchScales<bits> scales_;

    // The lines of the rows after the next batch, a half row at a time.
    [[gnu::always_inline]] static inline void fetch_half(const char* x, int64_t stride, int half) {
        fetch<row_bytes / 2>(x + (rows_at_once + half / 2) * stride + half % 2 * (row_bytes / 2));
    }

    [[gnu::always_inline]] inline __m512 number(int r, int i) const { return _mm512_load_ps(room_ + r * dim + 16 * i); }

    // Numbers of twice the size, truncated, are halves rounded away from zero in half units.
    [[gnu::always_inline]] inline void code_bytes_of(int r, char* out) const {
        const __m512 factor = _mm512_set1_ps(scales_.by[r]), divisor = _mm512_set1_ps(scales_.half_scale[r]);
        const auto twice = [&](int i) { return _mm512_cvttps_epi32(quotient(number(r, i), divisor, factor)); };
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const __m512i codes = pack_halved(twice(4 * c), twice(4 * c + 1), twice(4 * c + 2), twice(4 * c + 3));
            _mm512_storeu_si512(out + 64 * c, codes);
        }
    }

    [[gnu::always_inline]] inline void code_levels(int r, char* out, __m512& product, __m512& square) const {
        const __m512 factor = _mm512_set1_ps(scales_.by[r]);
        const auto twice = [&](int i) { return _mm512_cvttps_epi32(_mm512_mul_ps(number(r, i), factor)); };
        __m512i codes[C], squares = _mm512_setzero_si512();
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const Nearest found = nearest_level<bits>(_mm512_packs_epi32(twice(4 * c), twice(4 * c + 1)),
                                                      _mm512_packs_epi32(twice(4 * c + 2), twice(4 * c + 3)));
            codes[c] = side_by_side(found.code);
            const __m512i size = _mm512_abs_epi8(found.level);
            squares = _mm512_dpbusd_epi32(squares, size, size);
            // Levels times 2^24: bytes become the upper ones of whole numbers. Where that makes a product infinite, the scale
            // is far beyond f16 in any case.
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512 level = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(found.level, table(spreads.of[i])));
                sum = _mm512_add_ps(sum, _mm512_mul_ps(number(r, 4 * c + i), level));
            }
        }
        put_codes<bits, C>(codes, out);
        product = sum;
        square = _mm512_castsi512_ps(squares);
    }
};

}  // namespace
}  // namespace kvmmap
