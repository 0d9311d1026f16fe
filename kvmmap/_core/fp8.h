// The two 8-bit floats of the OCP specification (OFP8, revision 1.0) from f32: e4m3 without infinities, and e5m2.
// Narrowing rounds to nearest, ties to even. The caller refuses what rounds beyond the largest number.
#pragma once

#include <cstdint>

#include "half.h"

namespace kvmmap {
// Every kernel file gets its own copies: one shared by the linker could hold instructions that this machine lacks.
namespace {

template <int exponent_bits, int mantissa_bits>
struct Fp8 {
    static constexpr int bias = (1 << (exponent_bits - 1)) - 1;
    static constexpr uint32_t least_normal = static_cast<uint32_t>(128 - bias) << 23;  // as f32 bits
    static constexpr int dropped = 23 - mantissa_bits;

    static uint8_t from_f32(float v) {
        const uint32_t bits = f32_bits(v), size = bits & 0x7fffffffu;
        const uint32_t rounded = (size + (1u << (dropped - 1)) - 1 + (size >> dropped & 1)) >> dropped;
        const uint32_t normal = rounded - (static_cast<uint32_t>(127 - bias) << mantissa_bits);
        // Adding a power of two whose last bit is the smallest subnormal rounds to a multiple of that.
        constexpr uint32_t one = static_cast<uint32_t>(23 - (bias - 1) - mantissa_bits + 127) << 23;
        const uint32_t small = f32_bits(f32_from_bits(size) + f32_from_bits(one)) - one;
        return static_cast<uint8_t>((size >= least_normal ? normal : small) | (bits >> 24 & 0x80u));
    }
};

using E4m3 = Fp8<4, 3>;
using E5m2 = Fp8<5, 2>;

}  // namespace
}  // namespace kvmmap
