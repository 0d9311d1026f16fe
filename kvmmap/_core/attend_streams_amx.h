// Streams of AVX-512 whose keys are multiplied with AMX: of three or four rows of f32 queries.
//
// A tile's rows are the 16 streams, as they lie; its second operand has the digits of all rows of queries as columns. So a
// position of every stream costs two products of 16 cycles, and 40 shuffles to put what comes out in order, where interleaving
// keys takes 128 and the products of their bytes 384 instructions. Keys of 4 and 5 bits are made int8 in the first-level cache
// some steps before. Values and weights go on as without AMX: sums of three digits are too many to keep in memory, as
// attend_few_streams_amx.h does.
#pragma once

#include "attend_few_streams_avx512.h"
#include "attend_packing_amx.h"
#include "attend_streams_avx512.h"

namespace kvmmap {
namespace {

template <class Keys, class Values>
class AmxStreams : public StreamsOf<3, Keys, Values, AmxStreams<Keys, Values>> {
    static constexpr int digits = 3;
    using Base = StreamsOf<3, Keys, Values, AmxStreams>;
    using typename Base::Lines, typename Base::Slab;
    using Base::job_, Base::keys_, Base::heads_, Base::at_once_, Base::queries_, Base::rows_,
        Base::weights_, Base::now_, Base::lanes, Base::span;

    static constexpr int64_t columns = 16;             // low digits of four rows, middle ones, high ones, and room
    static constexpr bool plain = Keys::half_scales;          // keys are made int8 first
    static constexpr int64_t after = plain ? 4 : 0;           // steps later
    static constexpr int64_t lag = 2;                         // steps until products, which tiles store late, are taken
    static constexpr int64_t ring = 4, product_bytes = 16 * columns * 4, plain_ring = 8;

  public:
    AmxStreams(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const char* prepared, AttendState state)
        : Base(job, keys, values, prepared, state), query_bytes_(job.dim * columns),
          make_plain_(plain ? few_rows<digits, true>(keys.format.codec, job.dim).plain : nullptr) {
        packed_.reset(new char[64 + heads_ * query_bytes_ + ring * product_bytes + (plain ? plain_ring * lanes * job.dim : 0)]);
        packed_queries_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(packed_.get()) + 63) / 64 * 64);
        products_ = packed_queries_ + heads_ * query_bytes_;
        plain_ = products_ + ring * product_bytes;
        std::memset(packed_queries_, 0, heads_ * query_bytes_);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows_; ++r)
                for (int64_t d = 0; d < job.dim; d += 4) {
                    const char* in = queries_[h * rows_ + r] + query_header + d / 4 * step_bytes<digits>;
                    char* out = packed_queries_ + h * query_bytes_ + d * columns + 4 * r;
                    for (int g = 0; g < digits; ++g) std::memcpy(out + 16 * g, in + 4 * g, 4);
                }
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = i < 4 ? 4 * columns : 64;  // bytes of a row; tiles 0 to 3 are sums and queries, the others keys
            config[48 + i] = 16;
        }
        stored_before();
        _tile_loadconfig(config);
    }
    ~AmxStreams() { _tile_release(); }

    void score(const Slab& keys, const Slab& values, int64_t, int64_t, bool more) {
        const auto scales = Base::coming_scales(more);
        const int64_t steps = now_.length * heads_, times = job_.dim / 64, stride = plain ? job_.dim : keys.stream();
        int64_t h = 0;  // to be multiplied next
        for (int64_t step = 0; step < steps + after + lag; ++step) {
            const int64_t now = step - after;
            if (plain && step < steps) make_plain_(keys.codes + step * keys_.row_bytes, keys.stream(), job_.dim, plain_of(step));
            if (now >= 0 && now < steps) {
                Base::fetch_scales(scales, now);
                Lines ahead = Base::lines_at(values, now * times * 64 * lanes, times);
                const char* codes = plain ? plain_of(now) : keys.codes + now * keys_.row_bytes;
                const char* queries = packed_queries_ + h * query_bytes_;
                stored_before();
                _tile_zero(0);
                for (int64_t d = 0; d < job_.dim; d += 64) {
                    ahead.fetch(16);
                    _tile_loadd(1, queries + d * columns, 4 * columns);
                    _tile_loadd(4, codes + d, stride);
                    _tile_dpbssd(0, 4, 1);
                }
                _tile_stored(0, products_ + now % ring * product_bytes, 4 * columns);
                if (++h == heads_) h = 0;
            }
            if (now >= lag) take(now - lag);
        }
    }

  private:
    char* plain_of(int64_t step) const { return plain_ + step % plain_ring * lanes * job_.dim; }

    // Products of a step, [stream][digit][row], to where weights will be.
    void take(int64_t step) {
        stored_before();
        const char* products = products_ + step % ring * product_bytes;
        __m512 sums[4];
        put_in_order(products, sums);
        const int64_t h = step % heads_, j = step / heads_;
        for (int64_t r = 0; r < rows_; ++r) {
            const float worth = reinterpret_cast<const Digits*>(queries_[h * rows_ + r])->worth;
            _mm512_store_ps(weights_ + (h * at_once_ + r) * span + j * lanes, _mm512_mul_ps(sums[r], _mm512_set1_ps(worth)));
        }
    }

    [[gnu::always_inline]] static void put_in_order(const char* products, __m512 (&sums)[4]) {
        __m512 four[4];  // streams: in each quarter a stream's rows
        for (int i = 0; i < 4; ++i, products += 256) {
            const __m512i v0 = _mm512_load_si512(products), v1 = _mm512_load_si512(products + 64);
            const __m512i v2 = _mm512_load_si512(products + 128), v3 = _mm512_load_si512(products + 192);
            const __m512i a = _mm512_shuffle_i32x4(v0, v1, 0x44), b = _mm512_shuffle_i32x4(v2, v3, 0x44);
            const __m512i c = _mm512_shuffle_i32x4(v0, v1, 0xee), d = _mm512_shuffle_i32x4(v2, v3, 0xee);
            four[i] = put_together(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0x88));
        }
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(four[0], four[1])), b = _mm512_castps_pd(_mm512_unpacklo_ps(four[2], four[3]));
        const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(four[0], four[1])), d = _mm512_castps_pd(_mm512_unpackhi_ps(four[2], four[3]));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512d rows[4] = {_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b), _mm512_unpacklo_pd(c, d), _mm512_unpackhi_pd(c, d)};
        for (int r = 0; r < 4; ++r) sums[r] = _mm512_permutexvar_ps(order, _mm512_castpd_ps(rows[r]));
    }

    int64_t query_bytes_;
    void (*make_plain_)(const char* keys, int64_t stride, int64_t dim, char* out);
    std::unique_ptr<char[]> packed_;
    char* packed_queries_;  // [head][64 numbers][four numbers][digit][row][4]
    char* products_;        // of some steps
    char* plain_;           // keys of some steps
};

inline bool three_or_four(const AttendJob& job) { return job.n * job.group() == 3 || job.n * job.group() == 4; }

template <class Keys, class Values>
int64_t walk_amx_streams(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                         int64_t coming, const char* prepared, AttendState state) {
    if (!StreamsShape::suit(job, range) || !StreamsShape::begins(job, range, least_rows<Keys, Values>(job))) return range.start;
    return AmxStreams<Keys, Values>(job, keys, values, prepared, state).walk(range, coming);
}

// The same for keys and values of the pairs that presets have, of 128 numbers or a multiple; returns where it ends.
inline int64_t walk_amx_streams(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                         int64_t coming, const char* prepared, AttendState state) {
    using Four = LevelRows<4, false>;
    using Five = LevelRows<5, false>;
    const Codec k = keys.format.codec, v = values.format.codec;
    const bool wide = (k == Codec::int8 || Four::suit(job.dim)) && (v == Codec::int8 || Four::suit(job.value_dim));
    int64_t (*run)(const AttendJob&, const CodedRows&, const CodedRows&, const AttendRange&, int64_t, const char*, AttendState) = nullptr;
    if (k == Codec::int8 && v == Codec::int8) run = walk_amx_streams<Int8Rows, Int8Rows>;
    if (k == Codec::int8 && v == Codec::int4) run = walk_amx_streams<Int8Rows, Four>;
    if (k == Codec::int5 && v == Codec::int4) run = walk_amx_streams<Five, Four>;
    if (k == Codec::int4 && v == Codec::int4) run = walk_amx_streams<Four, Four>;
    return run && wide ? run(job, keys, values, range, coming, prepared, state) : range.start;
}

}  // namespace
}  // namespace kvmmap
