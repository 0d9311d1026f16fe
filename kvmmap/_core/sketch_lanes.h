// The kernels of sketches over vectors of W numbers: one source, compiled once for each instruction set by the files
// that include it. Plain loops as compilers turn them into vectors took 2.4 times as long to sketch, and twice (with
// AVX-512) to eight times (without) as long to bound.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "half.h"
#include "lanes.h"
#include "sketch.h"
#include "widen.h"

namespace kvmmap {
namespace {

template <int W>
struct Sketching {
    using L = Lanes<W>;
    using F = typename L::F;
    using I = typename L::I;
    typedef uint16_t H __attribute__((vector_size(2 * W)));

    static F min(F a, F b) { return a < b ? a : b; }

    static F widen_bf16(const uint16_t* p) {
        H half;
        std::memcpy(&half, p, sizeof half);
        const I bits = __builtin_convertvector(half, I) << 16;
        F v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }

    // The nearest bf16 that is not above (not below) a number. Rounding away from zero may reach infinity.
    static uint16_t below(float v) {
        const uint32_t bits = f32_bits(v);
        return static_cast<uint16_t>((bits >> 31 ? bits + 0xffffu : bits) >> 16);
    }
    static uint16_t above(float v) {
        const uint32_t bits = f32_bits(v);
        return static_cast<uint16_t>((bits >> 31 ? bits : bits + 0xffffu) >> 16);
    }

    // N vectors of channels over some tokens' rows, least and greatest in registers meanwhile.
    template <int N>
    static void fold(const int8_t* codes, int64_t stride, const float* scales, int64_t heads, int64_t tokens,
                     float* least, float* greatest) {
        F low[N], high[N];
        for (int i = 0; i < N; ++i) low[i] = L::load(least + i * W), high[i] = L::load(greatest + i * W);
        for (int64_t token = 0; token < tokens; ++token, codes += stride, scales += heads) {
            const F scale = L::all(*scales);
            for (int i = 0; i < N; ++i) {
                const F x = widen<W>(codes + i * W) * scale;
                low[i] = min(x, low[i]);
                high[i] = L::max(x, high[i]);
            }
        }
        for (int i = 0; i < N; ++i) L::store(least + i * W, low[i]), L::store(greatest + i * W, high[i]);
    }

    // One head's rows of some tokens.
    static void fold_head(const int8_t* codes, int64_t stride, const float* scales, int64_t heads, int64_t tokens,
                          int64_t dim, float* least, float* greatest) {
        int64_t d = 0;
        for (; d + 4 * W <= dim; d += 4 * W) fold<4>(codes + d, stride, scales, heads, tokens, least + d, greatest + d);
        for (; d + W <= dim; d += W) fold<1>(codes + d, stride, scales, heads, tokens, least + d, greatest + d);
        for (; d < dim; ++d)
            for (int64_t token = 0; token < tokens; ++token) {
                const float x = static_cast<float>(codes[token * stride + d]) * scales[token * heads];
                least[d] = x < least[d] ? x : least[d];
                greatest[d] = x > greatest[d] ? x : greatest[d];
            }
    }

    static void sketch(const int8_t* codes, const float* scales, int64_t blocks, int64_t tokens, int64_t heads,
                       int64_t dim, float* room, uint16_t* sketches) {
        constexpr int64_t strip = 16;  // tokens whose rows, of all heads, are in the first-level cache at once
        const int64_t width = heads * dim;
        float *least = room, *greatest = room + width;
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t i = 0; i < width; ++i) least[i] = std::numeric_limits<float>::infinity();
            for (int64_t i = 0; i < width; ++i) greatest[i] = -std::numeric_limits<float>::infinity();
            for (int64_t done = 0; done < tokens; done += strip) {
                const int64_t count = tokens - done < strip ? tokens - done : strip;
                for (int64_t head = 0; head < heads; ++head)
                    fold_head(codes + head * dim, width, scales + head, heads, count, dim, least + head * dim,
                              greatest + head * dim);
                codes += count * width, scales += count * heads;
            }
            for (int64_t head = 0; head < heads; ++head, sketches += 2 * dim)
                for (int64_t d = 0; d < dim; ++d) {
                    sketches[d] = below(least[head * dim + d]);
                    sketches[dim + d] = above(greatest[head * dim + d]);
                }
        }
    }

    // R query heads against one sketch; queries as `parts` has them, `stride` floats each.
    template <int R>
    static void bound_some(const float* parts, int64_t stride, const uint16_t* sketch, int64_t dim, float* bounds,
                           int64_t blocks) {
        const uint16_t *least = sketch, *greatest = sketch + dim;
        F sums[R] = {};
        int64_t d = 0;
        for (; d + W <= dim; d += W) {
            const F low = widen_bf16(least + d), high = widen_bf16(greatest + d);
            for (int r = 0; r < R; ++r)
                sums[r] += L::load(parts + r * stride + d) * low + L::load(parts + r * stride + dim + d) * high;
        }
        for (int r = 0; r < R; ++r) {
            float sum = L::sum(sums[r]);
            for (int64_t i = d; i < dim; ++i)
                sum += parts[r * stride + i] * bf16_to_f32(least[i]) +
                       parts[r * stride + dim + i] * bf16_to_f32(greatest[i]);
            // Infinite keys tell nothing.
            bounds[r * blocks] = sum == sum ? sum : std::numeric_limits<float>::infinity();
        }
    }

    static void bound(const float* parts, int64_t group, const uint16_t* sketches, int64_t blocks, int64_t heads,
                      int64_t dim, float* bounds) {
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t head = 0; head < heads; ++head, sketches += 2 * dim) {
                const float* mine = parts + head * group * 2 * dim;
                float* out = bounds + head * group * blocks + block;
                int64_t r = 0;
                for (; r + 4 <= group; r += 4)
                    bound_some<4>(mine + r * 2 * dim, 2 * dim, sketches, dim, out + r * blocks, blocks);
                for (; r < group; ++r)
                    bound_some<1>(mine + r * 2 * dim, 2 * dim, sketches, dim, out + r * blocks, blocks);
            }
    }
};

template <int W>
constexpr SketchKernels sketching = {Sketching<W>::sketch, Sketching<W>::bound};

}  // namespace
}  // namespace kvmmap
