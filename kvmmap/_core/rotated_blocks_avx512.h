// Rotated rows of any length up to 4096, block by block.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <memory>

#include "codec_rows.h"
#include "floats_avx512.h"
#include "levels_avx512.h"
#include "pack_avx512.h"
#include "planes_avx512.h"
#include "rotation_avx512.h"
#include "scales_avx512.h"

namespace kvmmap {
namespace {

constexpr int rows_side_by_side = 4;

// Numbers of a batch, in the first-level cache: 16 rows of up to 256 numbers, 12 to 4 of up to 1024.
constexpr int64_t batch_numbers = 4096;
// Numbers of a row, at most.
constexpr int64_t most_rotated = most_levels;

// Number 4 * g + r: the sum of numbers r, r + 4, r + 8 and r + 12 of register g.
inline __m512i fold_fours(const __m512i (&groups)[rows_at_once / rows_side_by_side]) {
    const auto halves = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
    };
    const __m512i low = halves(groups[0], groups[1]), high = halves(groups[2], groups[3]);
    return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

// A batch of rows. They are rotated a block of all rows after another, and coded four at a time, a register of each: packing
// puts the codes of a row side by side, wherever it ends. Codes of levels go to their planes by way of memory.
template <int bits, Dtype D>
class RotatedBlocks {
    static constexpr int64_t item = item_bytes<D>, bytes = 16 * item;

  public:
    static int64_t batch_of(int64_t dim) {
        const int64_t fours = batch_numbers / rows_side_by_side / pitch_of(dim);
        return std::clamp<int64_t>(rows_side_by_side * fours, rows_side_by_side, rows_at_once);
    }

    explicit RotatedBlocks(int64_t dim) : dim_(dim), pitch_(pitch_of(dim)) {
        const int64_t numbers = batch_of(dim) * pitch_;
        if (numbers <= batch_numbers) return;
        large_.reset(new float[numbers + numbers / 4]);
        room_ = large_.get();
        codes_ = reinterpret_cast<char*>(room_ + numbers);
    }
    RotatedBlocks(const RotatedBlocks&) = delete;
    RotatedBlocks& operator=(const RotatedBlocks&) = delete;

    int count() const { return scales_.count; }

    // Rotates `rows` rows and finds their scales. Returns the first one that is not finite, or `rows`. Meanwhile the first half
    // of the batch behind is fetched.
    int rotate(const char* x, int64_t stride, int rows, const float* factors) {
        const int64_t dim = dim_, pitch = pitch_;
        float* out = room_;
        const char* later = x + batch_of(dim) * stride;
        alignas(64) float room[most_rotated];
        __m512 sizes[rows_at_once];
        for (int r = rows; r < rows_at_once; ++r) sizes[r] = _mm512_setzero_ps();
        const auto source = [&](int row, int64_t i, __mmask16 mask) __attribute__((always_inline)) {
            const __m512 numbers = load<D>(x + row * stride + i * bytes, mask);
            return _mm512_mul_ps(numbers, _mm512_maskz_loadu_ps(mask, factors + 16 * i));
        };
        const auto sink = [&](int row, int64_t first, auto& v, __mmask16) __attribute__((always_inline)) {
            constexpr int R = sizeof v / sizeof v[0];
            fetch<R * bytes / 2>(later + row / 2 * stride + row % 2 * (dim * item / 2) + first * (bytes / 2));
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) _mm512_storeu_ps(out + row * pitch + 16 * (first + i), v[i]);
            sizes[row] = BatchScales<bits>::with(first ? sizes[row] : _mm512_setzero_ps(), v);
        };
        transform_rows(dim, rows, room, source, sink);
        return scales_.find(sizes, rows, dim);
    }

    // Codes the rows that were rotated; x are those that are rotated meanwhile. Returns the first one whose scale is beyond
    // f16, or their number. Meanwhile the second half of the batch behind x is fetched.
    int code(const char* x, int64_t stride, char* codes, char* scales) {
        const int64_t dim = dim_, batch = batch_of(dim);
        const char* later = x + (batch + batch / 2) * stride;
        if constexpr (bits == 8) {
            scales_.put(scales);
            for (int r = 0; r < count(); r += rows_side_by_side) {
                const char* lines = later + r / 2 * stride;
                if (count() - r >= rows_side_by_side) code_bytes_of(r, rows_side_by_side, codes + r * dim, lines);
                else code_bytes_of(r, count() - r, codes + r * dim, lines);
            }
            return count();
        } else {
            __m512 products[rows_at_once];
            __m512i squares[rows_at_once / rows_side_by_side] = {};
            for (int r = count(); r < rows_at_once; ++r) products[r] = _mm512_setzero_ps();
            for (int r = 0; r < count(); r += rows_side_by_side)
                code_levels(r, products + r, squares[r / rows_side_by_side], later + r / 2 * stride);
            for (int r = 0; r < count(); ++r) put_row<bits>(codes_ + r * pitch_, dim, codes + r * (dim / 8 * bits));
            return scales_.put_fitted(products, fold_fours(squares), scales);
        }
    }

  private:
    const int64_t dim_, pitch_;  // numbers behind a row, up to a whole register, are zero
    alignas(64) float small_room_[batch_numbers];
    alignas(64) char small_codes_[bits == 8 ? 64 : batch_numbers];
    float* room_ = small_room_;
    char* codes_ = small_codes_;
    std::unique_ptr<float[]> large_;  // of rows of which four are no batch
    BatchScales<bits> scales_;

    static int64_t pitch_of(int64_t dim) { return (dim + 15) / 16 * 16; }

    // Numbers of twice the size, truncated, are halves rounded away from zero in half units.
    [[gnu::always_inline]] inline void code_bytes_of(int first, int here, char* out, const char* lines) const {
        const int64_t dim = dim_, pitch = pitch_;
        const float* in = room_ + first * pitch;
        __m512 factor[rows_side_by_side], divisor[rows_side_by_side];
#pragma GCC unroll 4
        for (int r = 0; r < rows_side_by_side; ++r)
            factor[r] = _mm512_set1_ps(scales_.by[first + r]), divisor[r] = _mm512_set1_ps(scales_.half_scale[first + r]);
        const auto codes_of = [&](int64_t i) __attribute__((always_inline)) {
            fetch<2 * bytes>(lines + i / 16 * (2 * bytes));
            const auto twice = [&](int r) {
                return _mm512_cvttps_epi32(quotient(_mm512_loadu_ps(in + r * pitch + i), divisor[r], factor[r]));
            };
            return pack_halved(twice(0), twice(1), twice(2), twice(3));
        };
        int64_t i = 0;
        for (; i + 16 <= dim; i += 16) put_rows(codes_of(i), here, out + i, dim);
        if (i < dim) {
            alignas(64) char last[64];
            _mm512_store_si512(last, codes_of(i));
            for (int r = 0; r < here; ++r) std::memcpy(out + r * dim + i, last + 16 * r, dim - i);
        }
    }

    [[gnu::always_inline]] inline void code_levels(int first, __m512* products, __m512i& square, const char* lines) {
        const int64_t dim = dim_, pitch = pitch_;
        const float* in = room_ + first * pitch;
        char* out = codes_ + first * pitch;
        __m512 factor[rows_side_by_side], sums[rows_side_by_side];
#pragma GCC unroll 4
        for (int r = 0; r < rows_side_by_side; ++r)
            factor[r] = _mm512_set1_ps(scales_.by[first + r]), sums[r] = _mm512_setzero_ps();
        __m512i squares = _mm512_setzero_si512();
        const auto step = [&](int64_t i, __mmask16 fours) __attribute__((always_inline)) {
            fetch<2 * bytes>(lines + i / 16 * (2 * bytes));
            const auto number = [&](int r) { return _mm512_loadu_ps(in + r * pitch + i); };
            const auto twice = [&](int r) { return _mm512_cvttps_epi32(_mm512_mul_ps(number(r), factor[r])); };
            const Nearest found = nearest_level<bits>(_mm512_packs_epi32(twice(0), twice(1)),
                                                      _mm512_packs_epi32(twice(2), twice(3)));
            put_rows(side_by_side(found.code), rows_side_by_side, out + i, pitch);
            const __m512i size = _mm512_abs_epi8(found.level);
            squares = _mm512_mask_dpbusd_epi32(squares, fours, size, size);
            // Levels times 2^24: bytes become the upper ones of whole numbers. Where that makes a product infinite, the scale
            // is far beyond f16 in any case.
#pragma GCC unroll 4
            for (int r = 0; r < rows_side_by_side; ++r) {
                const __m512 level = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(found.level, table(spreads.of[r])));
                sums[r] = _mm512_add_ps(sums[r], _mm512_mul_ps(number(r), level));
            }
        };
        int64_t i = 0;
        for (; i + 16 <= dim; i += 16) step(i, 0xffff);
        if (i < dim) step(i, 0x00ff);  // 8 numbers of each row
#pragma GCC unroll 4
        for (int r = 0; r < rows_side_by_side; ++r) products[r] = sums[r];
        square = squares;
    }

    [[gnu::always_inline]] static inline void put_rows(__m512i codes, int here, char* out, int64_t pitch) {
        const auto put = [&](int r, __m128i sixteen) {
            if (r < here) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r * pitch), sixteen);
        };
        put(0, _mm512_castsi512_si128(codes));
        put(1, _mm512_extracti32x4_epi32(codes, 1));
        put(2, _mm512_extracti32x4_epi32(codes, 2));
        put(3, _mm512_extracti32x4_epi32(codes, 3));
    }
};

}  // namespace
}  // namespace kvmmap
