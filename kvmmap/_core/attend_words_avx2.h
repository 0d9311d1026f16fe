// The multiplications of attention for queries that were given in 16 bits, where there are 256-bit instructions: int8 codes with
// queries and weights of 15 bits. Codes are widened to 16 bits, 16 at a time, and multiplied and added in pairs (vpmaddwd), where
// f32 needs two instructions to widen 8 and one to multiply them. Sums are exact.
//
// AVX-VNNI's vpdpwssd, which multiplies and adds to a sum at once, was slower: each waits five cycles for the one before.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "attend_tiles.h"

namespace kvmmap {
namespace {

class Words {
  public:
    static constexpr int lanes = 8;
    using L = Lanes<8>;
    using F = L::F;
    using Number = int8_t;

    struct Weights {
        alignas(32) int16_t w[4][tile];
        float worth[4];
    };

    static int64_t width(int64_t value_dim) { return to_16(value_dim); }
    static int64_t query_bytes(int64_t dim) { return header + 2 * to_16(dim); }

    static void prepare(const float* query, int64_t dim, float factor, void* prepared) {
        float size = 0;
        for (int64_t d = 0; d < dim; ++d) size = std::max(size, std::fabs(query[d]));
        const double inverse = size > 0 ? most / static_cast<double>(size) : 0;
        auto* words = reinterpret_cast<int16_t*>(static_cast<char*>(prepared) + header);
        for (int64_t d = 0; d < dim; ++d) words[d] = static_cast<int16_t>(std::lrint(query[d] * inverse));
        for (int64_t d = dim; d < to_16(dim); ++d) words[d] = 0;
        // Bounded, so that a product of zero stays zero.
        const float worth = static_cast<float>(std::min(size / most * static_cast<double>(factor), 3e38));
        std::memcpy(prepared, &worth, sizeof worth);
    }

    static void finish(const float* sums, int64_t value_dim, float factor, float* out) {
        for (int64_t d = 0; d < value_dim; ++d) out[d] = sums[d] * factor;
    }

    static float highest(F v) { return L::highest(v); }
    static float sum(F v) { return L::sum(v); }

    Words(int64_t dim, int64_t value_dim)
        : dim_(dim), value_dim_(value_dim), padded_keys_(tile * to_16(dim)), padded_values_(tile * to_16(value_dim)) {}

    void load(const int8_t* keys, int64_t key_stride, const int8_t* values, int64_t value_stride, int64_t count) {
        whole(keys, key_stride, count, dim_, padded_keys_, keys_, key_stride_);
        whole(values, value_stride, count, value_dim_, padded_values_, values_, value_stride_);
    }

    template <int R>
    void scores(const char* const (&queries)[R], float (&out)[R][tile], Ahead&) const {
        float worth[R];
        for (int r = 0; r < R; ++r) std::memcpy(&worth[r], queries[r], sizeof worth[r]);
        for (int64_t j = 0; j < tile; j += 4) {
            __m256i first[R], second[R];  // [two positions] of pairs of lanes
            two_positions<R>(queries, keys_ + j * key_stride_, first);
            two_positions<R>(queries, keys_ + (j + 2) * key_stride_, second);
            for (int r = 0; r < R; ++r) {
                const __m256 sums = _mm256_cvtepi32_ps(_mm256_hadd_epi32(first[r], second[r]));
                const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
                _mm_storeu_ps(out[r] + j, _mm_mul_ps(four, _mm_set1_ps(worth[r])));
            }
        }
    }

    // The largest weight of a tile becomes a number of 15 bits, by a power of two.
    static void set(Weights& weights, int r, const float* w) {
        F highest_w = L::load(w);
        for (int64_t j = 8; j < tile; j += 8) highest_w = L::max(highest_w, L::load(w + j));
        int exponent = 0;
        std::frexp(highest(highest_w), &exponent);
        exponent = std::max(exponent, -100);  // what is smaller is nothing beside any sum
        const __m256 factor = _mm256_set1_ps(std::ldexp(1.0f, 15 - exponent));
        for (int64_t j = 0; j < tile; j += 16) {
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(w + j), factor));
            const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(w + j + 8), factor));
            // Narrowing keeps to what 16 bits hold, and goes by halves of a register.
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
            _mm256_store_si256(reinterpret_cast<__m256i*>(weights.w[r] + j), words);
        }
        weights.worth[r] = std::ldexp(1.0f, exponent - 15);
    }

    template <int R>
    void add(const Weights& weights, float* const (&sums)[R], Ahead&) const {
        for (int64_t d = 0; d < value_dim_; d += 16) {
            __m256i low[R], high[R];
            for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_si256();
            const int8_t* value = values_ + d;
            for (int64_t j = 0; j < tile; j += 2, value += 2 * value_stride_) {
                const __m128i a = load_16(value), b = load_16(value + value_stride_);
                const __m256i first = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
                const __m256i second = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
                for (int r = 0; r < R; ++r) {
                    int32_t pair;
                    std::memcpy(&pair, weights.w[r] + j, sizeof pair);
                    const __m256i w = _mm256_set1_epi32(pair);
                    add_products(low[r], first, w), add_products(high[r], second, w);
                }
            }
            for (int r = 0; r < R; ++r) {
                add_to(sums[r] + d, low[r], weights.worth[r]);
                add_to(sums[r] + d + 8, high[r], weights.worth[r]);
            }
        }
    }

  private:
    static constexpr int64_t header = 32;  // bytes before the words of a query: what a unit is worth
    static constexpr double most = 32767;

    static int64_t to_16(int64_t n) { return (n + 15) / 16 * 16; }
    static __m128i load_16(const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

    // Eight sums of 32 bits += two products of 16 bits each.
    [[gnu::always_inline]] static void add_products(__m256i& sum, __m256i a, __m256i b) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }

    // Sums of R rows at two positions, four lanes of each, side by side in each half.
    template <int R>
    [[gnu::always_inline]] void two_positions(const char* const (&queries)[R], const int8_t* key, __m256i (&out)[R]) const {
        __m256i a[R], b[R];
        for (int r = 0; r < R; ++r) a[r] = b[r] = _mm256_setzero_si256();
        for (int64_t d = 0; d < dim_; d += 16) {
            const __m256i first = _mm256_cvtepi8_epi16(load_16(key + d));
            const __m256i second = _mm256_cvtepi8_epi16(load_16(key + key_stride_ + d));
            for (int r = 0; r < R; ++r) {
                const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries[r] + header + 2 * d));
                add_products(a[r], first, q), add_products(b[r], second, q);
            }
        }
        for (int r = 0; r < R; ++r) out[r] = _mm256_hadd_epi32(a[r], b[r]);
    }

    static void add_to(float* sums, __m256i more, float worth) {
        _mm256_storeu_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(more), _mm256_set1_ps(worth), _mm256_loadu_ps(sums)));
    }

    // Rows that are not 64, or not of a multiple of 16 numbers, are padded with zeros: they weigh nothing, or are hidden.
    static void whole(const int8_t* from, int64_t stride, int64_t count, int64_t dim, std::vector<int8_t>& padded,
                      const int8_t*& rows, int64_t& row_stride) {
        rows = from, row_stride = stride;
        if (count == tile && dim % 16 == 0) return;
        const int64_t wide = to_16(dim);
        for (int64_t i = 0; i < count; ++i) std::memcpy(padded.data() + i * wide, from + i * stride, dim);
        std::fill(padded.begin() + count * wide, padded.end(), int8_t{0});
        rows = padded.data(), row_stride = wide;
    }

    int64_t dim_, value_dim_, key_stride_, value_stride_;
    const int8_t *keys_, *values_;
    std::vector<int8_t> padded_keys_, padded_values_;
};

}  // namespace
}  // namespace kvmmap
