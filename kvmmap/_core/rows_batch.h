// What the vector kernels of the row codec share: the walk over the rows. A kernel file brings a struct, in a
// namespace without a name, that works on one row:
//
//   step                                   numbers it takes at a time; it is never given a shorter row
//   absmax_bits<D>(in, dim)                max |x| as f32 bits; integer order, so NaN and infinity come out on top
//   code<D>(in, dim, divisor, codes)       quotients as by IEEE division, halves away from zero
//   restore<D>(codes, dim, scale, out)     code * scale in D, rounded to nearest even
//
// Multiplying by 1/scale and dividing only where a quotient lies too near to a half was measured, too: on Zen 4 it
// is 4 % faster on f32 from memory and 22 % slower on bf16, whose quotients often are halves. Products that are corrected by
// what they leave need no division at all (pack_avx512.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "round.h"
#include "rows.h"

namespace kvmmap {
// Every kernel file gets its own copies: one shared by the linker could hold instructions that this machine lacks.
namespace {

constexpr uint32_t infinity_bits = 0x7f800000u;

inline float as_float(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline bool is_finite(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return (bits & 0x7fffffffu) < infinity_bits;
}

template <Dtype D>
constexpr int64_t item = D == Dtype::f32 ? 4 : 2;

// Rows are taken 16 at a time, absmax first and codes afterwards: a row's codes wait for its scale, a chain of some 40
// cycles, in which the processor works on the other rows. The second reading comes from the first-level cache;
// meanwhile the rows of the batch after next are fetched into the second-level one. Together 1.5x on Zen 4.
constexpr int64_t batch_rows = 16;
constexpr int64_t batch_bytes = 16384;

// A row's scale, half of it, and the reciprocal of that.
struct Divisor {
    float scale, half, reciprocal;
};

template <class Simd, Dtype D>
int64_t quantize_rows(const void* x, int64_t stride, int64_t n, int64_t dim, int8_t* codes, float* scales) {
    const char* in = static_cast<const char*>(x);
    const int64_t fitting = batch_bytes / (dim * item<D> + 1);
    const int64_t batch = fitting < 1 ? 1 : fitting < batch_rows ? fitting : batch_rows;
    for (int64_t row = 0; row < n; row += batch) {
        const int64_t count = n - row < batch ? n - row : batch;
        Divisor by[batch_rows];
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = Simd::template absmax_bits<D>(in + i * stride, dim);
            if (bits >= infinity_bits) return row + i;
            const float scale = as_float(bits) / 127.0f;
            by[i].scale = scales[row + i] = scale < min_scale ? min_scale : scale;
            by[i].half = 0.5f * by[i].scale;
            by[i].reciprocal = 1.0f / by[i].half;
        }
        for (int64_t i = 0; i < count; ++i, in += stride, codes += dim) {
            const char* later = in + 2 * batch * stride;  // possibly past the end, where a prefetch does nothing
            for (int64_t byte = 0; byte < dim * item<D>; byte += 64) __builtin_prefetch(later + byte, 0, 2);
            Simd::template code<D>(in, dim, by[i], codes);
        }
    }
    return n;
}

// A row shorter than a step is worked on as one of that length, ending in zeros.
template <class Simd, Dtype D>
int64_t quantize_short(const void* x, int64_t stride, int64_t n, int64_t dim, int8_t* codes, float* scales) {
    char padded[Simd::step * 4] = {};
    int8_t padded_codes[Simd::step];
    for (int64_t row = 0; row < n; ++row) {
        std::memcpy(padded, static_cast<const char*>(x) + row * stride, dim * item<D>);
        if (quantize_rows<Simd, D>(padded, 0, 1, Simd::step, padded_codes, scales + row) == 0) return row;
        std::memcpy(codes + row * dim, padded_codes, dim);
    }
    return n;
}

template <class Simd, Dtype D>
int64_t quantize(const void* x, int64_t stride, int64_t n, int64_t dim, int8_t* codes, float* scales) {
    if (dim < Simd::step) return quantize_short<Simd, D>(x, stride, n, dim, codes, scales);
    return quantize_rows<Simd, D>(x, stride, n, dim, codes, scales);
}

template <class Simd, Dtype D>
void dequantize(const int8_t* codes, const float* scales, int64_t n, int64_t dim, void* out_start) {
    char* out = static_cast<char*>(out_start);
    for (int64_t row = 0; row < n; ++row, codes += dim, out += dim * item<D>) {
        if (!is_finite(scales[row])) {  // not made by this codec; what becomes of NaNs is for the portable kernel to say
            rows_portable.dequantize[static_cast<int>(D)](codes, scales + row, 1, dim, out);
        } else if (dim >= Simd::step) {
            Simd::template restore<D>(codes, dim, scales[row], out);
        } else {
            int8_t padded_codes[Simd::step] = {};
            char padded[Simd::step * 4];
            std::memcpy(padded_codes, codes, dim);
            Simd::template restore<D>(padded_codes, Simd::step, scales[row], padded);
            std::memcpy(out, padded, dim * item<D>);
        }
    }
}

template <class Simd>
constexpr RowKernels kernels_of() {
    return {{quantize<Simd, Dtype::f32>, quantize<Simd, Dtype::f16>, quantize<Simd, Dtype::bf16>},
            {dequantize<Simd, Dtype::f32>, dequantize<Simd, Dtype::f16>, dequantize<Simd, Dtype::bf16>}};
}

}  // namespace
}  // namespace kvmmap
