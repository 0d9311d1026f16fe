// The row codecs with AVX-512: levels are looked up by a shuffle of bytes, as many at a time as are left of a row.
#include <immintrin.h>

#include "codec_rotated_avx512.h"
#include "codec_rows.h"
#include "levels_avx512.h"
#include "planes_avx512.h"

namespace kvmmap {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    static constexpr bool encodes_levels = false;  // in one walk, whatever their length

    static void f16_to_floats(const char* in, int64_t count, float* out) {
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 mask = static_cast<__mmask16>(first_64(count - i));
            _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + 2 * i)));
        }
    }

    static void floats_to_f16(const float* in, int64_t count, char* out) {
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 mask = static_cast<__mmask16>(first_64(count - i));
            const __m512 numbers = _mm512_maskz_loadu_ps(mask, in + i);
            _mm256_mask_storeu_epi16(out + 2 * i, mask,
                                     _mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        }
    }

    template <int bits>
    static void levels(const char* codes, int64_t n, int64_t dim, int8_t* out) {
        take_rows<bits>(codes, n, dim, out);
    }
};

// From 65520 on a number rounds to infinity. A push of a position is so short that a second look at what it wrote would
// double what this takes.
bool within_f16(const float* x, int64_t count, uint16_t* out) {
    constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC, largest_size = 0xb;
    __m512 top[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 numbers = _mm512_loadu_ps(x + i + 16 * half);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 16 * half), _mm512_cvtps_ph(numbers, rounding));
            top[half] = _mm512_range_ps(top[half], numbers, largest_size);
        }
    for (; i < count; i += 16) {
        const __mmask16 mask = static_cast<__mmask16>(first_64(count - i));
        const __m512 numbers = _mm512_maskz_loadu_ps(mask, x + i);
        _mm256_mask_storeu_epi16(out + i, mask, _mm512_cvtps_ph(numbers, rounding));
        top[0] = _mm512_range_ps(top[0], numbers, largest_size);
    }
    return !_mm512_cmp_ps_mask(_mm512_range_ps(top[0], top[1], largest_size), _mm512_set1_ps(65520.0f), _CMP_GE_OQ);
}

constexpr CodecKernels kernels() {
    CodecKernels kernels = codec_kernels_of<Avx512>();
    kernels.within_f16 = within_f16;
    kernels.walks = walks_avx512;
    kernels.encode_rotated = encode_rotated;
    kernels.decode_rotated = decode_rotated;
    return kernels;
}

}  // namespace

const CodecKernels codec_avx512 = kernels();

}  // namespace kvmmap
