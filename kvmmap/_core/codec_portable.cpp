// The row codecs on any processor.
#include "codec_rows.h"

namespace kvmmap {
namespace {

struct Portable {
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
        for (int64_t row = 0; row < n; ++row) unpack_levels<bits>(codes + row * (dim / 8 * bits), dim, out + row * dim);
    }
};

}  // namespace

const CodecKernels codec_portable = codec_kernels_of<Portable>();

}  // namespace kvmmap
