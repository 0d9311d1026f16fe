// The row codec (design section 2): one row = the head_dim numbers of one head at one position.
//
//   absmax = max |x| over the row, in f32
//   scale  = max(absmax / 127, 2^-23)                    IEEE f32 division
//   code   = clamp(round_half_away(x / scale), -127, 127)
//   x'     = code * scale
//
// Every kernel gives the same bytes; rows_portable.cpp says it plainly and the others are held to it.
#pragma once

#include <cstdint>

namespace kvmmap {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };
constexpr int dtype_count = 3;
inline int64_t dtype_bytes(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

constexpr float min_scale = 1.1920928955078125e-07f;  // 2^-23

// n rows of `dim` numbers; row i of the input starts at x + i * stride_bytes, its numbers lie side by side.
// Codes and scales are written side by side. Returns the first row that holds a NaN or an infinity
// (what was written for it is unspecified), or n.
using QuantizeRun = int64_t (*)(const void* x, int64_t stride_bytes, int64_t n, int64_t dim, int8_t* codes,
                                float* scales);

// n rows of `dim` codes side by side -> numbers in the output type side by side.
using DequantizeRun = void (*)(const int8_t* codes, const float* scales, int64_t n, int64_t dim, void* out);

struct RowKernels {
    QuantizeRun quantize[dtype_count];
    DequantizeRun dequantize[dtype_count];
};

extern const RowKernels rows_portable;
#if defined(__x86_64__)
extern const RowKernels rows_avx2;
extern const RowKernels rows_avx512;
#elif defined(__aarch64__)
extern const RowKernels rows_neon;
#endif

const RowKernels& row_kernels();  // of current_isa()

}  // namespace kvmmap
