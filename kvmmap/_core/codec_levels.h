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

}  // namespace
}  // namespace kvmmap
