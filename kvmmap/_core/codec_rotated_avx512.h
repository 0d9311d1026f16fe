// Rotated rows of 64, 128 and 256 numbers: encoded and decoded in one walk, in which a row stays in registers while it is
// rotated. 16 rows are taken at a time: their scales are worked out together, a number a row in one register.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "codec_rows.h"
#include "floats_avx512.h"
#include "levels_avx512.h"
#include "pack_avx512.h"
#include "planes_avx512.h"
#include "rotation.h"

namespace kvmmap {
namespace {

constexpr int rows_at_once = 16;

inline bool in_registers(int64_t dim) { return dim == 64 || dim == 128 || dim == 256; }

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
inline __m512 added_whole(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// x / scale as IEEE division rounds it, where that decides a code: the product with the reciprocal, corrected by what it
// leaves (Markstein, 1990), in a tenth of the time. The two differed nowhere in 6e8 quotients within 8 ulp of a half.
inline __m512 quotient(__m512 x, __m512 scale, __m512 reciprocal) {
    const __m512 near = _mm512_mul_ps(x, reciprocal);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(near, scale, x), reciprocal, near);
}

// A batch of rows of R registers. The two ports for 512 bits limit the speed, so that every operation counts: some 160 a row of
// 128 numbers for int8, 190 to 210 for 3 to 6 bits. The scales of a batch wait for a root and a quotient, some hundred cycles
// in which the processor codes the batch before. `bits` is 8 for int8.
template <int bits, int R, Dtype D>
class RotatedRows {
    static constexpr int64_t dim = 16 * R, bytes = 16 * item_bytes<D>, row_bytes = dim * item_bytes<D>;
    static constexpr int C = R / 4;
    static constexpr bool by_largest = bits == 8 || bits == 6;

  public:
    // Rotates `count` rows and finds their scales. Returns the first one that is not finite, or `count`.
    int rotate(const char* x, int64_t stride, int rows, const float* factors) {
        count = rows;
        __m512 sizes[rows_at_once] = {};
        for (int r = 0; r < count; ++r) {
            const char* in = x + r * stride;
            fetch(x, stride, r);
            __m512 v[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) v[i] = _mm512_mul_ps(load<D>(in + i * bytes), _mm512_loadu_ps(factors + 16 * i));
            Hadamard<16>::transform(v);
            __m512 size = _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) {
                _mm512_store_ps(room + r * dim + 16 * i, v[i]);
                if (!by_largest) size = _mm512_add_ps(size, _mm512_mul_ps(v[i], v[i]));
            }
            // The larger of |a + b| and |a - b|, which is a NaN only if both are: where an infinity makes one of them a NaN,
            // the other one is infinite.
            if (by_largest)
#pragma GCC unroll 8
                for (int i = 0; i < R / 2; ++i) size = larger(size, _mm512_range_ps(v[i], v[i + R / 2], larger_size));
            sizes[r] = size;
        }
        __m512 size = by_largest ? fold(sizes, larger) : fold(sizes, added);
        if (!by_largest) size = _mm512_sqrt_ps(_mm512_div_ps(size, _mm512_set1_ps(static_cast<float>(dim))));
        const __m512i infinity = _mm512_set1_epi32(0x7f800000);
        if (const unsigned bad = _mm512_mask_cmpge_epu32_mask(first16(count), _mm512_castps_si512(size), infinity))
            return __builtin_ctz(bad);
        if constexpr (bits == 8) {
            scale = _mm512_max_ps(_mm512_div_ps(size, _mm512_set1_ps(127.0f)), _mm512_set1_ps(min_scale));
            const __m512 half = _mm512_mul_ps(scale, _mm512_set1_ps(0.5f));
            _mm512_store_ps(half_scale, half);
            _mm512_store_ps(by, _mm512_div_ps(_mm512_set1_ps(1.0f), half));
        } else {
            constexpr float aim = bits == 6 ? 127.0f : levels_of<bits == 8 ? 6 : bits>.deviation;
            tiny = _mm512_cmplt_ps_mask(size, _mm512_set1_ps(least_size));
            _mm512_store_ps(by, _mm512_maskz_div_ps(static_cast<__mmask16>(~tiny), _mm512_set1_ps(2 * aim), size));
        }
        return count;
    }

    // Codes the rows that were rotated; x are those that are rotated meanwhile. Returns the first one whose scale is beyond
    // f16, or `count`.
    int code(const char* x, int64_t stride, char* codes, char* scales) {
        const __mmask16 rows = first16(count);
        if constexpr (bits == 8) {
            _mm512_mask_storeu_ps(scales, rows, scale);
            for (int r = 0; r < count; ++r) {
                fetch(x, stride, rows_at_once + r);
                code_bytes_of(r, codes + r * dim);
            }
        } else {
            __m512 products[rows_at_once] = {}, squares[rows_at_once] = {};
            for (int r = 0; r < count; ++r) {
                fetch(x, stride, rows_at_once + r);
                code_levels(r, codes + r * (dim / 8 * bits), products[r], squares[r]);
            }
            const __m512 square = _mm512_cvtepi32_ps(_mm512_castps_si512(fold(squares, added_whole)));
            const __m512 product = _mm512_mul_ps(fold(products, added), _mm512_set1_ps(0x1p-24f));
            const __m512 fitted = _mm512_maskz_div_ps(static_cast<__mmask16>(~tiny), product, square);
            const __m256i halves = _mm512_cvtps_ph(fitted, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            const unsigned bad = _mm256_mask_cmpge_epu16_mask(rows, halves, _mm256_set1_epi16(0x7c00));
            if (bad) return __builtin_ctz(bad);
            _mm256_mask_storeu_epi16(scales, rows, halves);
        }
        return count;
    }

  private:
    static constexpr int larger_size = 0xb;  // of vrangeps: the one of larger size, as a positive number

    alignas(64) float room[rows_at_once * dim];
    alignas(64) float by[rows_at_once], half_scale[rows_at_once];  // twice what numbers are multiplied by
    __m512 scale;
    __mmask16 tiny;
    int count;

    // The lines of the rows after the next batch, a half row at a time and in the order in which they lie: out of order, or
    // many at once, takes up to twice as long. Possibly past the end, where a prefetch does nothing.
    [[gnu::always_inline]] static inline void fetch(const char* x, int64_t stride, int half) {
        const char* from = x + (rows_at_once + half / 2) * stride + half % 2 * (row_bytes / 2);
#pragma GCC unroll 8
        for (int64_t i = 0; i < row_bytes / 2; i += 64) __builtin_prefetch(from + i, 0, 2);
    }

    [[gnu::always_inline]] inline __m512 number(int r, int i) const { return _mm512_load_ps(room + r * dim + 16 * i); }

    // Numbers of twice the size, truncated, are halves rounded away from zero in half units.
    [[gnu::always_inline]] inline void code_bytes_of(int r, char* out) const {
        const __m512 factor = _mm512_set1_ps(by[r]), divisor = _mm512_set1_ps(half_scale[r]);
        const auto twice = [&](int i) { return _mm512_cvttps_epi32(quotient(number(r, i), divisor, factor)); };
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const __m512i low = _mm512_packs_epi32(twice(4 * c), twice(4 * c + 1));
            const __m512i high = _mm512_packs_epi32(twice(4 * c + 2), twice(4 * c + 3));
            _mm512_storeu_si512(out + 64 * c, side_by_side(_mm512_packs_epi16(halved(low), halved(high))));
        }
    }

    [[gnu::always_inline]] inline void code_levels(int r, char* out, __m512& product, __m512& square) const {
        const __m512 factor = _mm512_set1_ps(by[r]);
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

// A batch is rotated before the one that precedes it is coded.
template <int bits, int R, Dtype D>
int64_t encode_all(const char* x, int64_t stride, int64_t n, const float* factors, char* codes, char* scales) {
    constexpr int64_t scale_size = bits == 8 ? 4 : 2;
    RotatedRows<bits, R, D> batches[2];
    const auto rows_from = [&](int64_t row) { return static_cast<int>(std::min<int64_t>(rows_at_once, n - row)); };
    int64_t finite = batches[0].rotate(x, stride, rows_from(0), factors);
    for (int64_t row = 0, turn = 0; row < n; row += rows_at_once, turn ^= 1) {
        const int64_t next = row + rows_at_once;
        if (finite < std::min(next, n)) return finite;
        const char* following = x + next * stride;
        if (next < n) finite = next + batches[1 - turn].rotate(following, stride, rows_from(next), factors);
        const int count = rows_from(row);
        const int done = batches[turn].code(following, stride, codes + row * (2 * R * bits), scales + row * scale_size);
        if (done < count) return row + done;
    }
    return n;
}

template <int bits, int R, Dtype D>
void decode_all(const char* codes, const char* scales, int64_t n, const float* factors, char* out) {
    constexpr int64_t dim = 16 * R, bytes = 16 * item_bytes<D>;
    for (int64_t row = 0; row < n; ++row, codes += dim / 8 * bits, scales += bits == 8 ? 4 : 2, out += dim * item_bytes<D>) {
        float scale;
        __m512i values[R / 4];
        if constexpr (bits == 8) {
            std::memcpy(&scale, scales, 4);
            for (int c = 0; c < R / 4; ++c) values[c] = _mm512_loadu_si512(codes + 64 * c);
        } else {
            uint16_t half;
            std::memcpy(&half, scales, 2);
            scale = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
            take_levels<bits>(codes, values);
        }
        const __m512 by = _mm512_set1_ps(scale);
        const auto wide = [&](__m128i four) { return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(four)), by); };
        __m512 v[R];
#pragma GCC unroll 4
        for (int c = 0; c < R / 4; ++c) {
            v[4 * c] = wide(_mm512_castsi512_si128(values[c]));
            v[4 * c + 1] = wide(_mm512_extracti32x4_epi32(values[c], 1));
            v[4 * c + 2] = wide(_mm512_extracti32x4_epi32(values[c], 2));
            v[4 * c + 3] = wide(_mm512_extracti32x4_epi32(values[c], 3));
        }
        Hadamard<16>::transform(v);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) store<D>(out + i * bytes, _mm512_mul_ps(v[i], _mm512_loadu_ps(factors + 16 * i)));
    }
}

// body(bits, R, D) as constants.
template <class Body>
inline auto of_shape(Codec codec, int64_t dim, Dtype dtype, Body&& body) {
    const auto of_dtype = [&](auto bits, auto registers) {
        if (dtype == Dtype::f16) return body(bits, registers, std::integral_constant<Dtype, Dtype::f16>{});
        if (dtype == Dtype::bf16) return body(bits, registers, std::integral_constant<Dtype, Dtype::bf16>{});
        return body(bits, registers, std::integral_constant<Dtype, Dtype::f32>{});
    };
    const auto of_dim = [&](auto bits) {
        if (dim == 64) return of_dtype(bits, std::integral_constant<int, 4>{});
        if (dim == 128) return of_dtype(bits, std::integral_constant<int, 8>{});
        return of_dtype(bits, std::integral_constant<int, 16>{});
    };
    switch (codec) {
        case Codec::int3: return of_dim(std::integral_constant<int, 3>{});
        case Codec::int4: return of_dim(std::integral_constant<int, 4>{});
        case Codec::int5: return of_dim(std::integral_constant<int, 5>{});
        case Codec::int6: return of_dim(std::integral_constant<int, 6>{});
        default: return of_dim(std::integral_constant<int, 8>{});
    }
}

inline int64_t encode_in_registers(Codec codec, Dtype dtype, const char* x, int64_t stride, int64_t n, const Rotation& rotation,
                                   char* codes, char* scales) {
    return of_shape(codec, rotation.dim, dtype, [&](auto bits, auto registers, auto of) {
        return encode_all<bits(), registers(), of()>(x, stride, n, rotation.factors, codes, scales);
    });
}

inline void decode_in_registers(Codec codec, const char* codes, const char* scales, int64_t n, const Rotation& rotation,
                                Dtype dtype, char* out) {
    of_shape(codec, rotation.dim, dtype, [&](auto bits, auto registers, auto of) {
        decode_all<bits(), registers(), of()>(codes, scales, n, rotation.factors, out);
    });
}

}  // namespace
}  // namespace kvmmap
