// Numbers as signed bytes, for the products of bytes of AArch64 (SDOT, SMMLA): what kernels of either share.
//
// Keys and values are bytes already. Queries and weights become whole numbers, split into signed digits of 8 bits: three of f32
// queries, two of those that were given in 16 bits. A number of n digits is at most 127 * 256^(n - 1), so that no digit
// overflows. Sums of products are exact. Widening codes to f32 takes 11 instructions for 16 of them, and multiplying one for 4.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attend_tiles.h"

namespace kvmmap {
namespace {

constexpr int64_t to_16(int64_t n) { return (n + 15) / 16 * 16; }

// Products says how digits lie and multiplies them:
//
//   step                          digits of so many numbers lie side by side, low ones before higher ones
//   pack(rows, stride, dim, out)  values of a tile, in the order it wants them
//   scores<R>(...), add<R>(...)   as engines have them, of padded rows
template <int digits, class Products>
class DigitEngine {
    static constexpr int64_t header = 16;  // bytes before the digits of a query: what a unit is worth
    static constexpr float most = digits == 2 ? 127 * 256 : 127 * 65536;

    // The digits of number i begin here; those of the next place are a step behind.
    static constexpr int64_t at(int64_t i) { return i / Products::step * Products::step * digits + i % Products::step; }

  public:
    static constexpr int lanes = 4;
    using L = Lanes<4>;
    using F = L::F;
    using Number = int8_t;

    struct Weights {
        alignas(16) int8_t bytes[4][tile * digits];
        float worth[4];
    };

    static int64_t width(int64_t value_dim) { return to_16(value_dim); }
    static int64_t query_bytes(int64_t dim) { return header + digits * to_16(dim); }

    static void prepare(const float* query, int64_t dim, float factor, void* prepared) {
        float size = 0;
        for (int64_t d = 0; d < dim; ++d) size = std::max(size, std::fabs(query[d]));
        const double inverse = size > 0 ? static_cast<double>(most) / static_cast<double>(size) : 0;
        auto* out = static_cast<int8_t*>(prepared) + header;
        std::fill_n(out, digits * to_16(dim), int8_t{0});
        for (int64_t d = 0; d < dim; ++d) {
            auto whole = static_cast<int32_t>(std::lrint(query[d] * inverse));
            for (int g = 0; g < digits; ++g, whole = (whole + 128) >> 8) out[at(d) + g * Products::step] = static_cast<int8_t>(whole);
        }
        // Bounded, so that a product of zero stays zero.
        const float worth = static_cast<float>(std::min(static_cast<double>(size) / static_cast<double>(most) * static_cast<double>(factor), 3e38));
        std::memcpy(prepared, &worth, sizeof worth);
    }

    static void finish(const float* sums, int64_t value_dim, float factor, float* out) {
        for (int64_t d = 0; d < value_dim; ++d) out[d] = sums[d] * factor;
    }

    static float highest(F v) { return L::highest(v); }
    static float sum(F v) { return L::sum(v); }

    DigitEngine(int64_t dim, int64_t value_dim)
        : dim_(dim), value_dim_(value_dim), padded_keys_(tile * to_16(dim)), padded_values_(tile * to_16(value_dim)),
          packed_(tile * to_16(value_dim)) {}

    void load(const int8_t* keys, int64_t key_stride, const int8_t* values, int64_t value_stride, int64_t count) {
        whole(keys, key_stride, count, dim_, padded_keys_, keys_, key_stride_);
        whole(values, value_stride, count, value_dim_, padded_values_, values, value_stride);
        Products::pack(values, value_stride, to_16(value_dim_), packed_.data());
    }

    template <int R>
    void scores(const char* const (&queries)[R], float (&out)[R][tile], Ahead&) const {
        float worth[R];
        const int8_t* rows[R];
        for (int r = 0; r < R; ++r) {
            std::memcpy(&worth[r], queries[r], sizeof worth[r]);
            rows[r] = reinterpret_cast<const int8_t*>(queries[r]) + header;
        }
        Products::template scores<R>(rows, worth, keys_, key_stride_, to_16(dim_), out);
    }

    // The largest weight of a tile becomes the largest number that the digits hold.
    static void set(Weights& weights, int r, const float* w) {
        F highest_w = L::load(w);
        for (int64_t j = 4; j < tile; j += 4) highest_w = L::max(highest_w, L::load(w + j));
        const float size = std::max(highest(highest_w), 0x1p-100f);  // what is smaller is nothing beside any sum
        const float32x4_t factor = vdupq_n_f32(most / size), top = vdupq_n_f32(most);
        for (int64_t j = 0; j < tile; j += 8) {
            // Rounded, a product may be a unit above what digits hold.
            int32x4_t a = vcvtnq_s32_f32(vminq_f32(vmulq_f32(vld1q_f32(w + j), factor), top));
            int32x4_t b = vcvtnq_s32_f32(vminq_f32(vmulq_f32(vld1q_f32(w + j + 4), factor), top));
            for (int g = 0; g < digits; ++g) {
                vst1_s8(weights.bytes[r] + at(j) + g * Products::step, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
                a = vshrq_n_s32(vaddq_s32(a, vdupq_n_s32(128)), 8);
                b = vshrq_n_s32(vaddq_s32(b, vdupq_n_s32(128)), 8);
            }
        }
        weights.worth[r] = size / most;
    }

    template <int R>
    void add(const Weights& weights, float* const (&sums)[R], Ahead&) const {
        for (int64_t d = 0; d < value_dim_; d += 16) Products::template add<R>(weights.bytes, weights.worth, packed_.data() + d * tile, sums, d);
    }

  private:
    // Rows that are not 64, or not of a multiple of 16 numbers, are padded with zeros: they weigh nothing, or are hidden.
    static void whole(const int8_t* from, int64_t stride, int64_t count, int64_t dim, std::vector<int8_t>& padded,
                      const int8_t*& rows, int64_t& row_stride) {
        rows = from, row_stride = stride;
        if (count == tile && dim % 16 == 0) return;
        const int64_t wide = to_16(dim);
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(padded.data() + i * wide, from + i * stride, dim);
            std::memset(padded.data() + i * wide + dim, 0, wide - dim);
        }
        std::fill(padded.begin() + count * wide, padded.end(), int8_t{0});
        rows = padded.data(), row_stride = wide;
    }

    int64_t dim_, value_dim_, key_stride_ = 0;
    const int8_t* keys_ = nullptr;
    std::vector<int8_t> padded_keys_, padded_values_;
    std::vector<int8_t> packed_;  // [16 numbers][positions and numbers, in the order of the products]
};

inline void add_to(float* sums, float32x4_t more, float worth) { vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), more, worth)); }

}  // namespace
}  // namespace kvmmap
