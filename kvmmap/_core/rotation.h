// The Hadamard transform of the rotated codecs, W numbers at a time. Sums and differences are made at distances 1, 2, 4, ...
// in this order, one IEEE operation each, so that every kernel gives the same bits.
#pragma once

#include <utility>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "codec.h"
#include "lanes.h"

namespace kvmmap {
namespace {

template <int W>
class Hadamard {
    using L = Lanes<W>;
    using F = typename L::F;
    using I = typename L::I;

  public:
    // n numbers in place, n a power of two.
    static void run(float* x, int64_t n) {
        if (n < W) return few(x, n);
        run(x, n, [x](int64_t i) { return L::load(x + i); });
    }

    // Those times their factors.
    static void run(float* x, const float* factors, int64_t n) {
        if (n < W) {
            for (int64_t i = 0; i < n; ++i) x[i] *= factors[i];
            return few(x, n);
        }
        run(x, n, [x, factors](int64_t i) { return L::load(x + i) * L::load(factors + i); });
    }

    // n numbers, W or more, given W at a time.
    template <class Load>
    [[gnu::always_inline]] static inline void run(float* x, int64_t n, Load&& load) {
        if (n == W) return registers<1>(x, 0, load);
        if (n == 2 * W) return registers<2>(x, 0, load);
        if (n == 4 * W) return registers<4>(x, 0, load);
        for (int64_t i = 0; i < n; i += 8 * W) registers<8>(x, i, load);
        for (int64_t h = 8 * W; h < n; h *= 2)
            for (int64_t i = 0; i < n; i += 2 * h)
                for (int64_t j = i; j < i + h; j += W) {
                    const F a = L::load(x + j), b = L::load(x + j + h);
                    L::store(x + j, a + b);
                    L::store(x + j + h, a - b);
                }
    }

    // R * W numbers in registers.
    template <int R>
    [[gnu::always_inline]] static inline void transform(F (&v)[R]) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            v[i] = within<1>(v[i]);
            v[i] = within<2>(v[i]);
            if constexpr (W > 4) v[i] = within<4>(v[i]);
            if constexpr (W > 8) v[i] = within<8>(v[i]);
        }
        if constexpr (R > 1) between<R, 1>(v);
        if constexpr (R > 2) between<R, 2>(v);
        if constexpr (R > 4) between<R, 4>(v);
        if constexpr (R > 8) between<R, 8>(v);
    }

  private:
    static void few(float* x, int64_t n) {
        for (int64_t h = 1; h < n; h *= 2)
            for (int64_t i = 0; i < n; i += 2 * h)
                for (int64_t j = i; j < i + h; ++j) {
                    const float a = x[j], b = x[j + h];
                    x[j] = a + b;
                    x[j + h] = a - b;
                }
    }

    template <int R, class Load>
    [[gnu::always_inline]] static inline void registers(float* x, int64_t first, Load&& load) {
        F v[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) v[i] = load(first + i * W);
        transform(v);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) L::store(x + first + i * W, v[i]);
    }

    template <int R, int h>
    [[gnu::always_inline]] static inline void between(F (&v)[R]) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            if (!(i & h)) {
                const F a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
    }

    // Numbers h apart in one register: the partner plus the number, or minus it in the upper ones.
    template <int h>
    [[gnu::always_inline]] static inline F within(F v) {
        return within<h>(v, std::make_integer_sequence<int, W>{});
    }
    template <int h, int... lane>
    [[gnu::always_inline]] static inline F within(F v, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
        const F partner = __builtin_shufflevector(v, v, (lane ^ h)...);
#else
        const F partner = __builtin_shuffle(v, I{(lane ^ h)...});
#endif
        // One operation for two: the product is exact, so that only the sum is rounded, as below.
#if defined(__AVX512F__)
        if constexpr (W == 16) return _mm512_fmadd_ps(v, F{(lane & h ? -1.0f : 1.0f)...}, partner);
#elif defined(__FMA__)
        if constexpr (W == 8) return _mm256_fmadd_ps(v, F{(lane & h ? -1.0f : 1.0f)...}, partner);
#endif
        constexpr int32_t minus = static_cast<int32_t>(0x80000000u);
        I bits;
        std::memcpy(&bits, &v, sizeof bits);
        bits ^= I{(lane & h ? minus : 0)...};
        F turned;
        std::memcpy(&turned, &bits, sizeof turned);
        return partner + turned;
    }
};

// body(first number, how many) for each block of a row.
template <class Body>
inline void each_block(int64_t dim, Body&& body) {
    for (int64_t first = 0; first < dim;) {
        int64_t block = 1;
        while (2 * block <= dim - first) block *= 2;
        body(first, block);
        first += block;
    }
}

template <int W>
void rotate(const Rotation& rotation, int64_t n, float* rows) {
    for (float* row = rows; row < rows + n * rotation.dim; row += rotation.dim) {
        each_block(rotation.dim, [&](int64_t first, int64_t block) {
            Hadamard<W>::run(row + first, rotation.factors + first, block);
        });
    }
}

template <int W>
void rotate_back(const Rotation& rotation, int64_t n, float* rows) {
    for (float* row = rows; row < rows + n * rotation.dim; row += rotation.dim) {
        each_block(rotation.dim, [&](int64_t first, int64_t block) { Hadamard<W>::run(row + first, block); });
        for (int64_t i = 0; i < rotation.dim; ++i) row[i] *= rotation.factors[i];
    }
}

}  // namespace
}  // namespace kvmmap
