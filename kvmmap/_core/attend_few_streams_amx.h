// Streams of one or two rows of queries whose keys are multiplied with AMX: any codes that the kernel reads.
//
// A tile's rows are the 16 streams, and its second operand has the digits of the rows of queries as columns. So 64 numbers of a
// position of every stream cost a product of 16 cycles, where interleaving keys takes 64 shuffles and their products 48
// instructions for each row of queries. Codes of fewer bits become int8 in memory that stays in the first-level cache.
#pragma once

#include "attend_few_streams_avx512.h"
#include "attend_packing_amx.h"

namespace kvmmap {
namespace {

template <int digits>
class AmxFewStreams : public FewStreams<digits> {
    using Base = FewStreams<digits>;
    using typename Base::Slab;
    using Base::heads_, Base::rows_, Base::queries_, Base::keys_, Base::job_, Base::length, Base::lanes;

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
            for (int64_t r = 0; r < rows_; ++r)
                for (int64_t d = 0; d < job.dim; d += 4)
                    std::memcpy(packed_queries_ + h * query_bytes_ + d * columns + 4 * digits * r,
                                queries_[h * rows_ + r] + query_header + d / 4 * step_bytes<digits>, 4 * digits);
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = i < 4 ? 4 * columns : 64;  // bytes of a row; tiles 0 to 3 are sums and queries, the others keys
            config[48 + i] = 16;
        }
        stored_before();
        _tile_loadconfig(config);
    }
    ~AmxFewStreams() override { _tile_release(); }

  protected:
    void score(const Slab& keys, const Slab& next, const char* const (&scales)[2]) override {
        const int64_t steps = length * heads_, products_after = keys_.plain ? lag : 0, all = steps + products_after;
        for (int64_t step = 0; step <= all + lag; ++step) {
            if (step < steps) {
                Base::fetch_scales(scales, step);
                Base::fetch(keys, next, step * keys_.row_bytes, keys_.row_bytes);
                if (keys_.plain) keys_.plain(keys.codes + step * keys_.row_bytes, keys.stream(), job_.dim, plain_of(step));
            }
            const int64_t now = step - products_after, before = now - lag - 1;
            if (now >= 0 && now <= steps) now % 2 ? multiply<true>(keys, now, steps) : multiply<false>(keys, now, steps);
            if (before >= 0) take(before);
        }
    }

  private:
    static constexpr int64_t columns = 8;  // digits of both rows, in the order of rows
    static constexpr int64_t lag = 6;      // steps until what was stored is read: before it is in the cache, reading waits
    static constexpr int64_t ring = 8, product_bytes = 16 * columns * 4;

    char* plain_of(int64_t step) const { return plain_ + step % ring * lanes * job_.dim; }

    // Sums of a step are stored a step later, when they are there.
    template <bool odd>
    [[gnu::always_inline]] void multiply(const Slab& keys, int64_t step, int64_t steps) {
        const char* codes = keys_.plain ? plain_of(step) : keys.codes + step * keys_.row_bytes;
        const char* queries = packed_queries_ + step % heads_ * query_bytes_;
        const int64_t stride = keys_.plain ? job_.dim : keys.stream();
        stored_before();
        if constexpr (odd) _tile_zero(1);
        else _tile_zero(0);
        for (int64_t d = 0; step < steps && d < job_.dim; d += 64) {
            if constexpr (odd) {
                _tile_loadd(3, queries + d * columns, 4 * columns);
                _tile_loadd(5, codes + d, stride);
                _tile_dpbssd(1, 5, 3);
            } else {
                _tile_loadd(2, queries + d * columns, 4 * columns);
                _tile_loadd(4, codes + d, stride);
                _tile_dpbssd(0, 4, 2);
            }
        }
        if (!step) return;
        char* products = products_ + (step - 1) % ring * product_bytes;
        if constexpr (odd) _tile_stored(0, products, 4 * columns);
        else _tile_stored(1, products, 4 * columns);
    }

    // Products of a step, [stream][column], to where weights will be.
    void take(int64_t step) {
        stored_before();
        const char* products = products_ + step % ring * product_bytes;
        const int64_t h = step % heads_, j = step / heads_;
        const __m512i order = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
        for (int64_t r = 0; r < rows_; ++r) {
            const char* p = products + 4 * digits * r;
            const __m512i low = _mm512_i32gather_epi32(order, p, 4), middle = _mm512_i32gather_epi32(order, p + 4, 4);
            const __m512i high = digits == 3 ? _mm512_i32gather_epi32(order, p + 8, 4) : middle;
            const __m512 sum = digits == 3 ? put_together(low, middle, high) : put_together(low, high);
            const float worth = reinterpret_cast<const Digits*>(queries_[h * rows_ + r])->worth;
            _mm512_store_ps(Base::weights_of(h, r) + j * lanes, _mm512_mul_ps(sum, _mm512_set1_ps(worth)));
        }
    }

    int64_t query_bytes_;
    std::unique_ptr<char[]> packed_;
    char* packed_queries_;  // [head][four numbers][column][4]
    char* products_;        // of some steps
    char* plain_;           // keys of some steps
};

}  // namespace
}  // namespace kvmmap
