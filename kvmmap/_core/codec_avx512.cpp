// The row codecs with AVX-512: levels are looked up by a shuffle of bytes, as many at a time as are left of a row.
#include <immintrin.h>

#include "codec_rotated_avx512.h"
#include "codec_rows.h"
#include "levels_avx512.h"
#include "pack_avx512.h"
#include "planes_avx512.h"

namespace kvmmap {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;

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

    static void round(const float* x, int64_t dim, float inverse, int8_t* out) {
        const __m512 by = _mm512_set1_ps(inverse);
        int64_t i = 0;
        for (; i + 64 <= dim; i += 64) {
            const char* in = reinterpret_cast<const char*>(x + i);
            const __m512i packed = pack(whole(load<Dtype::f32>(in), by), whole(load<Dtype::f32>(in + 64), by),
                                        whole(load<Dtype::f32>(in + 128), by), whole(load<Dtype::f32>(in + 192), by));
            _mm512_storeu_si512(out + i, _mm512_max_epi8(packed, _mm512_set1_epi8(-127)));
        }
        round_plainly(x + i, dim - i, inverse, out + i);
    }

    template <int bits>
    static void nearest(int8_t* numbers, int64_t dim, uint8_t* codes) {
        for (int64_t i = 0; i < dim; i += 64) {
            const __mmask64 mask = first_64(dim - i);
            const Nearest found = nearest_level<bits>(_mm512_maskz_loadu_epi8(mask, numbers + i));
            _mm512_mask_storeu_epi8(codes + i, mask, found.code);
            _mm512_mask_storeu_epi8(numbers + i, mask, found.level);
        }
    }

    static int32_t squares(const int8_t* numbers, int64_t dim) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < dim; i += 64) {
            const __m512i size = _mm512_abs_epi8(_mm512_maskz_loadu_epi8(first_64(dim - i), numbers + i));
            sum = _mm512_dpbusd_epi32(sum, size, size);
        }
        return _mm512_reduce_add_epi32(sum);
    }

    template <int bits>
    static void levels(const char* codes, int64_t n, int64_t dim, int8_t* out) {
        for (const int8_t* end = out + n * dim; out < end; out += dim, codes += dim / 8 * bits) {
            if (dim == 128) registers<2, bits>(codes, out);
            else if (dim == 64) registers<1, bits>(codes, out);
            else if (dim == 256) registers<4, bits>(codes, out);
            else if (dim % 32 == 0) row<bits>(codes, dim, out);
            else unpack_levels<bits>(codes, dim, out);  // parts of a plane of bits begin within a byte
        }
    }

  private:
    template <int C, int bits>
    [[gnu::always_inline]] static inline void registers(const char* codes, int8_t* out) {
        __m512i levels[C];
        take_levels<bits>(codes, levels);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) _mm512_storeu_si512(out + 64 * c, levels[c]);
    }

    template <int bits>
    [[gnu::always_inline]] static inline void row(const char* codes, int64_t dim, int8_t* out) {
        const int64_t half = dim / 2, quarter = dim / 4;
        if constexpr (bits == 3) {
            for (int64_t j = 0; j < quarter; j += 64) {
                const int64_t n = quarter - j;
                const __m512i four = _mm512_maskz_loadu_epi8(first_64(n), codes + j);
                put<bits>(field<0>(four, 3), codes + quarter, j, n, out);
                put<bits>(field<2>(four, 3), codes + quarter, j + quarter, n, out);
                put<bits>(field<4>(four, 3), codes + quarter, j + 2 * quarter, n, out);
                put<bits>(field<6>(four, 3), codes + quarter, j + 3 * quarter, n, out);
            }
        } else if constexpr (bits == 6) {
            for (int64_t j = 0; j < quarter; j += 64) {
                const int64_t n = quarter - j;
                const __m512i upper = _mm512_maskz_loadu_epi8(first_64(n), codes + half + j);
                const __m512i a = _mm512_maskz_loadu_epi8(first_64(n), codes + j);
                const __m512i b = _mm512_maskz_loadu_epi8(first_64(n), codes + quarter + j);
                put_uniform(field<0>(a, 15), field<0>(upper, 3), n, out + j);
                put_uniform(field<0>(b, 15), field<2>(upper, 3), n, out + j + quarter);
                put_uniform(field<4>(a, 15), field<4>(upper, 3), n, out + j + half);
                put_uniform(field<4>(b, 15), field<6>(upper, 3), n, out + j + half + quarter);
            }
        } else {
            for (int64_t j = 0; j < half; j += 64) {
                const int64_t n = half - j;
                const __m512i two = _mm512_maskz_loadu_epi8(first_64(n), codes + j);
                put<bits>(field<0>(two, 15), codes + half, j, n, out);
                put<bits>(field<4>(two, 15), codes + half, j + half, n, out);
            }
        }
    }

    static __mmask64 bits_at(const char* plane, int64_t i, int64_t n) {
        const char* from = plane + i / 8;
        uint64_t word = 0;
        if (n >= 64) std::memcpy(&word, from, 8);
        else if (n == 32) std::memcpy(&word, from, 4);
        else if (n == 16) std::memcpy(&word, from, 2);
        else std::memcpy(&word, from, n / 8);
        return word;
    }

    // Numbers from i on, n of them or 64.
    template <int bits>
    [[gnu::always_inline]] static inline void put(__m512i low, const char* plane, int64_t i, int64_t n, int8_t* out) {
        static constexpr Register first = level_register<bits>(0), second = level_register<bits>(16);
        __m512i found = _mm512_shuffle_epi8(table(first), low);
        if constexpr (bits == 3) {
            const __m512i four = _mm512_set1_epi8(4);
            found = _mm512_shuffle_epi8(table(first), _mm512_or_si512(low, _mm512_maskz_mov_epi8(bits_at(plane, i, n), four)));
        }
        if constexpr (bits == 5)
            found = _mm512_mask_shuffle_epi8(found, bits_at(plane, i, n), table(second), low);
        _mm512_mask_storeu_epi8(out + i, first_64(n), found);
    }

    // 4 * (low + 16 * upper) - 126
    [[gnu::always_inline]] static inline void put_uniform(__m512i low, __m512i upper, int64_t n, int8_t* out) {
        const __m512i code = _mm512_or_si512(low, _mm512_slli_epi16(upper, 4));
        const __m512i level = _mm512_sub_epi8(_mm512_slli_epi16(code, 2), _mm512_set1_epi8(126));
        _mm512_mask_storeu_epi8(out, first_64(n), level);
    }
};

}  // namespace

namespace {

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
    kernels.walks = in_registers;
    kernels.encode_rotated = encode_in_registers;
    kernels.decode_rotated = decode_in_registers;
    return kernels;
}

}  // namespace

const CodecKernels codec_avx512 = kernels();

}  // namespace kvmmap
