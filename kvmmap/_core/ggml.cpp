#include "ggml.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec.h"
#include "codec_run.h"
#include "half.h"
#include "parallel.h"

namespace kvmmap {

bool ggml_known(int type) {
    switch (static_cast<Ggml>(type)) {
        case Ggml::f32: case Ggml::f16: case Ggml::bf16: case Ggml::q4_0: case Ggml::q4_1: case Ggml::q5_0: case Ggml::q5_1:
        case Ggml::q8_0: return true;
    }
    return false;
}

namespace {

bool has_blocks(Ggml type) { return type != Ggml::f32 && type != Ggml::f16 && type != Ggml::bf16; }

Dtype number_dtype(Ggml type) { return type == Ggml::f32 ? Dtype::f32 : type == Ggml::f16 ? Dtype::f16 : Dtype::bf16; }

int64_t block_bytes(Ggml type) {
    switch (type) {
        case Ggml::q4_0: return 2 + 16;
        case Ggml::q4_1: return 4 + 16;
        case Ggml::q5_0: return 2 + 4 + 16;
        case Ggml::q5_1: return 4 + 4 + 16;
        default: return 2 + 32;
    }
}

float half_at(const char* in) {
    uint16_t bits;
    std::memcpy(&bits, in, 2);
    return f16_to_f32(bits);
}

// Writes what f16 makes of a number; false if that is no finite one.
bool put_half(float v, char* out) {
    const uint16_t bits = f32_to_f16(v);
    std::memcpy(out, &bits, 2);
    return (bits & 0x7c00) != 0x7c00;
}

void unpack(Ggml type, const char* in, float* out) {
    const float d = half_at(in);
    if (type == Ggml::q8_0) {
        const auto* codes = reinterpret_cast<const int8_t*>(in + 2);
        for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(codes[i]) * d;
        return;
    }
    const bool minimum = type == Ggml::q4_1 || type == Ggml::q5_1, fifth = type == Ggml::q5_0 || type == Ggml::q5_1;
    const float least = minimum ? half_at(in + 2) : 0.0f;
    const int zero = minimum ? 0 : fifth ? 16 : 8;
    in += minimum ? 4 : 2;
    uint32_t high = 0;
    if (fifth) {
        std::memcpy(&high, in, 4);
        in += 4;
    }
    const auto* codes = reinterpret_cast<const uint8_t*>(in);
    for (int i = 0; i < 16; ++i) {
        const int low = static_cast<int>((codes[i] & 15) | (high >> i & 1) << 4);
        const int upper = static_cast<int>((codes[i] >> 4) | (high >> (i + 16) & 1) << 4);
        out[i] = static_cast<float>(low - zero) * d + least;
        out[i + 16] = static_cast<float>(upper - zero) * d + least;
    }
}

// As ggml's quantize_row_*_ref does; false if a number is not finite, or too large for the scale.
bool pack(Ggml type, const float* x, char* out) {
    float low = x[0], high = x[0], sum = 0.0f;
    for (int i = 0; i < 32; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum += x[i] * 0.0f;  // a NaN if there is a NaN or an infinity
    }
    if (sum != sum) return false;
    const bool minimum = type == Ggml::q4_1 || type == Ggml::q5_1, fifth = type == Ggml::q5_0 || type == Ggml::q5_1;
    if (type == Ggml::q8_0) {
        const float most = -low > high ? -low : high, d = most / 127.0f, inverse = d ? 1.0f / d : 0.0f;
        auto* codes = reinterpret_cast<int8_t*>(out + 2);
        for (int i = 0; i < 32; ++i) codes[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
        return put_half(d, out);
    }
    const int levels = fifth ? 32 : 16;
    float d, zero;
    if (minimum) {
        d = (high - low) / static_cast<float>(levels - 1);
        zero = -low;
    } else {  // the number of largest size gets the lowest level, whatever its sign
        d = (-low > high ? low : high) / static_cast<float>(-levels / 2);
        zero = 0.0f;
    }
    const float inverse = d ? 1.0f / d : 0.0f, shift = minimum ? 0.5f : static_cast<float>(levels / 2) + 0.5f;
    if (!put_half(d, out)) return false;
    if (minimum && !put_half(low, out + 2)) return false;
    char* to = out + (minimum ? 4 : 2);
    auto* codes = reinterpret_cast<uint8_t*>(to + (fifth ? 4 : 0));
    uint32_t bits = 0;
    auto level = [&](float v) {
        const int found = static_cast<int>((v + zero) * inverse + shift);
        return found > levels - 1 ? levels - 1 : found < 0 ? 0 : found;
    };
    for (int i = 0; i < 16; ++i) {
        const int a = level(x[i]), b = level(x[i + 16]);
        codes[i] = static_cast<uint8_t>((a & 15) | (b & 15) << 4);
        bits |= static_cast<uint32_t>(a >> 4 & 1) << i | static_cast<uint32_t>(b >> 4 & 1) << (i + 16);
    }
    if (fifth) std::memcpy(to, &bits, 4);
    return true;
}

// Stored order -> the order of transformers' checkpoints, and back.
template <class T>
void split(const T* in, int64_t dim, T* out) {
    for (int64_t i = 0; i < dim / 2; ++i) {
        out[i] = in[2 * i];
        out[i + dim / 2] = in[2 * i + 1];
    }
}

template <class T>
void interleave(const T* in, int64_t dim, T* out) {
    for (int64_t i = 0; i < dim / 2; ++i) {
        out[2 * i] = in[i];
        out[2 * i + 1] = in[i + dim / 2];
    }
}

template <class T>
int64_t special_floats(const char* in, int64_t size, T exponent) {
    int64_t found = 0;
    for (int64_t at = 0; at + static_cast<int64_t>(sizeof(T)) <= size; at += sizeof(T)) {
        T bits;
        std::memcpy(&bits, in + at, sizeof(T));
        found += (bits & exponent) == exponent;
    }
    return found;
}

std::vector<float> factors_of(int64_t group) {
    return std::vector<float>(group, group ? 1.0f / std::sqrt(static_cast<float>(group)) : 0.0f);
}

}  // namespace

bool ggml_takes(GgmlFormat format, int64_t dim) {
    if (dim <= 0 || (has_blocks(format.type) && dim % ggml_block)) return false;
    return !(format.interleaved && dim % 2) && !(format.group && dim % format.group);
}

int64_t ggml_row_bytes(Ggml type, int64_t dim) {
    return has_blocks(type) ? dim / ggml_block * block_bytes(type) : dim * dtype_bytes(number_dtype(type));
}

void decode_ggml(GgmlFormat format, const char* in, int64_t rows, int64_t dim, Dtype dtype, char* out, int threads) {
    const CodecKernels& kernels = codec_kernels();
    const int64_t row_bytes = ggml_row_bytes(format.type, dim), out_bytes = dim * dtype_bytes(dtype);
    const bool same = !has_blocks(format.type) && number_dtype(format.type) == dtype && !format.group;
    const std::vector<float> factors = factors_of(format.group);
    parallel_ranges(rows, worth_threads(rows * out_bytes, threads), [&](int64_t begin, int64_t end) {
        std::vector<float> room(2 * dim);
        float *numbers = room.data(), *ordered = room.data() + dim;
        for (int64_t row = begin; row < end; ++row) {
            const char* from = in + row * row_bytes;
            char* to = out + row * out_bytes;
            if (same) {  // bits move, and nothing is rounded
                if (!format.interleaved) std::memcpy(to, from, row_bytes);
                else if (dtype == Dtype::f32) split(reinterpret_cast<const uint32_t*>(from), dim, reinterpret_cast<uint32_t*>(to));
                else split(reinterpret_cast<const uint16_t*>(from), dim, reinterpret_cast<uint16_t*>(to));
                continue;
            }
            if (has_blocks(format.type))
                for (int64_t i = 0; i < dim; i += ggml_block, from += block_bytes(format.type)) unpack(format.type, from, numbers + i);
            else
                kernels.widen[static_cast<int>(number_dtype(format.type))](from, row_bytes, 1, dim, numbers);
            if (format.group) kernels.rotate({format.group, factors.data()}, dim / format.group, numbers);
            if (format.interleaved) split(numbers, dim, ordered);
            const float* result = format.interleaved ? ordered : numbers;
            if (dtype == Dtype::f32) std::memcpy(to, result, out_bytes);
            else kernels.narrow[static_cast<int>(dtype)](result, dim, to);
        }
    });
}

int64_t encode_ggml(GgmlFormat format, const RowGrid& x, char* out, int threads) {
    const CodecKernels& kernels = codec_kernels();
    const int64_t rows = x.outer * x.inner, dim = x.dim, row_bytes = ggml_row_bytes(format.type, dim);
    const bool same = !has_blocks(format.type) && number_dtype(format.type) == x.dtype && !format.group;
    const std::vector<float> factors = factors_of(format.group);
    std::atomic<int64_t> first_bad{rows};
    auto bad = [&](int64_t row) { lower_to(first_bad, row); };
    parallel_ranges(rows, worth_threads(rows * dim * 4, threads), [&](int64_t begin, int64_t end) {
        std::vector<float> room(2 * dim + readable_behind);
        float *numbers = room.data(), *ordered = room.data() + dim;
        for (int64_t row = begin; row < end; ++row) {
            const char* from = static_cast<const char*>(x.data) + row / x.inner * x.outer_stride + row % x.inner * x.inner_stride;
            char* to = out + row * row_bytes;
            kernels.widen[static_cast<int>(x.dtype)](from, x.inner_stride, 1, dim, numbers);
            float sum = 0.0f;
            for (int64_t i = 0; i < dim; ++i) sum += numbers[i] * 0.0f;
            if (sum != sum) return bad(row);
            if (same) {
                if (!format.interleaved) std::memcpy(to, from, row_bytes);
                else if (x.dtype == Dtype::f32) interleave(reinterpret_cast<const uint32_t*>(from), dim, reinterpret_cast<uint32_t*>(to));
                else interleave(reinterpret_cast<const uint16_t*>(from), dim, reinterpret_cast<uint16_t*>(to));
                continue;
            }
            if (format.interleaved) interleave(numbers, dim, ordered);
            float* result = format.interleaved ? ordered : numbers;
            if (format.group) kernels.rotate({format.group, factors.data()}, dim / format.group, result);
            if (!has_blocks(format.type)) {
                if (format.type == Ggml::f32) std::memcpy(to, result, row_bytes);
                else kernels.narrow[static_cast<int>(number_dtype(format.type))](result, dim, to);
                if (format.type != Ggml::f32)
                    for (int64_t i = 0; i < dim; ++i) {
                        uint16_t bits;
                        std::memcpy(&bits, to + 2 * i, 2);
                        const uint16_t infinity = format.type == Ggml::f16 ? 0x7c00 : 0x7f80;
                        if ((bits & 0x7fff) >= infinity) return bad(row);
                    }
                continue;
            }
            for (int64_t i = 0; i < dim; i += ggml_block, to += block_bytes(format.type))
                if (!pack(format.type, result + i, to)) return bad(row);
        }
    });
    return first_bad == rows ? -1 : first_bad.load();
}

int64_t special_numbers(Ggml type, const char* in, int64_t size) {
    if (type == Ggml::f32) return special_floats<uint32_t>(in, size, 0x7f800000);
    if (!has_blocks(type)) return special_floats<uint16_t>(in, size, type == Ggml::f16 ? 0x7c00 : 0x7f80);
    const int64_t step = block_bytes(type);
    const bool minimum = type == Ggml::q4_1 || type == Ggml::q5_1;
    int64_t found = 0;
    for (int64_t at = 0; at + step <= size; at += step) {
        uint16_t bits[2] = {0, 0};
        std::memcpy(bits, in + at, minimum ? 4 : 2);
        found += ((bits[0] & 0x7c00) == 0x7c00) + ((bits[1] & 0x7c00) == 0x7c00);
    }
    return found;
}

}  // namespace kvmmap
