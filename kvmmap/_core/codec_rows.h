// Rows to codes and back, for every codec but int8: plain loops, which the compiler makes vectors of with the flags of the
// file that includes this. Such a file brings a struct, in a namespace without a name:
//
//   lanes                                       floats it works on at a time
//   f16_to_floats(in, count, out)               and back
//   floats_to_f16(in, count, out)
//   levels<bits>(codes, n, dim, out)            rows of codes to the int8 values of the table
//   round(x, dim, inverse, out)                 x * inverse, rounded half away from zero, within 127; |x * inverse| < 2^15
//   nearest<bits>(numbers, dim, codes)          whole numbers to codes of the nearest levels, and those levels in their place
//   squares(numbers, dim)                       the sum of their squares
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "codec_levels.h"
#include "fp8.h"
#include "half.h"
#include "rotation.h"
#include "round.h"
#include "widen.h"

namespace kvmmap {
namespace {

constexpr int64_t partial_sums = 16;
constexpr float least_size = 0x1p-32f;  // rows of smaller numbers have a scale of 0 in f16

template <Dtype D, class Simd>
void widen_rows(const char* x, int64_t stride, int64_t n, int64_t dim, float* out) {
    for (int64_t row = 0; row < n; ++row, x += stride, out += dim) {
        if constexpr (D == Dtype::f32) std::memcpy(out, x, dim * 4);
        if constexpr (D == Dtype::f16) Simd::f16_to_floats(x, dim, out);
        if constexpr (D == Dtype::bf16)
            for (int64_t i = 0; i < dim; ++i) {
                uint16_t bits;
                std::memcpy(&bits, x + 2 * i, 2);
                out[i] = bf16_to_f32(bits);
            }
    }
}

template <Dtype D, class Simd>
void narrow_rows(const float* x, int64_t count, char* out) {
    if constexpr (D == Dtype::f32) std::memcpy(out, x, count * 4);
    if constexpr (D == Dtype::f16) Simd::floats_to_f16(x, count, out);
    if constexpr (D == Dtype::bf16)
        for (int64_t i = 0; i < count; ++i) {
            const uint16_t bits = f32_to_bf16(x[i]);
            std::memcpy(out + 2 * i, &bits, 2);
        }
}

// In steps that stay in the first-level cache.
template <Dtype D, class Simd>
bool narrow_within(const float* x, int64_t count, uint16_t* out) {
    constexpr int64_t step = 512;
    constexpr uint16_t infinity = D == Dtype::f16 ? 0x7c00 : 0x7f80;
    for (int64_t i = 0; i < count; i += step) {
        const int64_t n = std::min(step, count - i);
        narrow_rows<D, Simd>(x + i, n, reinterpret_cast<char*>(out + i));
        uint16_t found = 0;
        for (int64_t j = i; j < i + n; ++j) found = static_cast<uint16_t>(found | ((out[j] & 0x7fff) == infinity ? 1 : 0));
        if (found) return false;
    }
    return true;
}

// The largest |x| as f32 bits: integer order, so that NaN and infinity come out on top.
inline uint32_t largest_bits(const float* x, int64_t dim) {
    uint32_t top = 0;
    for (int64_t i = 0; i < dim; ++i) top = std::max(top, f32_bits(x[i]) & 0x7fffffffu);
    return top;
}

// The sum of x * y over a row, y(i) being W numbers from i on: number i goes to partial sum i mod 16, and those are added at
// distances 8, 4, 2, 1. A row is a multiple of 8 numbers.
template <int W, class Other>
[[gnu::always_inline]] inline float sum_of_products(const float* x, int64_t dim, Other&& y) {
    using L = Lanes<W>;
    typename L::F parts[partial_sums / W] = {};
    int64_t i = 0;
    for (; i + partial_sums <= dim; i += partial_sums)
        for (int64_t p = 0; p < partial_sums / W; ++p) parts[p] += L::load(x + i + p * W) * y(i + p * W);
    float sums[partial_sums], last[partial_sums] = {};
    for (int64_t p = 0; p < partial_sums / W; ++p) L::store(sums + p * W, parts[p]);
    if (i < dim) {
        constexpr int64_t step = W < 8 ? W : 8;
        for (int64_t p = 0; p < 8; p += step) {
            // y of a whole step: what is behind the row is multiplied by 0.
            float numbers[W] = {}, more[W];
            std::memcpy(numbers, x + i + p, sizeof(float) * step);
            L::store(more, L::load(numbers) * y(i + p));
            std::memcpy(last + p, more, sizeof(float) * step);
        }
        for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += last[lane];
    }
    for (int64_t step = partial_sums / 2; step; step /= 2)
        for (int64_t lane = 0; lane < step; ++lane) sums[lane] += sums[lane + step];
    return sums[0];
}

// Codes [low, low + bits) of every number, `per byte` numbers a byte: byte j holds numbers j, j + count, j + 2 * count, ...
template <int bits>
void pack_plane(const uint8_t* codes, int low, int64_t dim, char* out) {
    constexpr int per_byte = 8 / bits;
    const int64_t count = dim / per_byte;
    for (int64_t j = 0; j < count; ++j) {
        unsigned byte = 0;
        for (int k = 0; k < per_byte; ++k) byte |= (codes[j + k * count] >> low & ((1 << bits) - 1)) << k * bits;
        out[j] = static_cast<char>(byte);
    }
}

// Bit `low` of every number: that of number i is bit i mod 8 of byte i / 8.
inline void pack_bits(const uint8_t* codes, int low, int64_t dim, char* out) {
    for (int64_t j = 0; j < dim / 8; ++j) {
        uint64_t eight;
        std::memcpy(&eight, codes + 8 * j, 8);
        eight = eight >> low & 0x0101010101010101u;
        out[j] = static_cast<char>(eight * 0x0102040810204080u >> 56);
    }
}

template <int bits>
void pack(const uint8_t* codes, int64_t dim, char* out) {
    if constexpr (bits == 3) {
        pack_plane<2>(codes, 0, dim, out);
        pack_bits(codes, 2, dim, out + dim / 4);
    } else {
        pack_plane<4>(codes, 0, dim, out);
        if constexpr (bits == 5) pack_bits(codes, 4, dim, out + dim / 2);
        if constexpr (bits == 6) pack_plane<2>(codes, 4, dim, out + dim / 2);
    }
}

// Adds a plane's bits to codes, at `low`; the reverse of pack_plane.
template <int bits>
void unpack_plane(const char* in, int low, int64_t dim, uint8_t* codes) {
    const int64_t count = dim / (8 / bits);
    for (int64_t k = 0; k < 8 / bits; ++k)
        for (int64_t j = 0; j < count; ++j) {
            const int field = static_cast<uint8_t>(in[j]) >> k * bits & ((1 << bits) - 1);
            codes[k * count + j] = static_cast<uint8_t>(codes[k * count + j] | field << low);
        }
}

// Codes of a row, a byte each, but for what planes of single bits hold of them.
template <int bits>
void unpack_codes(const char* in, int64_t dim, uint8_t* codes) {
    std::memset(codes, 0, dim);
    unpack_plane<bits == 3 ? 2 : 4>(in, 0, dim, codes);
    if constexpr (bits == 6) unpack_plane<2>(in + dim / 2, 4, dim, codes);
}

// Numbers from `first` on: what unpack_codes gave to levels, in its place.
template <int bits>
void look_up(const char* in, int64_t first, int64_t dim, int8_t* out) {
    const char* single = in + (bits == 3 ? dim / 4 : dim / 2);
    for (int64_t i = first; i < dim; ++i) {
        int code = static_cast<uint8_t>(out[i]);
        if constexpr (bits == 3 || bits == 5) code |= (single[i / 8] >> i % 8 & 1) << (bits - 1);
        out[i] = levels_of<bits>.level(code);
    }
}

// A row of what levels<bits> does, in plain steps.
template <int bits>
void unpack_levels(const char* in, int64_t dim, int8_t* out) {
    unpack_codes<bits>(in, dim, reinterpret_cast<uint8_t*>(out));
    look_up<bits>(in, 0, dim, out);
}

// x * inverse, rounded half away from zero, within 127.
inline void round_plainly(const float* x, int64_t dim, float inverse, int8_t* out) {
    for (int64_t i = 0; i < dim; ++i) {
        float q = x[i] * inverse;
        q = q > 127.0f ? 127.0f : q;
        q = q < -127.0f ? -127.0f : q;
        out[i] = static_cast<int8_t>(static_cast<int32_t>(q + std::copysign(below_half, q)));
    }
}

// Whole numbers in [-127, 127] -> codes of the nearest levels, and those levels in their place.
template <int bits>
void nearest_plainly(int8_t* numbers, int64_t dim, uint8_t* codes) {
    constexpr const Levels& table = levels_of<bits>;
    for (int64_t i = 0; i < dim; ++i) {
        const int8_t whole = numbers[i];
        if constexpr (bits == 6) {
            const uint8_t code = static_cast<uint8_t>(whole + 128) >> 2;
            codes[i] = code;
            numbers[i] = static_cast<int8_t>(4 * code - 126);
        } else {
            const int8_t negative = static_cast<int8_t>(whole < 0 ? -1 : 0);
            const int8_t size = static_cast<int8_t>((whole ^ negative) - negative);
            int k = 0;
            while (k + 1 < table.half() && size > table.bound(k)) ++k;
            codes[i] = static_cast<uint8_t>((k ^ negative) + table.half());
            numbers[i] = table.level(codes[i]);
        }
    }
}

inline int32_t squares_plainly(const int8_t* numbers, int64_t dim) {
    int32_t sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += numbers[i] * numbers[i];
    return sum;
}

// Returns the first row whose scale is beyond f16, or n. Rows are taken some at a time, each step for all of them: a row
// waits for its root and its quotients, in which time the processor works on the others.
template <int bits, class Simd>
int64_t encode_levels(const float* rows, int64_t n, int64_t dim, char* codes, uint16_t* scales) {
    constexpr int W = Simd::lanes;
    constexpr int64_t most_rows = 16;
    int8_t levels[most_levels + readable_behind] = {};
    uint8_t numbers[most_levels];
    const int64_t batch = std::min(most_rows, most_levels / dim);
    for (int64_t first = 0; first < n; first += batch) {
        const int64_t count = std::min(batch, n - first);
        const float* x = rows + first * dim;
        // What the table's deviation stands for, the root mean square; or what becomes 127, the largest number.
        float sizes[most_rows], products[most_rows];
        for (int64_t r = 0; r < count; ++r) {
            const float* row = x + r * dim;
            if constexpr (bits == 6) sizes[r] = f32_from_bits(largest_bits(row, dim));
            else sizes[r] = sum_of_products<W>(row, dim, [&](int64_t i) { return Lanes<W>::load(row + i); });
        }
        if constexpr (bits != 6)
            for (int64_t r = 0; r < count; ++r) sizes[r] = std::sqrt(sizes[r] / static_cast<float>(dim));
        for (int64_t r = 0; r < count; ++r) {
            if (f32_bits(sizes[r]) >= 0x7f800000u) return first + r;
            constexpr float aim = bits == 6 ? 127.0f : levels_of<bits>.deviation;
            if (sizes[r] < least_size) std::memset(levels + r * dim, 0, dim);
            else Simd::round(x + r * dim, dim, aim / sizes[r], levels + r * dim);
        }
        Simd::template nearest<bits>(levels, count * dim, numbers);
        for (int64_t r = 0; r < count; ++r) {
            const int8_t* level = levels + r * dim;
            products[r] = sum_of_products<W>(x + r * dim, dim, [&](int64_t i) { return widen<W>(level + i); });
        }
        for (int64_t r = 0; r < count; ++r) {
            // The scale of least squared error for these levels; never negative, as nearly every level has its number's sign.
            const float fitted = products[r] / static_cast<float>(Simd::squares(levels + r * dim, dim));
            const uint16_t scale = sizes[r] < least_size ? 0 : f32_to_f16(fitted);
            if (scale >= 0x7c00) return first + r;
            pack<bits>(numbers + r * dim, dim, codes + (first + r) * (dim / 8 * bits));
            std::memcpy(scales + first + r, &scale, 2);
        }
    }
    return n;
}

template <class Float>
void encode_fp8(const float* x, int64_t dim, float scale, char* codes) {
    for (int64_t i = 0; i < dim; ++i) codes[i] = static_cast<char>(Float::from_f32(x[i] / scale));
}

// By way of f16, which has room for both kinds: e5m2 is its upper byte, and e4m3 has an exponent that is 8 less.
template <class Simd>
void decode_fp8(bool e4m3, const char* codes, int64_t dim, float scale, float* out) {
    constexpr int64_t most = 256;
    const auto* in = reinterpret_cast<const uint8_t*>(codes);
    for (int64_t i = 0; i < dim; i += most) {
        const int64_t count = std::min(most, dim - i);
        uint16_t halves[most];
        for (int64_t j = 0; j < count; ++j) {
            const unsigned code = in[i + j];
            halves[j] = static_cast<uint16_t>(e4m3 ? (code & 0x80) << 8 | (code & 0x7f) << 7 : code << 8);
        }
        Simd::f16_to_floats(reinterpret_cast<const char*>(halves), count, out + i);
        const float exponent = e4m3 ? 256.0f : 1.0f;
        for (int64_t j = i; j < i + count; ++j) out[j] = out[j] * exponent * scale;
    }
}

// From these f32 bits on a number rounds beyond the largest one.
inline uint32_t too_large(Codec codec) {
    switch (codec) {
        case Codec::bf16: return 0x7f7f8000u;
        case Codec::f16: return 0x477ff000u;   // 65520
        case Codec::e4m3: return 0x43e80001u;  // above 464
        case Codec::e5m2: return 0x47700000u;  // 61440
        default: return 0x7f800000u;
    }
}

template <class Simd>
bool encode_row(Codec codec, const float* x, int64_t dim, char* codes, char* scale) {
    const uint32_t top = largest_bits(x, dim);
    if (top >= too_large(codec)) return false;
    if (codec == Codec::bf16) narrow_rows<Dtype::bf16, Simd>(x, dim, codes);
    if (codec == Codec::f16) narrow_rows<Dtype::f16, Simd>(x, dim, codes);
    if (codec == Codec::e4m3) encode_fp8<E4m3>(x, dim, 1.0f, codes);
    if (codec == Codec::e5m2) encode_fp8<E5m2>(x, dim, 1.0f, codes);
    if (codec == Codec::e4m3_row || codec == Codec::e5m2_row) {
        const bool e4m3 = codec == Codec::e4m3_row;
        const float fitted = std::max(f32_from_bits(top) / (e4m3 ? 448.0f : 57344.0f), min_scale);
        if (e4m3) encode_fp8<E4m3>(x, dim, fitted, codes);
        else encode_fp8<E5m2>(x, dim, fitted, codes);
        std::memcpy(scale, &fitted, 4);
    }
    return true;
}

template <class Simd>
int64_t encode_rows(Codec codec, const float* x, int64_t n, int64_t dim, char* codes, char* scales) {
    [[maybe_unused]] auto* halves = reinterpret_cast<uint16_t*>(scales);
    if constexpr (Simd::encodes_levels) {
        if (codec == Codec::int3) return encode_levels<3, Simd>(x, n, dim, codes, halves);
        if (codec == Codec::int4) return encode_levels<4, Simd>(x, n, dim, codes, halves);
        if (codec == Codec::int5) return encode_levels<5, Simd>(x, n, dim, codes, halves);
        if (codec == Codec::int6) return encode_levels<6, Simd>(x, n, dim, codes, halves);
    }
    for (int64_t row = 0; row < n; ++row, x += dim, codes += code_bytes(codec, dim), scales += scale_bytes(codec))
        if (!encode_row<Simd>(codec, x, dim, codes, scales)) return row;
    return n;
}

template <class Simd>
void level_rows(Codec codec, const char* codes, int64_t n, int64_t dim, int8_t* out) {
    if (codec == Codec::int3) Simd::template levels<3>(codes, n, dim, out);
    if (codec == Codec::int4) Simd::template levels<4>(codes, n, dim, out);
    if (codec == Codec::int5) Simd::template levels<5>(codes, n, dim, out);
    if (codec == Codec::int6) Simd::template levels<6>(codes, n, dim, out);
}

template <class Simd>
void decode_rows(Codec codec, const char* codes, const char* scales, int64_t n, int64_t dim, float* out) {
    for (int64_t row = 0; row < n; ++row, codes += code_bytes(codec, dim), scales += scale_bytes(codec), out += dim) {
        float scale = 1.0f;
        if (scale_bytes(codec) == 4) std::memcpy(&scale, scales, 4);
        if (codec == Codec::bf16) widen_rows<Dtype::bf16, Simd>(codes, 0, 1, dim, out);
        if (codec == Codec::f16) widen_rows<Dtype::f16, Simd>(codes, 0, 1, dim, out);
        if (codec == Codec::e4m3 || codec == Codec::e4m3_row) decode_fp8<Simd>(true, codes, dim, scale, out);
        if (codec == Codec::e5m2 || codec == Codec::e5m2_row) decode_fp8<Simd>(false, codes, dim, scale, out);
        if (!is_integer(codec)) continue;
        if (has_levels(codec)) {
            uint16_t half;
            std::memcpy(&half, scales, 2);
            scale = f16_to_f32(half);
        }
        int8_t room[most_levels];
        const auto* values = reinterpret_cast<const int8_t*>(codes);
        if (has_levels(codec)) {
            level_rows<Simd>(codec, codes, 1, dim, room);
            values = room;
        }
        for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(values[i]) * scale;
    }
}

template <class Simd>
void level_scales(const char* scales, int64_t n, float* out) {
    Simd::f16_to_floats(scales, n, out);
}

template <class Simd>
constexpr CodecKernels codec_kernels_of() {
    return {{widen_rows<Dtype::f32, Simd>, widen_rows<Dtype::f16, Simd>, widen_rows<Dtype::bf16, Simd>},
            {narrow_rows<Dtype::f32, Simd>, narrow_rows<Dtype::f16, Simd>, narrow_rows<Dtype::bf16, Simd>},
            narrow_within<Dtype::f16, Simd>,
            narrow_within<Dtype::bf16, Simd>,
            rotate<Simd::lanes>,
            rotate_back<Simd::lanes>,
            encode_rows<Simd>,
            decode_rows<Simd>,
            level_rows<Simd>,
            level_scales<Simd>,
            nullptr,
            nullptr,
            nullptr};
}

// Conversions of f16 number by number.
inline void f16_to_floats_plainly(const char* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, in + 2 * i, 2);
        out[i] = f16_to_f32(bits);
    }
}
inline void floats_to_f16_plainly(const float* in, int64_t count, char* out) {
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t bits = f32_to_f16(in[i]);
        std::memcpy(out + 2 * i, &bits, 2);
    }
}

// What needs no vector instructions: a processor's struct derives from it, and has its own in place of some.
struct Plain {
    static constexpr int lanes = 4;
    static constexpr bool encodes_levels = true;
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
}  // namespace kvmmap
