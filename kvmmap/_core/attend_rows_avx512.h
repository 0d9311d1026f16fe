// How 64 numbers of a stored row get into a register as int8: of int8 codes, and of levels of 4 and 5 bits, which are
// looked up on the way, so that a quarter to a half of the bytes come from memory.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "codec_levels.h"

namespace kvmmap {
namespace {

// Rows of int8 codes.
struct Int8Rows {
    static constexpr bool half_scales = false;
    explicit Int8Rows(int64_t dim) : row_bytes(dim) {}

    const int64_t row_bytes;

    // Numbers d to d + 63.
    [[gnu::always_inline]] __m512i load(const char* row, int64_t d) const { return _mm512_loadu_si512(row + d); }
    // The same plus 128, unsigned.
    [[gnu::always_inline]] __m512i load_unsigned(const char* row, int64_t d) const {
        return _mm512_xor_si512(load(row, d), _mm512_set1_epi8(-128));
    }
};

// Rows of levels: of 64 numbers if `narrow`, else of a multiple of 128. Then 64 numbers are the lower or the upper halves of
// 64 bytes, or of 32 bytes both.
template <int bits, bool narrow>
struct LevelRows {
    static_assert(bits == 4 || bits == 5);
    static constexpr bool half_scales = true;
    static bool suit(int64_t dim) { return narrow ? dim == 64 : dim % 128 == 0; }
    explicit LevelRows(int64_t dim) : row_bytes(dim / 8 * bits), half_(dim / 2) {}

    const int64_t row_bytes;

    [[gnu::always_inline]] __m512i load(const char* row, int64_t d) const {
        static constexpr Register first = level_register<bits>(0), second = level_register<bits>(16);
        return look_up(row, d, first, second);
    }
    [[gnu::always_inline]] __m512i load_unsigned(const char* row, int64_t d) const {
        static constexpr Register first = raised(level_register<bits>(0)), second = raised(level_register<bits>(16));
        return look_up(row, d, first, second);
    }

  private:
    static constexpr Register raised(Register r) {
        for (int8_t& value : r.values) value = static_cast<int8_t>(value ^ -128);
        return r;
    }

    [[gnu::always_inline]] __m512i look_up(const char* row, int64_t d, const Register& first, const Register& second) const {
        __m512i codes;
        if constexpr (narrow) {
            const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
            codes = _mm512_mask_srli_epi16(both, 0xffff0000u, both, 4);
        } else {
            const bool upper = d >= half_;
            codes = _mm512_srl_epi16(_mm512_loadu_si512(row + (upper ? d - half_ : d)), _mm_cvtsi32_si128(upper ? 4 : 0));
        }
        codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
        const __m512i found = _mm512_shuffle_epi8(table(first), codes);
        if constexpr (bits == 4) return found;
        uint64_t highest;
        std::memcpy(&highest, row + half_ + d / 8, 8);
        return _mm512_mask_shuffle_epi8(found, highest, table(second), codes);
    }

    [[gnu::always_inline]] static __m512i table(const Register& r) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(r.values)));
    }

    int64_t half_;
};

}  // namespace
}  // namespace kvmmap
