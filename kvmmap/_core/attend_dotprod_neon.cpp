// Attention with the dot products of bytes (SDOT, ARMv8.2): four products of four bytes an instruction.
//
// Of keys and queries, 16 numbers of a row are an operand, and sums are put together across lanes at the end. Values are
// interleaved once a tile, so that a lane has a number of four positions, and their weights are an element of a register.
#include "attend_digits_neon.h"

namespace kvmmap {
namespace {

template <int digits>
struct DotProducts {
    static constexpr int64_t step = 16;

    // Two positions at a time: with four rows of queries, their sums fill the registers.
    template <int R>
    static void scores(const int8_t* const (&queries)[R], const float (&worth)[R], const int8_t* keys, int64_t stride, int64_t dim,
                       float (&out)[R][tile]) {
        for (int64_t j = 0; j < tile; j += 2, keys += 2 * stride) {
            int32x4_t first[R][digits], second[R][digits];
            for (int r = 0; r < R; ++r)
                for (int g = 0; g < digits; ++g) first[r][g] = second[r][g] = vdupq_n_s32(0);
            for (int64_t d = 0; d < dim; d += 16) {
                const int8x16_t a = vld1q_s8(keys + d), b = vld1q_s8(keys + stride + d);
                for (int r = 0; r < R; ++r)
                    for (int g = 0; g < digits; ++g) {
                        const int8x16_t q = vld1q_s8(queries[r] + d * digits + 16 * g);
                        first[r][g] = vdotq_s32(first[r][g], a, q);
                        second[r][g] = vdotq_s32(second[r][g], b, q);
                    }
            }
            for (int r = 0; r < R; ++r) {
                // [a low, b low, a next, b next]
                const int32x4_t low = vpaddq_s32(vpaddq_s32(first[r][0], second[r][0]), vpaddq_s32(first[r][1], second[r][1]));
                const float32x4_t both = vcvtq_f32_s32(low);
                float32x2_t sum = vfma_n_f32(vget_low_f32(both), vget_high_f32(both), 256.0f);
                if constexpr (digits == 3) {
                    const int32x4_t pairs = vpaddq_s32(first[r][2], second[r][2]);
                    sum = vfma_n_f32(sum, vcvt_f32_s32(vget_low_s32(vpaddq_s32(pairs, pairs))), 65536.0f);
                }
                vst1_f32(out[r] + j, vmul_n_f32(sum, worth[r]));
            }
        }
    }

    // [16 numbers][four positions][number][position]
    static void pack(const int8_t* rows, int64_t stride, int64_t dim, int8_t* out) {
        for (int64_t j = 0; j < tile; j += 4, rows += 4 * stride, out += 64) {
            int8_t* to = out;
            for (int64_t d = 0; d < dim; d += 16, to += 16 * tile) {
                const int8x16_t a = vld1q_s8(rows + d), b = vld1q_s8(rows + stride + d);
                const int8x16_t c = vld1q_s8(rows + 2 * stride + d), e = vld1q_s8(rows + 3 * stride + d);
                const int16x8_t ab = vreinterpretq_s16_s8(vzip1q_s8(a, b)), ab_high = vreinterpretq_s16_s8(vzip2q_s8(a, b));
                const int16x8_t ce = vreinterpretq_s16_s8(vzip1q_s8(c, e)), ce_high = vreinterpretq_s16_s8(vzip2q_s8(c, e));
                vst1q_s8(to, vreinterpretq_s8_s16(vzip1q_s16(ab, ce)));
                vst1q_s8(to + 16, vreinterpretq_s8_s16(vzip2q_s16(ab, ce)));
                vst1q_s8(to + 32, vreinterpretq_s8_s16(vzip1q_s16(ab_high, ce_high)));
                vst1q_s8(to + 48, vreinterpretq_s8_s16(vzip2q_s16(ab_high, ce_high)));
            }
        }
    }

    // One digit of all rows after the other: their sums of 16 numbers fill half of the registers.
    template <int R>
    static void add(const int8_t (&weights)[4][tile * digits], const float (&worth)[4], const int8_t* values, float* const (&sums)[R], int64_t d) {
        float unit = 1;
        for (int g = 0; g < digits; ++g, unit *= 256) {
            int32x4_t s[R][4];
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 4; ++i) s[r][i] = vdupq_n_s32(0);
            const int8_t* p = values;
            for (int64_t j = 0; j < tile; j += 16, p += 256) {
                int8x16_t w[R];
                for (int r = 0; r < R; ++r) w[r] = vld1q_s8(weights[r] + j * digits + 16 * g);
                add_four<R, 0>(w, p, s), add_four<R, 1>(w, p + 64, s), add_four<R, 2>(w, p + 128, s), add_four<R, 3>(w, p + 192, s);
            }
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 4; ++i) add_to(sums[r] + d + 4 * i, vcvtq_f32_s32(s[r][i]), worth[r] * unit);
        }
    }

  private:
    template <int R, int element>
    [[gnu::always_inline]] static void add_four(const int8x16_t (&w)[R], const int8_t* values, int32x4_t (&s)[R][4]) {
        for (int i = 0; i < 4; ++i) {
            const int8x16_t v = vld1q_s8(values + 16 * i);
            for (int r = 0; r < R; ++r) s[r][i] = vdotq_laneq_s32(s[r][i], v, w[r], element);
        }
    }
};

template <int digits>
constexpr AttendKernel dot_kernel() {
    return kernel_of<DigitEngine<digits, DotProducts<digits>>>();
}

}  // namespace

const AttendKernel attend_dotprod = dot_kernel<3>();
const AttendKernel attend_short_dotprod = dot_kernel<2>();

}  // namespace kvmmap
