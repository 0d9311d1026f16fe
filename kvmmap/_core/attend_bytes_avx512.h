// What the tiles of attend_tiles.h multiply with: digits of bytes.
#pragma once

#include "attend_products_avx512.h"
#include "attend_tiles.h"

namespace kvmmap {
namespace {

template <int digits>
class Bytes {
  public:
    static constexpr int lanes = 16;
    using Number = int8_t;

    struct Weights {
        alignas(64) char bytes[4][tile / 4 * step_bytes<digits>];
        float worth[4];
    };

    static int64_t width(int64_t value_dim) { return to_64(value_dim); }
    static int64_t query_bytes(int64_t dim) { return query_header + to_64(dim) / 4 * step_bytes<digits>; }

    // Within 64 numbers the bytes of four positions were interleaved by unpacking, within groups of 16.
    static void finish(const float* sums, int64_t value_dim, float factor, float* out) {
        const __m128 scale = _mm_set1_ps(factor);
        for (int64_t d = 0; d < value_dim; d += 4) {
            const __m128 four = _mm_mul_ps(_mm_load_ps(sums + d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4), scale);
            _mm_mask_storeu_ps(out + d, value_dim - d < 4 ? (1 << (value_dim - d)) - 1 : 15, four);
        }
    }

    static float highest(__m512 v) { return kvmmap::highest(v); }
    static float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

    Bytes(int64_t dim, int64_t value_dim)
        : dim_(dim), value_dim_(value_dim), padded_keys_(tile * to_64(dim)), padded_values_(tile * to_64(value_dim)) {}

    void load(const int8_t* keys, int64_t key_stride, const int8_t* values, int64_t value_stride, int64_t count) {
        whole(keys, key_stride, count, dim_, padded_keys_, keys_, key_stride_);
        whole(values, value_stride, count, value_dim_, padded_values_, values_, value_stride_);
    }

    template <int R>
    void scores(const char* const (&queries)[R], float (&out)[R][tile], Ahead& ahead) const {
        for (int64_t j = 0; j < tile; j += 16)
            multiply_keys<digits, R>(Int8Rows(dim_), at(keys_ + j * key_stride_), key_stride_, dim_, queries, out[0] + j, tile, ahead);
    }

    static void set(Weights& weights, int r, const float* w) { weights.worth[r] = store_weights<digits>(w, tile, weights.bytes[r]); }

    template <int R>
    void add(const Weights& weights, float* const (&sums)[R], Ahead& ahead) const {
        const WeightRows rows{weights.bytes[0], sizeof weights.bytes[0], weights.worth, sums};
        for (int64_t d = 0; d < value_dim_; d += 64)
            multiply_values<digits, R>(Int8Rows(value_dim_), at(values_), d, 16 * value_stride_, value_stride_, tile / 16, rows, ahead);
    }

  private:
    static const char* at(const int8_t* codes) { return reinterpret_cast<const char*>(codes); }

    // Rows that are not 64, or not of a multiple of 64 numbers, are padded with zeros: they weigh nothing, or are hidden.
    static void whole(const int8_t* from, int64_t stride, int64_t count, int64_t dim, std::vector<int8_t>& padded,
                      const int8_t*& rows, int64_t& row_stride) {
        rows = from, row_stride = stride;
        if (count == tile && dim % 64 == 0) return;
        const int64_t wide = to_64(dim);
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
