// Products of digits and codes, 16 positions and 64 numbers at a time, for up to four query rows at once.
//
// vpdpbusd sums four neighbouring bytes into a lane. So codes are put in order as they are loaded: of keys, four numbers of
// a key side by side and 16 keys in a register; of values, four positions of a number side by side and 16 numbers in a
// register. No sum ever runs across lanes. The shuffles share the processor with the products, which take longer: to do
// both at once is faster than to keep what was put in order, as storing 64 bytes takes two cycles of Zen 4.
//
// Sums go by name and not by index, and through functions that are inlined by force: GCC would keep arrays, and what it
// passes by reference, on the stack.
#pragma once

#include <type_traits>

#include "attend_digits_avx512.h"
#include "attend_rows_avx512.h"

namespace kvmmap {
namespace {

// A query row's sums over 16 keys. Of two digits, the middle ones are left out, here and below.
template <int digits>
struct KeySums {
    static constexpr bool three = digits == 3;
    __m512i low, middle, high;

    [[gnu::always_inline]] explicit KeySums(const Digits& row)
        : low(_mm512_set1_epi32(row.start[0])), middle(_mm512_set1_epi32(row.start[1])),
          high(_mm512_set1_epi32(row.start[digits - 1])) {}
    [[gnu::always_inline]] KeySums() : low(_mm512_setzero_si512()), middle(low), high(low) {}

    [[gnu::always_inline]] void add(__m512i keys, const char* step) {
        add_products(low, keys, step);
        if constexpr (three) add_products(middle, keys, step + 4);
        add_products(high, keys, step + 4 * (digits - 1));
    }

    [[gnu::always_inline]] void add(const KeySums& more) {
        low = _mm512_add_epi32(low, more.low);
        if constexpr (three) middle = _mm512_add_epi32(middle, more.middle);
        high = _mm512_add_epi32(high, more.high);
    }

    [[gnu::always_inline]] void store(float worth, float* out) const {
        const __m512 sum = three ? put_together(low, middle, high) : put_together(low, high);
        _mm512_store_ps(out, _mm512_mul_ps(sum, _mm512_set1_ps(worth)));
    }
};

// out[r * out_stride + i] = query r . the key row at `keys + i * stride`, for 16 keys; `queries` as prepared. `ahead` fetches
// 16 lines of what comes next, every 64 numbers.
template <int digits, int R, class Rows, class Fetch>
[[gnu::noinline]] void multiply_keys(const Rows& rows, const char* keys, int64_t stride, int64_t dim,
                                     const char* const* queries, float* out, int64_t out_stride, Fetch& ahead) {
    static_assert(R >= 1 && R <= 4);
    const char *q0 = queries[0], *q1 = queries[R > 1 ? 1 : 0], *q2 = queries[R > 2 ? 2 : 0], *q3 = queries[R > 3 ? 3 : 0];
    const auto row = [](const char* query) -> const Digits& { return *reinterpret_cast<const Digits*>(query); };
    constexpr int64_t step = step_bytes<digits>;
    KeySums<digits> s0(row(q0)), s1(row(q1)), s2(row(q2)), s3(row(q3)), odd;
    q0 += query_header, q1 += query_header, q2 += query_header, q3 += query_header;
    for (int64_t d = 0; d < dim; d += 64) {
        ahead.fetch(16);
        __m512i v[16];
        for (int64_t i = 0; i < 16; ++i)
            v[i] = rows.load_unsigned(keys + i * stride, d);
        transpose_16(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            // A sum is ready for the next product after four cycles: of one query alone there are two sets of sums.
            if constexpr (R == 1) (i % 2 ? odd : s0).add(v[i], q0 + i * step);
            if constexpr (R > 1) s0.add(v[i], q0 + i * step), s1.add(v[i], q1 + i * step);
            if constexpr (R > 2) s2.add(v[i], q2 + i * step);
            if constexpr (R > 3) s3.add(v[i], q3 + i * step);
        }
        q0 += 16 * step, q1 += 16 * step, q2 += 16 * step, q3 += 16 * step;
    }
    if constexpr (R == 1) s0.add(odd);
    s0.store(row(queries[0]).worth, out);
    if constexpr (R > 1) s1.store(row(queries[1]).worth, out + out_stride);
    if constexpr (R > 2) s2.store(row(queries[2]).worth, out + 2 * out_stride);
    if constexpr (R > 3) s3.store(row(queries[3]).worth, out + 3 * out_stride);
}

// 64 numbers of four positions, put in order: registers a and b hold one half of them, c and d the other.
struct FourRows {
    __m512i v0, v1, v2, v3;

    template <class Rows>
    [[gnu::always_inline]] FourRows(const Rows& rows, const char* p, int64_t stride, int64_t d)
        : v0(rows.load(p, d)), v1(rows.load(p + stride, d)), v2(rows.load(p + 2 * stride, d)),
          v3(rows.load(p + 3 * stride, d)) {}

    template <bool second>
    [[gnu::always_inline]] void half(__m512i& a, __m512i& b) const {
        const __m512i x = second ? _mm512_unpackhi_epi8(v0, v1) : _mm512_unpacklo_epi8(v0, v1);
        const __m512i y = second ? _mm512_unpackhi_epi8(v2, v3) : _mm512_unpacklo_epi8(v2, v3);
        a = _mm512_unpacklo_epi16(x, y), b = _mm512_unpackhi_epi16(x, y);
    }
};

// A query row's sums over half of 64 numbers of the values.
template <int digits>
struct HalfSums {
    static constexpr bool three = digits == 3;
    static constexpr int registers = 2 * digits;

    __m512i low_a, low_b, middle_a, middle_b, high_a, high_b;

    [[gnu::always_inline]] HalfSums()
        : low_a(_mm512_setzero_si512()), low_b(low_a), middle_a(low_a), middle_b(low_a), high_a(low_a), high_b(low_a) {}
    [[gnu::always_inline]] explicit HalfSums(const __m512i* p)
        : low_a(p[0]), low_b(p[1]), middle_a(p[2]), middle_b(p[3]), high_a(p[registers - 2]), high_b(p[registers - 1]) {}
    [[gnu::always_inline]] void keep(__m512i* p) const {
        p[0] = low_a, p[1] = low_b, p[registers - 2] = high_a, p[registers - 1] = high_b;
        if constexpr (three) p[2] = middle_a, p[3] = middle_b;
    }

    [[gnu::always_inline]] void add(__m512i a, __m512i b, const char* step) {
        const __m512i low = four_bytes(step), high = four_bytes(step + 4 * (digits - 1));
        add_products(low_a, low, a), add_products(low_b, low, b);
        if constexpr (three) {
            const __m512i middle = four_bytes(step + 4);
            add_products(middle_a, middle, a), add_products(middle_b, middle, b);
        }
        add_products(high_a, high, a), add_products(high_b, high, b);
    }

    // sums += what was summed here, in units of `worth`.
    [[gnu::always_inline]] void add_to(float* sums, float worth) const {
        add_part(low_a, middle_a, high_a, worth, sums);
        add_part(low_b, middle_b, high_b, worth, sums + 16);
    }
    [[gnu::always_inline]] static void add_part(__m512i low, __m512i middle, __m512i high, float worth, float* sums) {
        const __m512 more = three ? put_together(low, middle, high) : put_together(low, high);
        _mm512_store_ps(sums, _mm512_fmadd_ps(more, _mm512_set1_ps(worth), _mm512_load_ps(sums)));
    }
};

// Weights of query rows, as digits, and where what they weigh is summed: row r at digits + r * stride.
struct WeightRows {
    const char* digits;
    int64_t stride;
    const float* worth;
    float* const* sums;
};

// sums[r] += weights r . values, over `count` times 16 positions and 64 numbers from d on. The i-th position of the j-th 16 is
// at values + j * step + i * stride. `ahead` fetches 16 lines for each 16 positions.
template <int digits, int R, bool second, class Stored, class Fetch>
[[gnu::always_inline]] inline void multiply_half(const Stored& stored, const char* values, int64_t d, int64_t step,
                                                 int64_t stride, int64_t count, const WeightRows& rows, Fetch* ahead) {
    const char* weights = rows.digits;
    const int64_t first = second ? d + 32 : d;
    HalfSums<digits> s0, s1, s2, s3;
    for (int64_t j = 0; j < count; ++j, values += step) {
        const char* p = values;
        if (ahead) ahead->fetch(16);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q, p += 4 * stride, weights += step_bytes<digits>) {
            __m512i a, b;
            FourRows(stored, p, stride, d).half<second>(a, b);
            s0.add(a, b, weights);
            if constexpr (R > 1) s1.add(a, b, weights + rows.stride);
            if constexpr (R > 2) s2.add(a, b, weights + 2 * rows.stride);
            if constexpr (R > 3) s3.add(a, b, weights + 3 * rows.stride);
        }
    }
    s0.add_to(rows.sums[0] + first, rows.worth[0]);
    if constexpr (R > 1) s1.add_to(rows.sums[1] + first, rows.worth[1]);
    if constexpr (R > 2) s2.add_to(rows.sums[2] + first, rows.worth[2]);
    if constexpr (R > 3) s3.add_to(rows.sums[3] + first, rows.worth[3]);
}

// Number d and the 63 after it, in two halves: sums of four rows then fit the registers.
template <int digits, int R, class Stored, class Fetch>
[[gnu::noinline]] void multiply_values(const Stored& stored, const char* values, int64_t d, int64_t step, int64_t stride,
                                       int64_t count, const WeightRows& rows, Fetch& ahead) {
    const auto run = [&](const auto& some) __attribute__((always_inline)) {
        multiply_half<digits, R, false>(some, values, d, step, stride, count, rows, &ahead);
        multiply_half<digits, R, true, std::decay_t<decltype(some)>, Fetch>(some, values, d, step, stride, count, rows, nullptr);
    };
    // Whether numbers are the upper halves of bytes is known outside of the loops: to shift by a register takes two instructions.
    if constexpr (std::is_same_v<Stored, LevelRows<4, false>>) d < stored.half() ? run(HalfRows<false>(stored)) : run(HalfRows<true>(stored));
    else run(stored);
}

}  // namespace
}  // namespace kvmmap
