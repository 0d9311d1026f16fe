// The row codec with AVX-512: rows of any length, the last vector of which is masked.
#include <immintrin.h>

#include "floats_avx512.h"
#include "pack_avx512.h"
#include "rows_batch.h"

namespace kvmmap {
namespace {

constexpr int64_t lanes = 16;

inline __m512 widen(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

struct Avx512 {
    static constexpr int64_t step = 1;

    template <Dtype D>
    static uint32_t absmax_bits(const char* in, int64_t dim) {
        if constexpr (D == Dtype::f32) {
            const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
            __m512i top = _mm512_setzero_si512();
            int64_t i = 0;
            for (; i + 16 <= dim; i += 16)
                top = _mm512_max_epu32(top, _mm512_and_si512(magnitude, _mm512_loadu_si512(in + 4 * i)));
            const __m512i tail = _mm512_maskz_loadu_epi32(first16(dim - i), in + 4 * i);
            return _mm512_reduce_max_epu32(_mm512_max_epu32(top, _mm512_and_si512(magnitude, tail)));
        } else {
            // Sixteen-bit floats are in integer order, too, so they need not be widened first.
            const __m512i magnitude = _mm512_set1_epi16(0x7fff);
            __m512i top = _mm512_setzero_si512();
            int64_t i = 0;
            for (; i + 32 <= dim; i += 32)
                top = _mm512_max_epu16(top, _mm512_and_si512(magnitude, _mm512_loadu_si512(in + 2 * i)));
            const __m512i tail = _mm512_maskz_loadu_epi16(first32(dim - i), in + 2 * i);
            top = _mm512_max_epu16(top, _mm512_and_si512(magnitude, tail));
            const __m512i odd = _mm512_srli_epi32(top, 16);
            const __m512i even = _mm512_and_si512(top, _mm512_set1_epi32(0xffff));
            const uint32_t half = _mm512_reduce_max_epu32(_mm512_max_epu32(odd, even));
            if constexpr (D == Dtype::bf16) return half << 16;
            return _mm_cvtsi128_si32(_mm_castps_si128(_mm_cvtph_ps(_mm_cvtsi32_si128(half))));
        }
    }

    template <Dtype D>
    static void code(const char* in, int64_t dim, const Divisor& by, int8_t* codes) {
        constexpr int64_t bytes = lanes * item<D>;
        const __m512 half = _mm512_set1_ps(by.half), reciprocal = _mm512_set1_ps(by.reciprocal);
        const auto twice = [&](const char* p, __mmask16 mask = 0xffff) {
            return _mm512_cvttps_epi32(quotient(load<D>(p, mask), half, reciprocal));
        };
        int64_t i = 0;
        for (; i + 4 * lanes <= dim; i += 4 * lanes, in += 4 * bytes)
            _mm512_storeu_si512(codes + i, pack_halved(twice(in), twice(in + bytes), twice(in + 2 * bytes),
                                                       twice(in + 3 * bytes)));
        for (; i + lanes <= dim; i += lanes, in += bytes) _mm_storeu_epi8(codes + i, _mm512_cvtsepi32_epi8(halved(twice(in))));
        if (i < dim) {
            const __mmask16 mask = first16(dim - i);
            _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtsepi32_epi8(halved(twice(in, mask))));
        }
    }

    template <Dtype D>
    static void restore(const int8_t* codes, int64_t dim, float row_scale, char* out) {
        const __m512 scale = _mm512_set1_ps(row_scale);
        int64_t i = 0;
        for (; i + lanes <= dim; i += lanes)
            store<D>(out + i * item<D>, _mm512_mul_ps(widen(_mm_loadu_epi8(codes + i)), scale));
        if (i < dim) {
            const __mmask16 mask = first16(dim - i);
            store<D>(out + i * item<D>, _mm512_mul_ps(widen(_mm_maskz_loadu_epi8(mask, codes + i)), scale), mask);
        }
    }
};

}  // namespace

const RowKernels rows_avx512 = kernels_of<Avx512>();

}  // namespace kvmmap
