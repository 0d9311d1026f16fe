// Sums of 16 values, times their weights, for one to four rows of queries, in memory: HalfSums of 64 numbers after 64 numbers, of
// each row those of one after the other.
#pragma once

#include "attend_products_avx512.h"

namespace kvmmap {
namespace {

template <int digits, class Rows>
void add_each_64(const char* values, int64_t stride, int64_t dim, const char* weights, __m512i* sums) {
    using Sums = HalfSums<digits>;
    const Rows stored(dim);
    for (int64_t d = 0; d < dim; d += 64, sums += 2 * Sums::registers) {
        Sums first(sums), second(sums + Sums::registers);
        const char *p = values, *w = weights;
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q, p += 4 * stride, w += step_bytes<digits>) {
            const FourRows four(stored, p, stride, d);
            __m512i a, b;
            four.half<false>(a, b);
            first.add(a, b, w);
            four.half<true>(a, b);
            second.add(a, b, w);
        }
        first.keep(sums), second.keep(sums + Sums::registers);
    }
}

// Where the sums and weights of some rows of queries lie, and how far those of one from the next.
struct RowsApart {
    int64_t sums, weights;
};

// Adds half of 64 numbers of 16 values to the sums of R rows.
template <int digits, int R, bool second, class Stored>
[[gnu::always_inline]] inline void add_half_to(const Stored& stored, const char* p, int64_t stride, int64_t d, const char* weights,
                                               __m512i* sums, RowsApart apart) {
    using Sums = HalfSums<digits>;
    Sums s0(sums), s1(sums + (R > 1) * apart.sums), s2(sums + 2 * (R > 2) * apart.sums), s3(sums + 3 * (R > 3) * apart.sums);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q, p += 4 * stride, weights += step_bytes<digits>) {
        __m512i a, b;
        FourRows(stored, p, stride, d).template half<second>(a, b);
        s0.add(a, b, weights);
        if constexpr (R > 1) s1.add(a, b, weights + apart.weights);
        if constexpr (R > 2) s2.add(a, b, weights + 2 * apart.weights);
        if constexpr (R > 3) s3.add(a, b, weights + 3 * apart.weights);
    }
    s0.keep(sums);
    if constexpr (R > 1) s1.keep(sums + apart.sums);
    if constexpr (R > 2) s2.keep(sums + 2 * apart.sums);
    if constexpr (R > 3) s3.keep(sums + 3 * apart.sums);
}

template <int digits, class Rows, int R>
void add_to_rows(const char* values, int64_t stride, int64_t dim, const char* weights, __m512i* sums, RowsApart apart) {
    constexpr int registers = HalfSums<digits>::registers;
    const Rows stored(dim);
    const auto run = [&](const auto& some, int64_t from, int64_t to) __attribute__((always_inline)) {
        for (int64_t d = from; d < to; d += 64, sums += 2 * registers) {
            add_half_to<digits, R, false>(some, values, stride, d, weights, sums, apart);
            add_half_to<digits, R, true>(some, values, stride, d, weights, sums + registers, apart);
        }
    };
    if constexpr (std::is_same_v<Rows, LevelRows<4, false>>) run(HalfRows<false>(stored), 0, dim / 2), run(HalfRows<true>(stored), dim / 2, dim);
    else run(stored, 0, dim);
}

// A half of what add_halves adds.
template <int digits, bool second>
[[gnu::always_inline]] inline void add_half(const LevelTable<4, false>& table, const char* values, int64_t stride, const char* weights,
                                            __m512i* lower, __m512i* upper) {
    HalfSums<digits> low(lower), high(upper);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q, values += 4 * stride, weights += step_bytes<digits>) {
        const FourRows four(PackedRows{}, values, stride, 0);
        __m512i a, b;
        four.half<second>(a, b);
        low.add(table.lower(a), table.lower(b), weights);
        high.add(table.upper(a), table.upper(b), weights);
    }
    low.keep(lower), high.keep(upper);
}

// Of 4 bits and a multiple of 128 numbers: bytes are put in order before they are looked up, half as many.
template <int digits>
void add_halves(const char* values, int64_t stride, int64_t dim, const char* weights, __m512i* sums) {
    constexpr int registers = HalfSums<digits>::registers;
    const LevelTable<4, false> table;
    __m512i* upper = sums + dim / 128 * 2 * registers;
    for (int64_t d = 0; d < dim / 2; d += 64, sums += 2 * registers, upper += 2 * registers) {
        add_half<digits, false>(table, values + d, stride, weights, sums, upper);
        add_half<digits, true>(table, values + d, stride, weights, sums + registers, upper + registers);
    }
}

}  // namespace
}  // namespace kvmmap
