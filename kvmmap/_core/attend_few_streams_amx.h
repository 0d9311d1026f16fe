// Streams of one or two rows of queries whose keys are multiplied with AMX; of three or four that were given in 16 bits, too.
//
// A tile's rows are the 16 streams, and its second operand has the digits of the rows of queries as columns. So 64 numbers of a
// position of every stream cost a product of 16 cycles, where interleaving keys takes 64 shuffles and their products 48
// instructions for each row of queries. Over int8 codes in cache that is 0.8 of the time. Codes of fewer bits are made int8 in
// the first-level cache, some steps before they are multiplied.
#pragma once

#include "attend_few_streams_avx512.h"
#include "attend_packing_amx.h"

namespace kvmmap {
namespace {

// `rows` of queries a KV head.
template <int digits, int rows>
class AmxFewStreams : public FewStreams<digits> {
    using Base = FewStreams<digits>;
    using typename Base::Slab, typename Base::Scales;
    using Base::heads_, Base::queries_, Base::keys_, Base::job_, Base::now_, Base::lanes;

    static constexpr int64_t columns = digits * rows > 4 ? 8 : 4;  // digits of the rows, in the order of rows
    static constexpr int64_t lag = 6;  // steps until what was stored is read: before it is in the cache, reading waits
    static constexpr int64_t ring = 8, product_bytes = 16 * columns * 4;

  public:
    AmxFewStreams(const AttendJob& job, const CodedRows& keys, const FewRows<digits>& key_rows, const CodedRows& values,
                  const FewRows<digits>& value_rows, const char* prepared, AttendState state)
        : Base(job, keys, key_rows, values, value_rows, prepared, state), query_bytes_(job.dim * columns) {
        const int64_t plain_bytes = keys_.plain ? lanes * job.dim : 0;
        packed_.reset(new char[64 + heads_ * query_bytes_ + ring * (product_bytes + plain_bytes)]);
        packed_queries_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(packed_.get()) + 63) / 64 * 64);
        products_ = packed_queries_ + heads_ * query_bytes_;
        plain_ = products_ + ring * product_bytes;
        std::memset(packed_queries_, 0, heads_ * query_bytes_);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t d = 0; d < job.dim; d += 4)
                    std::memcpy(packed_queries_ + h * query_bytes_ + d * columns + 4 * digits * r,
                                queries_[h * rows + r] + query_header + d / 4 * step_bytes<digits>, 4 * digits);
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; ++i) {
            // Bytes of a row; tiles 0 to 3 are sums and queries, the others keys.
            config[16 + 2 * i] = static_cast<uint8_t>(i < 4 ? 4 * columns : 64);
            config[48 + i] = 16;
        }
        stored_before();
        _tile_loadconfig(config);
    }
    ~AmxFewStreams() override { _tile_release(); }

  protected:
    void score(const Slab& keys, const Slab& next, const Scales& scales) override {
        if (keys_.plain) job_.dim == 128 ? walk_keys<true, 128>(keys, next, scales) : walk_keys<true, 0>(keys, next, scales);
        else job_.dim == 128 ? walk_keys<false, 128>(keys, next, scales) : walk_keys<false, 0>(keys, next, scales);
    }

  private:
    // `fixed`: the dimension, or 0 for any.
    template <bool plain, int64_t fixed>
    void walk_keys(const Slab& keys, const Slab& next, const Scales& scales) {
        const int64_t dim = fixed ? fixed : job_.dim, stride = plain ? dim : keys.stream(), row_bytes = keys_.row_bytes;
        constexpr int64_t after = plain ? lag : 0;  // steps from making keys plain to multiplying them
        const int64_t steps = now_.length * heads_;
        const auto plain_of = [this, dim](int64_t step) { return plain_ + step % ring * lanes * dim; };
        const auto products_of = [this](int64_t step) { return products_ + step % ring * product_bytes; };
        int64_t multiplied = 0, h = 0, j = 0;  // the head to be multiplied next; the head and position whose products are taken next
        for (int64_t step = 0; step <= steps + after + lag; ++step) {
            const int64_t now = step - after, before = now - lag - 1;
            if (now >= 0 && now < steps) {
                const char* codes = plain ? plain_of(now) : keys.codes + now * row_bytes;
                const char* queries = packed_queries_ + multiplied * query_bytes_;
                if (now % 2) multiply<true>(codes, stride, dim, queries);
                else multiply<false>(codes, stride, dim, queries);
                if (++multiplied == heads_) multiplied = 0;
            }
            if (now > 0 && now <= steps) store(now - 1, products_of(now - 1));
            if (before >= 0) {
                take(products_of(before), h, j);
                if (++h == heads_) h = 0, ++j;
            }
            if (step < steps) {
                Base::fetch_scales(scales, step);
                Base::fetch(keys, next, step * row_bytes, row_bytes);
                if constexpr (plain) keys_.plain(keys.codes + step * row_bytes, keys.stream(), dim, plain_of(step));
            }
        }
    }

    template <bool odd>
    [[gnu::always_inline]] static void multiply(const char* keys, int64_t stride, int64_t dim, const char* queries) {
        stored_before();
        if constexpr (odd) _tile_zero(1);
        else _tile_zero(0);
        for (int64_t d = 0; d < dim; d += 64) {
            if constexpr (odd) {
                _tile_loadd(3, queries + d * columns, 4 * columns);
                _tile_loadd(5, keys + d, stride);
                _tile_dpbssd(1, 5, 3);
            } else {
                _tile_loadd(2, queries + d * columns, 4 * columns);
                _tile_loadd(4, keys + d, stride);
                _tile_dpbssd(0, 4, 2);
            }
        }
    }

    // Stores the sums of a step, a step later: they are there by then.
    [[gnu::always_inline]] static void store(int64_t step, char* products) {
        if (step % 2) _tile_stored(1, products, 4 * columns);
        else _tile_stored(0, products, 4 * columns);
    }

    // Products of a step, [stream][column], to where weights will be.
    [[gnu::always_inline]] void take(const char* products, int64_t h, int64_t j) const {
        stored_before();
        __m512i v[16];
        // Columns of streams, those with the same number modulo 4 side by side.
#pragma GCC unroll 4
        for (int i = 0; i < (digits * rows + 3) / 4; ++i) by_columns(products + 16 * i, v + 4 * i);
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 4
        for (int64_t r = 0; r < rows; ++r) {
            const __m512i* row = v + digits * r;
            const __m512 sum = digits == 3 ? put_together(row[0], row[1], row[2]) : put_together(row[0], row[1]);
            const __m512 worth = _mm512_set1_ps(reinterpret_cast<const Digits*>(queries_[h * rows + r])->worth);
            _mm512_store_ps(Base::weights_of(h, r) + j * lanes, _mm512_mul_ps(_mm512_permutexvar_ps(order, sum), worth));
        }
    }

    // Four columns of 16 rows of so many; lane l of a register has rows l, 4 + l, 8 + l and 12 + l.
    [[gnu::always_inline]] static void by_columns(const char* products, __m512i* out) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if constexpr (columns == 4) {
                v[i] = _mm512_load_si512(products + 64 * i);
            } else {
                const auto* p = reinterpret_cast<const __m128i*>(products + 16 * columns * i);
                const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(p)), _mm_load_si128(p + columns / 4), 1);
                const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(p + columns / 2)), _mm_load_si128(p + 3 * columns / 4), 1);
                v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            }
        }
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
        const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        out[0] = _mm512_unpacklo_epi64(a, b), out[1] = _mm512_unpackhi_epi64(a, b);
        out[2] = _mm512_unpacklo_epi64(c, d), out[3] = _mm512_unpackhi_epi64(c, d);
    }

    int64_t query_bytes_;
    std::unique_ptr<char[]> packed_;
    char* packed_queries_;  // [head][four numbers][column][4]
    char* products_;        // of some steps
    char* plain_;           // keys of some steps
};

// Walks over as much of a range as every query sees; returns where it ends.
template <int digits>
int64_t walk_few_amx(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range, int64_t coming,
                     const char* prepared, AttendState state) {
    const int64_t rows = job.n * job.group();
    auto run = rows == 1 ? walk_few<digits, AmxFewStreams<digits, 1>, true> : walk_few<digits, AmxFewStreams<digits, 2>, true>;
    if constexpr (digits == 2)
        if (rows > 2) run = rows == 3 ? walk_few<2, AmxFewStreams<2, 3>, true> : walk_few<2, AmxFewStreams<2, 4>, true>;
    return run(job, keys, values, range, coming, prepared, state);
}

}  // namespace
}  // namespace kvmmap
