// The row codecs with Advanced SIMD: levels of 4 bits are looked up 16 at a time; the others number by number.
#include <arm_neon.h>

#include "codec_rows.h"

namespace kvmmap {
namespace {

struct Neon {
    static constexpr int lanes = 4;
    static void f16_to_floats(const char* in, int64_t count, float* out) { f16_to_floats_plainly(in, count, out); }
    static void floats_to_f16(const float* in, int64_t count, char* out) { floats_to_f16_plainly(in, count, out); }
    static void round(const float* x, int64_t dim, float inverse, int8_t* out) { round_plainly(x, dim, inverse, out); }
    static int32_t squares(const int8_t* numbers, int64_t dim) { return squares_plainly(numbers, dim); }
    template <int bits>
    static void nearest(int8_t* numbers, int64_t dim, uint8_t* codes) {
        nearest_plainly<bits>(numbers, dim, codes);
    }

    template <int bits>
    static void levels(const char* codes, int64_t n, int64_t dim, int8_t* out) {
        for (int64_t r = 0; r < n; ++r) row<bits>(codes + r * (dim / 8 * bits), dim, out + r * dim);
    }

  private:
    template <int bits>
    static void row(const char* codes, int64_t dim, int8_t* out) {
        if (bits != 4 || dim % 32) return unpack_levels<bits>(codes, dim, out);
        static constexpr Register first = level_register<4>(0);
        const int8x16_t table = vld1q_s8(first.values);
        for (int64_t j = 0; j < dim / 2; j += 16) {
            const uint8x16_t two = vld1q_u8(reinterpret_cast<const uint8_t*>(codes + j));
            vst1q_s8(out + j, vqtbl1q_s8(table, vandq_u8(two, vdupq_n_u8(15))));
            vst1q_s8(out + j + dim / 2, vqtbl1q_s8(table, vshrq_n_u8(two, 4)));
        }
    }
};

}  // namespace

const CodecKernels codec_neon = codec_kernels_of<Neon>();

}  // namespace kvmmap
