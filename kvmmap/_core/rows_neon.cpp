// The row codec with Advanced SIMD, which every AArch64 has. What is left of a row after whole steps of 16 is done in a
// last step that overlaps the one before; writing a code twice writes the same byte.
#include <arm_neon.h>

#include "rows_batch.h"

namespace kvmmap {
namespace {

constexpr int64_t lanes = 4;

// Bytes are loaded and reinterpreted: rows need not be aligned.
inline uint32x4_t load_words(const char* p) { return vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
inline uint16x8_t load_halves(const char* p) { return vreinterpretq_u16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
inline uint16x4_t load_4_halves(const char* p) { return vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p))); }
inline void store_4_halves(char* p, uint16x4_t v) { vst1_u8(reinterpret_cast<uint8_t*>(p), vreinterpret_u8_u16(v)); }

// 4 numbers as f32.
template <Dtype D>
inline float32x4_t load(const char* p) {
    if constexpr (D == Dtype::f32) return vreinterpretq_f32_u32(load_words(p));
    if constexpr (D == Dtype::f16) return vcvt_f32_f16(vreinterpret_f16_u16(load_4_halves(p)));
    return vreinterpretq_f32_u32(vshll_n_u16(load_4_halves(p), 16));
}

template <Dtype D>
inline void store(char* out, float32x4_t v) {
    if constexpr (D == Dtype::f32) {
        vst1q_u8(reinterpret_cast<uint8_t*>(out), vreinterpretq_u8_f32(v));
    } else if constexpr (D == Dtype::f16) {
        store_4_halves(out, vreinterpret_u16_f16(vcvt_f16_f32(v)));
    } else {
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        store_4_halves(out, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
    }
}

// Codes of 8 numbers, 16 bits each. The conversion (FCVTAS) is the one that rounds halves away from zero.
template <Dtype D>
inline int16x8_t divide(const char* in, float32x4_t scale) {
    const int32x4_t low = vcvtaq_s32_f32(vdivq_f32(load<D>(in), scale));
    const int32x4_t high = vcvtaq_s32_f32(vdivq_f32(load<D>(in + lanes * item<D>), scale));
    return vqmovn_high_s32(vqmovn_s32(low), high);
}

struct Neon {
    static constexpr int64_t step = 16;

    template <Dtype D>
    static uint32_t absmax_bits(const char* in, int64_t dim) {
        if constexpr (D == Dtype::f32) {
            uint32x4_t top = vdupq_n_u32(0);
            for (int64_t i = 0; i < dim; i += 4) {
                const char* p = in + 4 * (i + 4 <= dim ? i : dim - 4);
                top = vmaxq_u32(top, vandq_u32(vdupq_n_u32(0x7fffffff), load_words(p)));
            }
            return vmaxvq_u32(top);
        } else {
            // Sixteen-bit floats are in integer order, too, so they need not be widened first.
            uint16x8_t top = vdupq_n_u16(0);
            for (int64_t i = 0; i < dim; i += 8) {
                const char* p = in + 2 * (i + 8 <= dim ? i : dim - 8);
                top = vmaxq_u16(top, vandq_u16(vdupq_n_u16(0x7fff), load_halves(p)));
            }
            const uint16x4_t half = vdup_n_u16(vmaxvq_u16(top));
            if constexpr (D == Dtype::bf16) return vgetq_lane_u32(vshll_n_u16(half, 16), 0);
            return vgetq_lane_u32(vreinterpretq_u32_f32(vcvt_f32_f16(vreinterpret_f16_u16(half))), 0);
        }
    }

    template <Dtype D>
    static void code(const char* row, int64_t dim, const Divisor& by, int8_t* codes) {
        const float32x4_t scale = vdupq_n_f32(by.scale);
        for (int64_t i = 0; i < dim; i += step) {
            if (i + step > dim) i = dim - step;
            const char* in = row + i * item<D>;
            const int16x8_t low = divide<D>(in, scale), high = divide<D>(in + 8 * item<D>, scale);
            vst1q_s8(codes + i, vqmovn_high_s16(vqmovn_s16(low), high));
        }
    }

    template <Dtype D>
    static void restore(const int8_t* codes, int64_t dim, float row_scale, char* out) {
        const float32x4_t scale = vdupq_n_f32(row_scale);
        for (int64_t i = 0; i < dim; i += 8) {
            if (i + 8 > dim) i = dim - 8;
            const int16x8_t wide = vmovl_s8(vld1_s8(codes + i));
            store<D>(out + i * item<D>, vmulq_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), scale));
            store<D>(out + (i + 4) * item<D>, vmulq_f32(vcvtq_f32_s32(vmovl_high_s16(wide)), scale));
        }
    }
};

}  // namespace

const RowKernels rows_neon = kernels_of<Neon>();

}  // namespace kvmmap
