// Codes of the nearest levels, in registers of 64 bytes.
#pragma once

#include <immintrin.h>

#include "codec_levels.h"

namespace kvmmap {
namespace {

inline __mmask64 first_64(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

template <int shift>
inline __m512i field(__m512i v, int mask) {
    return _mm512_and_si512(_mm512_srli_epi16(v, shift), _mm512_set1_epi8(static_cast<char>(mask)));
}

inline __m512i table(const Register& r) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(r.values)));
}

struct Nearest {
    __m512i code, level;
};

// Of 64 numbers q, given as trunc(2q) in 16 bits; codes and levels lie within 128-bit lanes as vpackuswb leaves them.
template <int bits>
[[gnu::always_inline]] inline Nearest nearest_level(__m512i low, __m512i high) {
    if constexpr (bits == 6) {
        // (q rounded half away from zero + 128) / 4, rounded down
        const auto quarter = [](__m512i twice) {
            const __m512i least = _mm512_add_epi16(twice, _mm512_srai_epi16(twice, 15));
            return _mm512_srli_epi16(_mm512_add_epi16(least, _mm512_set1_epi16(257)), 3);
        };
        const __m512i code = _mm512_packus_epi16(quarter(low), quarter(high));
        return {code, _mm512_sub_epi8(_mm512_slli_epi16(code, 2), _mm512_set1_epi8(126))};
    } else {
        static constexpr Steps steps = steps_of<bits>();
        static_assert(steps.offset >= 0);
        __m512i size = _mm512_packus_epi16(_mm512_abs_epi16(low), _mm512_abs_epi16(high));
        if constexpr (steps.offset > 0) size = _mm512_adds_epu8(size, _mm512_set1_epi8(steps.offset));
        const __mmask64 negative = _mm512_movepi8_mask(_mm512_packs_epi16(low, high));
        const __m512i moved = _mm512_add_epi8(size, _mm512_shuffle_epi8(table(steps.add), field<4>(size, 15)));
        if constexpr (bits == 5) {
            static constexpr Register above = positive_levels<bits>(1), below = positive_levels<bits>(-1);
            const __m512i k = field<4>(moved, 15);
            const __m512i level = _mm512_shuffle_epi8(table(above), k);
            const __m512i code = _mm512_add_epi8(k, _mm512_set1_epi8(16));
            return {_mm512_mask_sub_epi8(code, negative, _mm512_set1_epi8(15), k),
                    _mm512_mask_shuffle_epi8(level, negative, table(below), k)};
        } else {
            static constexpr Register levels = level_register<bits>(0);
            const __m512i upper = _mm512_set1_epi8(static_cast<char>((1 << (bits + 4)) - 1));  // minus the number: all bits turned
            const __m512i code = field<4>(_mm512_mask_sub_epi8(moved, negative, upper, moved), 15);
            return {code, _mm512_shuffle_epi8(table(levels), code)};
        }
    }
}

}  // namespace
}  // namespace kvmmap
