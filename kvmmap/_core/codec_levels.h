// The tables of the codecs of 3 to 6 bits: levels as int8 values, ascending, symmetric about zero.
//
// 3 to 5 bits: the levels of least squared error for a Gaussian (Max, "Quantizing for minimum distortion", 1960; Lloyd, 1982),
// the outermost at 127. 6 bits: 4 * code - 126, as a row of 64 or 128 numbers seldom reaches the ends of such a table.
#pragma once

#include <cstdint>

#include "codec.h"

namespace kvmmap {
namespace {

struct Levels {
    int bits;
    float deviation;      // standard deviation that the levels are made for; 0: the row's largest number becomes 127
    int8_t positive[16];  // 3 to 5 bits: the upper half of the levels

    constexpr int half() const { return 1 << (bits - 1); }
    constexpr int8_t level(int code) const {
        if (bits == 6) return static_cast<int8_t>(4 * code - 126);
        return code >= half() ? positive[code - half()] : static_cast<int8_t>(-positive[half() - 1 - code]);
    }
    // Sizes above this one are nearer to positive level k + 1 than to level k; halves belong to the lower one.
    constexpr int8_t bound(int k) const { return static_cast<int8_t>((positive[k] + positive[k + 1]) / 2); }
};

constexpr Levels tables[] = {
    {3, 59.0f, {14, 45, 79, 127}},
    {4, 46.5f, {6, 18, 31, 44, 58, 75, 96, 127}},
    {5, 39.0f, {3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127}},
    {6, 0.0f, {}},
};

template <int bits>
constexpr const Levels& levels_of = tables[bits - 3];

// 16 bytes to shuffle from.
struct Register {
    alignas(16) int8_t values[16];
};

// Levels of codes `first` and up.
template <int bits>
constexpr Register level_register(int first) {
    Register r{};
    for (int i = 0; i < 16; ++i) r.values[i] = levels_of<bits>.level((first + i) & ((1 << bits) - 1));
    return r;
}

// The nearest positive level to a size in [8 * i, 8 * i + 7] is `base` of i, and one more above each of two bounds.
struct Buckets {
    Register base, first, second;
};
template <int bits>
constexpr Buckets buckets() {
    Buckets found{};
    for (int i = 0; i < 16; ++i) {
        found.first.values[i] = found.second.values[i] = 127;
        int8_t base = 0, within = 0;
        for (int k = 0; k + 1 < levels_of<bits>.half(); ++k) {
            const int bound = levels_of<bits>.bound(k);
            if (bound < 8 * i) ++base;
            else if (bound < 8 * i + 7) (within++ ? found.second : found.first).values[i] = static_cast<int8_t>(bound);
        }
        found.base.values[i] = base;
    }
    return found;
}

// The same search by an addition: sizes 2|q| in whole numbers, plus `offset`, lie in buckets of 16 with at most one bound in
// each. `add` of its bucket moves a size to 16 * k and up, k being the nearest positive level: its code with
// 3 and 4 bits, its place among the positive ones with 5.
struct Steps {
    int offset;
    Register add;
};
template <int bits>
constexpr Steps steps_of() {
    Steps found{-1, {}};
    for (int offset = 0; offset < 16 && found.offset < 0; ++offset) {
        bool fits = true;
        for (int i = 0; i < 16; ++i) {
            int below = bits == 5 ? 0 : levels_of<bits>.half(), within = 0, first = 16;
            for (int k = 0; k + 1 < levels_of<bits>.half(); ++k) {
                const int least = 2 * levels_of<bits>.bound(k) + 1 + offset;  // the halves above a bound are beyond it
                if (least <= 16 * i) ++below;
                else if (least < 16 * i + 16) ++within, first = least - 16 * i;
            }
            if (within > 1) fits = false;
            found.add.values[i] = static_cast<int8_t>(static_cast<uint8_t>(16 * (below - i) + 16 - first));
        }
        if (fits) found.offset = offset;
    }
    return found;
}

// Positive level k, or minus it.
template <int bits>
constexpr Register positive_levels(int sign) {
    Register r{};
    for (int k = 0; k < 16; ++k) r.values[k] = static_cast<int8_t>(sign * levels_of<bits>.positive[k % levels_of<bits>.half()]);
    return r;
}

// Byte 4 * i + n of a lane to byte 4 * n + 3: bytes to the upper ones of whole numbers.
struct Spreads {
    Register of[4];
};
constexpr Spreads spread_bytes() {
    Spreads spreads{};
    for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 16; ++n) spreads.of[i].values[n] = static_cast<int8_t>(n % 4 == 3 ? 4 * i + n / 4 : -128);
    return spreads;
}
constexpr Spreads spreads = spread_bytes();

}  // namespace
}  // namespace kvmmap
