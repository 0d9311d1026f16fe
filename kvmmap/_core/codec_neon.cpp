// The row codecs with Advanced SIMD: levels of 4 bits are looked up 16 at a time; the others number by number.
#include <arm_neon.h>

#include "codec_rows.h"

namespace kvmmap {
namespace {

struct Neon : Plain {
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
