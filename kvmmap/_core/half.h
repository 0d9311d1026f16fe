// f16 and bf16 to f32 and back, in integers: the same bits on every machine, whatever its rounding mode or
// flush-to-zero flags. Narrowing rounds to nearest, ties to even, and overflows to infinity, as IEEE says.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvmmap {
// Every kernel file gets its own copies: one shared by the linker could hold instructions that this machine lacks.
namespace {

inline uint32_t f32_bits(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

inline float f32_from_bits(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline float bf16_to_f32(uint16_t bits) { return f32_from_bits(static_cast<uint32_t>(bits) << 16); }

inline uint16_t f32_to_bf16(float v) {
    uint32_t bits = f32_bits(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_f32(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    uint32_t exponent = h >> 10 & 0x1f;
    uint32_t mantissa = h & 0x3ff;
    if (exponent == 0x1f) return f32_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    if (!mantissa) return f32_from_bits(sign);
    int shift = __builtin_clz(mantissa) - 21;  // subnormal: bring the leading one to bit 10
    return f32_from_bits(sign | static_cast<uint32_t>(113 - shift) << 23 | (mantissa << shift & 0x3ff) << 13);
}

inline uint16_t f32_to_f16(float v) {
    uint32_t bits = f32_bits(v);
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
    if (bits < 0x33000001u) return sign;            // at most half the smallest subnormal, 2^-25: rounds to zero
    uint32_t kept, dropped_bits;
    if (bits >= 0x38800000u) {  // normal in f16
        kept = bits - 0x38000000u;
        dropped_bits = 13;
    } else {
        dropped_bits = 126 - (bits >> 23);
        kept = (bits & 0x7fffffu) | 0x800000u;
    }
    uint32_t half = 1u << (dropped_bits - 1);
    uint32_t dropped = kept & ((1u << dropped_bits) - 1);
    kept >>= dropped_bits;
    if (dropped > half || (dropped == half && (kept & 1))) ++kept;
    return sign | static_cast<uint16_t>(kept);
}

}  // namespace
}  // namespace kvmmap
