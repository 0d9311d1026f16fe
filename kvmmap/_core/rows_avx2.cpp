// The row codec with AVX2 and F16C. What is left of a row after whole steps of 32 is done in a last step that
// overlaps the one before; writing a code twice writes the same byte.
#include <immintrin.h>

#include "pack_avx2.h"
#include "rows_batch.h"

namespace kvmmap {
namespace {

constexpr int64_t lanes = 8;

inline __m256i load_bits(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m128i load_half(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store_half(char* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

// 8 numbers as f32.
template <Dtype D>
inline __m256 load(const char* p) {
    if constexpr (D == Dtype::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (D == Dtype::f16) return _mm256_cvtph_ps(load_half(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}

template <Dtype D>
inline void store(char* out, __m256 v) {
    if constexpr (D == Dtype::f32) {
        _mm256_storeu_ps(reinterpret_cast<float*>(out), v);
    } else if constexpr (D == Dtype::f16) {
        store_half(out, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i kept = _mm256_srli_epi32(rounded, 16);
        store_half(out, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
    }
}

inline uint32_t largest(__m256i v) {
    __m128i top = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0xb1));
    return _mm_cvtsi128_si32(top);
}

inline __m256 widen(const int8_t* codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

struct Avx2 {
    static constexpr int64_t step = 32;

    template <Dtype D>
    static uint32_t absmax_bits(const char* in, int64_t dim) {
        if constexpr (D == Dtype::f32) {
            const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
            __m256i top = _mm256_setzero_si256();
            for (int64_t i = 0; i < dim; i += lanes) {
                const char* p = in + 4 * (i + lanes <= dim ? i : dim - lanes);
                top = _mm256_max_epu32(top, _mm256_and_si256(magnitude, load_bits(p)));
            }
            return largest(top);
        } else {
            // Sixteen-bit floats are in integer order, too, so they need not be widened first.
            const __m256i magnitude = _mm256_set1_epi16(0x7fff);
            __m256i top = _mm256_setzero_si256();
            for (int64_t i = 0; i < dim; i += 2 * lanes) {
                const char* p = in + 2 * (i + 2 * lanes <= dim ? i : dim - 2 * lanes);
                top = _mm256_max_epu16(top, _mm256_and_si256(magnitude, load_bits(p)));
            }
            const __m256i odd = _mm256_srli_epi32(top, 16);
            const uint32_t half = largest(_mm256_max_epu32(odd, _mm256_and_si256(top, _mm256_set1_epi32(0xffff))));
            if constexpr (D == Dtype::bf16) return half << 16;
            return _mm_cvtsi128_si32(_mm_castps_si128(_mm_cvtph_ps(_mm_cvtsi32_si128(half))));
        }
    }

    template <Dtype D>
    static void code(const char* row, int64_t dim, const Divisor& by, int8_t* codes) {
        constexpr int64_t bytes = lanes * item<D>;
        const __m256 half = _mm256_set1_ps(by.half), reciprocal = _mm256_set1_ps(by.reciprocal);
        const auto twice = [&](const char* p) { return _mm256_cvttps_epi32(quotient(load<D>(p), half, reciprocal)); };
        for (int64_t i = 0; i < dim; i += step) {
            if (i + step > dim) i = dim - step;
            const char* in = row + i * item<D>;
            const __m256i packed = pack_halved(twice(in), twice(in + bytes), twice(in + 2 * bytes), twice(in + 3 * bytes));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), packed);
        }
    }

    template <Dtype D>
    static void restore(const int8_t* codes, int64_t dim, float row_scale, char* out) {
        const __m256 scale = _mm256_set1_ps(row_scale);
        for (int64_t i = 0; i < dim; i += lanes) {
            if (i + lanes > dim) i = dim - lanes;
            store<D>(out + i * item<D>, _mm256_mul_ps(widen(codes + i), scale));
        }
    }
};

}  // namespace

const RowKernels rows_avx2 = kernels_of<Avx2>();

}  // namespace kvmmap
