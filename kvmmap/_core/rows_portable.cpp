// The row codec in plain C++: what every other kernel must equal, and what runs where there is no other.
#include <cmath>
#include <cstring>

#include "half.h"
#include "rows.h"

namespace kvmmap {
namespace {

template <Dtype D>
inline float load(const void* row, int64_t i) {
    if constexpr (D == Dtype::f32) {
        float v;
        std::memcpy(&v, static_cast<const char*>(row) + 4 * i, 4);
        return v;
    } else {
        uint16_t bits;
        std::memcpy(&bits, static_cast<const char*>(row) + 2 * i, 2);
        return D == Dtype::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
    }
}

template <Dtype D>
inline void store(void* out, int64_t i, float v) {
    if constexpr (D == Dtype::f32) {
        std::memcpy(static_cast<char*>(out) + 4 * i, &v, 4);
    } else {
        uint16_t bits = D == Dtype::f16 ? f32_to_f16(v) : f32_to_bf16(v);
        std::memcpy(static_cast<char*>(out) + 2 * i, &bits, 2);
    }
}

inline int8_t round_code(float q) {
    float whole = std::trunc(q);
    float rest = q - whole;  // exact: |q| <= 127 leaves at least 17 bits for the fraction
    if (rest >= 0.5f) whole += 1.0f;
    if (rest <= -0.5f) whole -= 1.0f;
    if (whole > 127.0f) whole = 127.0f;
    if (whole < -127.0f) whole = -127.0f;
    return static_cast<int8_t>(whole);
}

template <Dtype D>
int64_t quantize(const void* x, int64_t stride_bytes, int64_t n, int64_t dim, int8_t* codes, float* scales) {
    for (int64_t row = 0; row < n; ++row) {
        const char* in = static_cast<const char*>(x) + row * stride_bytes;
        uint32_t absmax_bits = 0;  // |x| as an integer: f32 order is integer order, and NaN and infinity come last
        for (int64_t i = 0; i < dim; ++i) {
            uint32_t bits = f32_bits(load<D>(in, i)) & 0x7fffffffu;
            if (bits > absmax_bits) absmax_bits = bits;
        }
        if (absmax_bits >= 0x7f800000u) return row;
        float scale = f32_from_bits(absmax_bits) / 127.0f;
        if (scale < min_scale) scale = min_scale;
        for (int64_t i = 0; i < dim; ++i) codes[row * dim + i] = round_code(load<D>(in, i) / scale);
        scales[row] = scale;
    }
    return n;
}

template <Dtype D>
void dequantize(const int8_t* codes, const float* scales, int64_t n, int64_t dim, void* out) {
    for (int64_t row = 0; row < n; ++row)
        for (int64_t i = 0; i < dim; ++i)
            store<D>(out, row * dim + i, static_cast<float>(codes[row * dim + i]) * scales[row]);
}

}  // namespace

const RowKernels rows_portable = {
    {quantize<Dtype::f32>, quantize<Dtype::f16>, quantize<Dtype::bf16>},
    {dequantize<Dtype::f32>, dequantize<Dtype::f16>, dequantize<Dtype::bf16>},
};

}  // namespace kvmmap
