// The multiplications of attention in f32, W numbers at a time: over rows of f32, and over int8 codes where there is no
// instruction for bytes. Codes are widened as they are used; the numbers of a row lie in the lanes for keys as for values.
#pragma once

#include <cmath>

#include "attend_tiles.h"
#include "widen.h"

namespace kvmmap {
namespace {

template <int W, class Row = int8_t>
struct Floats {
    static constexpr int lanes = W;
    using L = Lanes<W>;
    using F = typename L::F;
    using Number = Row;
    // The largest number of a row.
    static constexpr float most_number = std::is_same_v<Row, int8_t> ? 128.0f : std::is_same_v<Row, F16> ? 65504.0f : 0x1.fffffep127f;

    struct Weights {
        alignas(64) float w[4][tile];
    };

    static int64_t width(int64_t value_dim) { return (value_dim + W - 1) / W * W; }
    static constexpr int64_t query_header = 16;  // floats before the numbers of a query: what products are to be multiplied with
    static int64_t query_bytes(int64_t dim) { return (query_header + width(dim)) * 4; }

    // Queries whose products could overflow are smaller by a power of two, which scores are multiplied with: infinities of both
    // signs would make a NaN of a sum.
    static void prepare(const float* query, int64_t dim, float factor, void* prepared) {
        float* out = static_cast<float*>(prepared) + query_header;
        double size = 0;
        for (int64_t d = 0; d < dim; ++d) size = std::max(size, std::fabs(static_cast<double>(query[d])));
        size *= std::fabs(static_cast<double>(factor)) * static_cast<double>(2 * dim);
        constexpr double most = 0x1p127 / static_cast<double>(most_number);
        int exponent = 0;
        if (size > most) std::frexp(size / most, &exponent);
        // Bounded, so that a product of zero stays zero.
        static_cast<float*>(prepared)[0] = static_cast<float>(std::ldexp(1.0, std::min(exponent, 126)));
        const double smaller = static_cast<double>(factor) * std::ldexp(1.0, -exponent);
        for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(query[d] * smaller);
        for (int64_t d = dim; d < width(dim); ++d) out[d] = 0;
    }

    static void finish(const float* sums, int64_t value_dim, float factor, float* out) {
        for (int64_t d = 0; d < value_dim; ++d) out[d] = sums[d] * factor;
    }

    static float highest(F v) { return L::highest(v); }
    static float sum(F v) { return L::sum(v); }

    Floats(int64_t dim, int64_t value_dim) : dim_(dim), value_dim_(value_dim) {}

    void load(const Row* keys, int64_t key_stride, const Row* values, int64_t value_stride, int64_t count) {
        keys_ = keys, key_stride_ = key_stride, values_ = values, value_stride_ = value_stride, count_ = count;
    }

    template <int R>
    void scores(const char* const (&queries)[R], float (&out)[R][tile], Ahead&) const {
        const float* q[R];
        float worth[R];
        for (int r = 0; r < R; ++r) worth[r] = *reinterpret_cast<const float*>(queries[r]), q[r] = reinterpret_cast<const float*>(queries[r]) + query_header;
        for (int64_t j = 0; j < count_; ++j) {
            const Row* key = keys_ + j * key_stride_;
            F sums[R] = {};
            int64_t d = 0;
            for (; d + W <= dim_; d += W) {
                const F k = widen<W>(key + d);
                for (int r = 0; r < R; ++r) sums[r] += k * L::load(q[r] + d);
            }
            if (d < dim_) {
                const F k = widen_some(key + d, dim_ - d);
                for (int r = 0; r < R; ++r) sums[r] += k * L::load(q[r] + d);
            }
            for (int r = 0; r < R; ++r) out[r][j] = L::sum(sums[r]) * worth[r];
        }
        for (int r = 0; r < R; ++r)
            for (int64_t j = count_; j < tile; ++j) out[r][j] = 0;
    }

    static void set(Weights& weights, int r, const float* w) { std::memcpy(weights.w[r], w, sizeof weights.w[r]); }

    template <int R>
    void add(const Weights& weights, float* const (&sums)[R], Ahead&) const {
        int64_t d = 0;
        for (; d + 2 * W <= value_dim_; d += 2 * W) add_numbers<R, 2>(weights, sums, d);
        for (; d + W <= value_dim_; d += W) add_numbers<R, 1>(weights, sums, d);
        if (d < value_dim_) add_last<R>(weights, sums, d);
    }

  private:
    static F widen_some(const Row* codes, int64_t count) {
        Row padded[W] = {};
        std::memcpy(padded, codes, count * sizeof(Row));
        return widen<W>(padded);
    }

    // N vectors of numbers from d on, over all positions of the tile, in registers. A tile is summed by itself first: one
    // after the other, thousands of terms lose digits.
    template <int R, int N>
    void add_numbers(const Weights& weights, float* const (&sums)[R], int64_t d) const {
        F s[R][N] = {};
        for (int64_t j = 0; j < count_; ++j) {
            F v[N];
            for (int i = 0; i < N; ++i) v[i] = widen<W>(values_ + j * value_stride_ + d + i * W);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < N; ++i) s[r][i] += v[i] * weights.w[r][j];
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < N; ++i) {
                float* sum = sums[r] + d + i * W;
                L::store(sum, L::load(sum) + s[r][i]);
            }
    }

    template <int R>
    void add_last(const Weights& weights, float* const (&sums)[R], int64_t d) const {
        F s[R] = {};
        for (int64_t j = 0; j < count_; ++j) {
            const F v = widen_some(values_ + j * value_stride_ + d, value_dim_ - d);
            for (int r = 0; r < R; ++r) s[r] += v * weights.w[r][j];
        }
        for (int r = 0; r < R; ++r) L::store(sums[r] + d, L::load(sums[r] + d) + s[r]);
    }

    int64_t dim_, value_dim_, key_stride_, value_stride_, count_;
    const Row *keys_, *values_;
};

}  // namespace
}  // namespace kvmmap
