// Numbers to whole numbers, and those to the codes of the nearest levels, in registers of 64 bytes.
#pragma once

#include <immintrin.h>

#include "codec_levels.h"
#include "round.h"

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

// q, |q| < 2^22, rounded half away from zero.
inline __m512i away(__m512 q) {
    const __m512 half = _mm512_or_ps(_mm512_set1_ps(below_half), _mm512_and_ps(q, _mm512_set1_ps(-0.0f)));
    return _mm512_cvttps_epi32(_mm512_add_ps(q, half));
}

inline __m512i whole(__m512 x, __m512 by) { return away(_mm512_mul_ps(x, by)); }

struct Nearest {
    __m512i code, level;
};

// Of whole numbers in [-127, 127].
template <int bits>
[[gnu::always_inline]] inline Nearest nearest_level(__m512i number) {
    if constexpr (bits == 6) {
        const __m512i code = field<2>(_mm512_xor_si512(number, _mm512_set1_epi8(-128)), 63);
        return {code, _mm512_sub_epi8(_mm512_slli_epi16(code, 2), _mm512_set1_epi8(126))};
    } else {
        static constexpr Buckets table_of = buckets<bits>();
        static constexpr Register upper = level_register<bits>(1 << (bits - 1));
        const __m512i size = _mm512_abs_epi8(number), bucket = field<3>(size, 15), one = _mm512_set1_epi8(1);
        __m512i k = _mm512_shuffle_epi8(table(table_of.base), bucket);
        const __mmask64 above = _mm512_cmpgt_epi8_mask(size, _mm512_shuffle_epi8(table(table_of.first), bucket));
        k = _mm512_mask_add_epi8(k, above, k, one);
        if constexpr (bits == 5) {
            const __mmask64 twice = _mm512_cmpgt_epi8_mask(size, _mm512_shuffle_epi8(table(table_of.second), bucket));
            k = _mm512_mask_add_epi8(k, twice, k, one);
        }
        const __mmask64 negative = _mm512_movepi8_mask(number);
        const __m512i half = _mm512_set1_epi8(1 << (bits - 1)), below = _mm512_set1_epi8((1 << (bits - 1)) - 1);
        const __m512i level = _mm512_shuffle_epi8(table(upper), k);
        return {_mm512_mask_sub_epi8(_mm512_add_epi8(half, k), negative, below, k),
                _mm512_mask_sub_epi8(level, negative, _mm512_setzero_si512(), level)};
    }
}

}  // namespace
}  // namespace kvmmap
