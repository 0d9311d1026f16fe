// Attention with the products of matrices of bytes (SMMLA, ARMv8.6): two rows of eight bytes with two others, an instruction.
//
// The rows are two digits of a query or a weight, and two positions of the keys, or two numbers of the values: so no sum
// runs across lanes. Values are interleaved once a tile, so that eight positions of a number lie side by side. Three digits
// would be two pairs with a zero, which takes more instructions than dot products do: f32 queries use those.
#include "attend_digits_neon.h"

namespace kvmmap {
namespace {

struct MatrixProducts {
    static constexpr int64_t step = 8;
    static constexpr int digits = 2;

    // Eight positions at a time: with four rows of queries, their sums fill half of the registers.
    template <int R>
    static void scores(const int8_t* const (&queries)[R], const float (&worth)[R], const int8_t* keys, int64_t stride, int64_t dim,
                       float (&out)[R][tile]) {
        for (int64_t j = 0; j < tile; j += 8, keys += 8 * stride) {
            int32x4_t s[R][4];
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 4; ++i) s[r][i] = vdupq_n_s32(0);
            for (int64_t d = 0; d < dim; d += 16) {
                int8x16_t low[4], high[4];  // eight numbers of two positions
                for (int i = 0; i < 4; ++i) {
                    const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(keys + 2 * i * stride + d));
                    const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(keys + (2 * i + 1) * stride + d));
                    low[i] = vreinterpretq_s8_s64(vzip1q_s64(a, b)), high[i] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
                }
                for (int r = 0; r < R; ++r) {
                    const int8x16_t first = vld1q_s8(queries[r] + d * digits), second = vld1q_s8(queries[r] + d * digits + 16);
                    for (int i = 0; i < 4; ++i) {
                        s[r][i] = vmmlaq_s32(s[r][i], first, low[i]);
                        s[r][i] = vmmlaq_s32(s[r][i], second, high[i]);
                    }
                }
            }
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 4; ++i) vst1_f32(out[r] + j + 2 * i, vmul_n_f32(two_digits(s[r][i]), worth[r]));
        }
    }

    // [16 numbers][eight positions][number][position]
    static void pack(const int8_t* rows, int64_t stride, int64_t dim, int8_t* out) {
        for (int64_t j = 0; j < tile; j += 8, rows += 8 * stride, out += 128) {
            int8_t* to = out;
            for (int64_t d = 0; d < dim; d += 16, to += 16 * tile) {
                int32x4_t fours[2][4];  // [half of the positions][four numbers][number] of four positions
                for (int half = 0; half < 2; ++half) {
                    const int8_t* p = rows + 4 * half * stride + d;
                    const int8x16_t a = vld1q_s8(p), b = vld1q_s8(p + stride), c = vld1q_s8(p + 2 * stride), e = vld1q_s8(p + 3 * stride);
                    const int16x8_t ab = vreinterpretq_s16_s8(vzip1q_s8(a, b)), ab_high = vreinterpretq_s16_s8(vzip2q_s8(a, b));
                    const int16x8_t ce = vreinterpretq_s16_s8(vzip1q_s8(c, e)), ce_high = vreinterpretq_s16_s8(vzip2q_s8(c, e));
                    fours[half][0] = vreinterpretq_s32_s16(vzip1q_s16(ab, ce));
                    fours[half][1] = vreinterpretq_s32_s16(vzip2q_s16(ab, ce));
                    fours[half][2] = vreinterpretq_s32_s16(vzip1q_s16(ab_high, ce_high));
                    fours[half][3] = vreinterpretq_s32_s16(vzip2q_s16(ab_high, ce_high));
                }
                for (int i = 0; i < 4; ++i) {
                    vst1q_s8(to + 32 * i, vreinterpretq_s8_s32(vzip1q_s32(fours[0][i], fours[1][i])));
                    vst1q_s8(to + 32 * i + 16, vreinterpretq_s8_s32(vzip2q_s32(fours[0][i], fours[1][i])));
                }
            }
        }
    }

    // Eight numbers at a time: of four rows, their sums fill half of the registers.
    template <int R>
    static void add(const int8_t (&weights)[4][tile * digits], const float (&worth)[4], const int8_t* values, float* const (&sums)[R], int64_t d) {
        for (int64_t half = 0; half < 2; ++half) {
            int32x4_t s[R][4];
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 4; ++i) s[r][i] = vdupq_n_s32(0);
            const int8_t* p = values + 64 * half;
            for (int64_t j = 0; j < tile; j += 8, p += 128) {
                int8x16_t w[R];
                for (int r = 0; r < R; ++r) w[r] = vld1q_s8(weights[r] + j * digits);
                for (int i = 0; i < 4; ++i) {
                    const int8x16_t v = vld1q_s8(p + 16 * i);
                    for (int r = 0; r < R; ++r) s[r][i] = vmmlaq_s32(s[r][i], w[r], v);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 4; i += 2)
                    add_to(sums[r] + d + 8 * half + 2 * i, vcombine_f32(two_digits(s[r][i]), two_digits(s[r][i + 1])), worth[r]);
        }
    }

  private:
    // [low of two, high of two] -> two
    static float32x2_t two_digits(int32x4_t sums) {
        const float32x4_t both = vcvtq_f32_s32(sums);
        return vfma_n_f32(vget_low_f32(both), vget_high_f32(both), 256.0f);
    }
};

}  // namespace

const AttendKernel attend_short_i8mm = kernel_of<DigitEngine<2, MatrixProducts>>();

}  // namespace kvmmap
