// The row codecs with AVX-512: levels are looked up by a shuffle of bytes, as many at a time as are left of a row.
#include <immintrin.h>

#include "codec_rows.h"
#include "pack_avx512.h"

namespace kvmmap {
namespace {

inline __mmask64 first_64(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

template <int shift>
inline __m512i field(__m512i v, int mask) {
    return _mm512_and_si512(_mm512_srli_epi16(v, shift), _mm512_set1_epi8(static_cast<char>(mask)));
}

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
            const __m512i packed = pack(whole(x + i, by), whole(x + i + 16, by), whole(x + i + 32, by), whole(x + i + 48, by));
            _mm512_storeu_si512(out + i, _mm512_max_epi8(packed, _mm512_set1_epi8(-127)));
        }
        round_plainly(x + i, dim - i, inverse, out + i);
    }

    template <int bits>
    static void nearest(int8_t* numbers, int64_t dim, uint8_t* codes) {
        for (int64_t i = 0; i < dim; i += 64) {
            const __mmask64 mask = first_64(dim - i);
            const __m512i number = _mm512_maskz_loadu_epi8(mask, numbers + i);
            __m512i code, level;
            if constexpr (bits == 6) {
                code = field<2>(_mm512_xor_si512(number, _mm512_set1_epi8(-128)), 63);
                level = _mm512_sub_epi8(_mm512_slli_epi16(code, 2), _mm512_set1_epi8(126));
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
                code = _mm512_mask_sub_epi8(_mm512_add_epi8(half, k), negative, below, k);
                level = _mm512_shuffle_epi8(table(upper), k);
                level = _mm512_mask_sub_epi8(level, negative, _mm512_setzero_si512(), level);
            }
            _mm512_mask_storeu_epi8(codes + i, mask, code);
            _mm512_mask_storeu_epi8(numbers + i, mask, level);
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
            if (dim == 128) row<bits>(codes, 128, out);  // known lengths are what the compiler makes most of
            else if (dim == 64) row<bits>(codes, 64, out);
            else if (dim % 32 == 0) row<bits>(codes, dim, out);
            else unpack_levels<bits>(codes, dim, out);  // parts of a plane of bits begin within a byte
        }
    }

  private:
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

    static __m512i whole(const float* x, __m512 by) {
        const __m512 q = _mm512_mul_ps(_mm512_loadu_ps(x), by);
        const __m512 away = _mm512_or_ps(_mm512_set1_ps(below_half), _mm512_and_ps(q, _mm512_set1_ps(-0.0f)));
        return _mm512_cvttps_epi32(_mm512_add_ps(q, away));
    }

    static __m512i table(const Register& r) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(r.values)));
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

const CodecKernels codec_avx512 = codec_kernels_of<Avx512>();

}  // namespace kvmmap
