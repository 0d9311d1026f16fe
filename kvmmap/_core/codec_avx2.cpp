// The row codecs with AVX2 and F16C: levels are looked up 32 at a time by a shuffle of bytes.
#include <immintrin.h>

#include "codec_rows.h"
#include "pack_avx2.h"

namespace kvmmap {
namespace {

inline __m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// 32 bits of a plane of single bits -> 32 bytes, 0 or 255.
inline __m256i spread(const char* bits) {
    int32_t word;
    std::memcpy(&word, bits, 4);
    const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), which);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
}

template <int shift>
inline __m256i field(__m256i v, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(v, shift), _mm256_set1_epi8(static_cast<char>(mask)));
}

struct Avx2 {
    static constexpr int lanes = 8;
    static constexpr bool encodes_levels = true;

    static void f16_to_floats(const char* in, int64_t count, float* out) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * i))));
        f16_to_floats_plainly(in + 2 * i, count - i, out + i);
    }

    static void floats_to_f16(const float* in, int64_t count, char* out) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
        floats_to_f16_plainly(in + i, count - i, out + 2 * i);
    }

    static void round(const float* x, int64_t dim, float inverse, int8_t* out) {
        const __m256 by = _mm256_set1_ps(inverse);
        int64_t i = 0;
        for (; i + 32 <= dim; i += 32) {
            const __m256i packed = pack(whole(x + i, by), whole(x + i + 8, by), whole(x + i + 16, by), whole(x + i + 24, by));
            store_32(out + i, _mm256_max_epi8(packed, _mm256_set1_epi8(-127)));
        }
        round_plainly(x + i, dim - i, inverse, out + i);
    }

    template <int bits>
    static void nearest(int8_t* numbers, int64_t dim, uint8_t* codes) {
        int64_t i = 0;
        for (; i + 32 <= dim; i += 32) {
            const __m256i number = load_32(numbers + i);
            if constexpr (bits == 6) {
                const __m256i code = field<2>(_mm256_xor_si256(number, _mm256_set1_epi8(-128)), 63);
                store_32(codes + i, code);
                store_32(numbers + i, _mm256_sub_epi8(_mm256_slli_epi16(code, 2), _mm256_set1_epi8(126)));
            } else {
                static constexpr Buckets table_of = buckets<bits>();
                static constexpr Register low = level_register<bits>(1 << (bits - 1));
                const __m256i size = _mm256_abs_epi8(number), bucket = field<3>(size, 15);
                __m256i k = _mm256_shuffle_epi8(table(table_of.base), bucket);
                k = _mm256_sub_epi8(k, _mm256_cmpgt_epi8(size, _mm256_shuffle_epi8(table(table_of.first), bucket)));
                if constexpr (bits == 5)
                    k = _mm256_sub_epi8(k, _mm256_cmpgt_epi8(size, _mm256_shuffle_epi8(table(table_of.second), bucket)));
                const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), number);
                const __m256i code = _mm256_add_epi8(_mm256_xor_si256(k, negative), _mm256_set1_epi8(1 << (bits - 1)));
                const __m256i level = _mm256_shuffle_epi8(table(low), k);
                store_32(codes + i, code);
                store_32(numbers + i, _mm256_sub_epi8(_mm256_xor_si256(level, negative), negative));
            }
        }
        nearest_plainly<bits>(numbers + i, dim - i, codes + i);
    }

    static int32_t squares(const int8_t* numbers, int64_t dim) {
        __m256i sum = _mm256_setzero_si256();
        int64_t i = 0;
        for (; i + 32 <= dim; i += 32) {
            const __m256i size = _mm256_abs_epi8(load_32(numbers + i));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(size, size), _mm256_set1_epi16(1)));
        }
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        return _mm_cvtsi128_si32(half) + squares_plainly(numbers + i, dim - i);
    }

    template <int bits>
    static void levels(const char* codes, int64_t n, int64_t dim, int8_t* out) {
        const bool whole_steps = dim % (bits == 3 || bits == 6 ? 128 : 64) == 0;
        for (const int8_t* end = out + n * dim; out < end; out += dim, codes += dim / 8 * bits) {
            if (whole_steps) row<bits>(codes, dim, out);
            else any_row<bits>(codes, dim, out);
        }
    }

  private:
    // Parts of its planes end within a step.
    template <int bits>
    static void any_row(const char* codes, int64_t dim, int8_t* out) {
        unpack_codes<bits>(codes, dim, reinterpret_cast<uint8_t*>(out));
        int64_t i = 0;
        for (; i + 32 <= dim; i += 32) {
            const __m256i code = load_32(out + i);
            if constexpr (bits == 6) put_uniform(code, _mm256_setzero_si256(), out + i);
            else put<bits>(code, codes + (bits == 3 ? dim / 4 : dim / 2), i, out);
        }
        look_up<bits>(codes, i, dim, out);
    }

    template <int bits>
    static void row(const char* codes, int64_t dim, int8_t* out) {
        if constexpr (bits == 3) {
            const int64_t quarter = dim / 4;
            for (int64_t j = 0; j < quarter; j += 32) {
                const __m256i four = load_32(codes + j);
                put<bits>(field<0>(four, 3), codes + quarter, j, out);
                put<bits>(field<2>(four, 3), codes + quarter, j + quarter, out);
                put<bits>(field<4>(four, 3), codes + quarter, j + 2 * quarter, out);
                put<bits>(field<6>(four, 3), codes + quarter, j + 3 * quarter, out);
            }
        } else {
            const int64_t half = dim / 2;
            for (int64_t j = 0; j < half; j += 32) {
                const __m256i two = load_32(codes + j);
                if constexpr (bits == 6) {
                    // Of a plane of two bits, byte k holds numbers k, k + dim / 4, ...
                    const int64_t quarter = dim / 4;
                    const __m256i upper = load_32(codes + half + j % quarter);
                    const __m256i low = j < quarter ? upper : _mm256_srli_epi16(upper, 2);
                    put_uniform(field<0>(two, 15), field<0>(low, 3), out + j);
                    put_uniform(field<4>(two, 15), field<4>(low, 3), out + j + half);
                } else {
                    put<bits>(field<0>(two, 15), codes + half, j, out);
                    put<bits>(field<4>(two, 15), codes + half, j + half, out);
                }
            }
        }
    }

    static __m256i whole(const float* x, __m256 by) {
        const __m256 q = _mm256_mul_ps(_mm256_loadu_ps(x), by);
        const __m256 away = _mm256_or_ps(_mm256_set1_ps(below_half), _mm256_and_ps(q, _mm256_set1_ps(-0.0f)));
        return _mm256_cvttps_epi32(_mm256_add_ps(q, away));
    }

    static __m256i table(const Register& r) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(r.values)));
    }

    // 32 numbers from i on.
    template <int bits>
    static void put(__m256i low, const char* plane, int64_t i, int8_t* out) {
        static constexpr Register first = level_register<bits>(0), second = level_register<bits>(16);
        if constexpr (bits == 4) store_32(out + i, _mm256_shuffle_epi8(table(first), low));
        if constexpr (bits == 3)
            low = _mm256_or_si256(low, _mm256_and_si256(spread(plane + i / 8), _mm256_set1_epi8(4)));
        if constexpr (bits == 3) store_32(out + i, _mm256_shuffle_epi8(table(first), low));
        if constexpr (bits == 5)
            store_32(out + i, _mm256_blendv_epi8(_mm256_shuffle_epi8(table(first), low),
                                                 _mm256_shuffle_epi8(table(second), low), spread(plane + i / 8)));
    }

    // 4 * (low + 16 * upper) - 126
    static void put_uniform(__m256i low, __m256i upper, int8_t* out) {
        const __m256i code = _mm256_or_si256(low, _mm256_slli_epi16(upper, 4));
        store_32(out, _mm256_sub_epi8(_mm256_slli_epi16(code, 2), _mm256_set1_epi8(126)));
    }
};

}  // namespace

const CodecKernels codec_avx2 = codec_kernels_of<Avx2>();

}  // namespace kvmmap
