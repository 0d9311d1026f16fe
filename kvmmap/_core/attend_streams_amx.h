// Streams of AVX-512 whose keys are multiplied with AMX: of three or four rows of queries that were given in 16 bits, over int8 codes.
//
// A tile's rows are the 16 streams, as they lie; its second operand has the digits of all rows of queries as columns. So a
// position of every stream costs two products of 16 cycles, and 24 shuffles to put what comes out in order, where interleaving
// keys takes 128 and the products of their bytes 256 instructions. Values and weights go on as without AMX.
#pragma once

#include "attend_packing_amx.h"
#include "attend_streams_avx512.h"

namespace kvmmap {
namespace {

class AmxStreams : public Streams<2, Int8Rows, Int8Rows> {
    static constexpr int64_t columns = 8;  // low digits of four rows, high ones
    static constexpr int64_t lag = 2;      // steps until products, which tiles store late, are taken

  public:
    static bool suit(const AttendJob& job) { return job.n * job.group() == 3 || job.n * job.group() == 4; }

    AmxStreams(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const char* prepared, AttendState state)
        : Streams(job, keys, values, prepared, state), query_bytes_(job.dim * columns) {
        packed_.reset(new char[64 + heads_ * query_bytes_ + ring * product_bytes]);
        packed_queries_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(packed_.get()) + 63) / 64 * 64);
        products_ = packed_queries_ + heads_ * query_bytes_;
        std::memset(packed_queries_, 0, heads_ * query_bytes_);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows_; ++r)
                for (int64_t d = 0; d < job.dim; d += 4) {
                    const char* in = queries_[h * rows_ + r] + query_header + d / 4 * step_bytes<2>;
                    char* out = packed_queries_ + h * query_bytes_ + d * columns + 4 * r;
                    std::memcpy(out, in, 4), std::memcpy(out + 2 * columns, in + 4, 4);
                }
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = i < 4 ? 4 * columns : 64;  // bytes of a row; tiles 0 to 3 are sums and queries, the others keys
            config[48 + i] = 16;
        }
        stored_before();
        _tile_loadconfig(config);
    }
    ~AmxStreams() override { _tile_release(); }

  protected:
    void score(int64_t start, const Slab& keys, const Slab& values, int64_t, int64_t, bool more) override {
        const char* key_scales = stored_keys_.scales + (start + span) * heads_ * 4;
        const char* value_scales = stored_values_.scales + (start + span) * heads_ * 4;
        const int64_t steps = length * heads_, times = job_.dim / 64;
        for (int64_t step = 0, h = 0; step < steps; ++step, h = h + 1 == heads_ ? 0 : h + 1) {
            if (more) {
                __builtin_prefetch(key_scales + step * 64, 0, 2);
                __builtin_prefetch(value_scales + step * 64, 0, 2);
            }
            Lines ahead = lines_at(values, step * times * 64 * lanes, times);
            const char *codes = keys.codes + step * keys_.row_bytes, *queries = packed_queries_ + h * query_bytes_;
            stored_before();
            _tile_zero(0);
            for (int64_t d = 0; d < job_.dim; d += 64) {
                ahead.fetch(16);
                _tile_loadd(1, queries + d * columns, 4 * columns);
                _tile_loadd(4, codes + d, keys.stream());
                _tile_dpbssd(0, 4, 1);
            }
            _tile_stored(0, products_ + step % ring * product_bytes, 4 * columns);
            if (step >= lag) take(step - lag);
        }
        for (int64_t step = std::max<int64_t>(0, steps - lag); step < steps; ++step) take(step);
    }

  private:
    static constexpr int64_t ring = 4, product_bytes = 16 * columns * 4;

    // Products of a step, [stream][digit][row], to where weights will be.
    void take(int64_t step) {
        stored_before();
        const char* products = products_ + step % ring * product_bytes;
        __m512i v[8], t[8];
        for (int i = 0; i < 8; ++i) v[i] = _mm512_load_si512(products + 64 * i);
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        // v[r] has of row r: low digits of even streams, high ones, low ones of odd streams, high ones.
        const __m512i low = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
        const int64_t h = step % heads_, j = step / heads_;
        for (int64_t r = 0; r < rows_; ++r) {
            const float worth = reinterpret_cast<const Digits*>(queries_[h * rows_ + r])->worth;
            const __m512 sum = put_together(_mm512_permutex2var_epi32(v[r], low, v[r + 4]), _mm512_permutex2var_epi32(v[r], high, v[r + 4]));
            _mm512_store_ps(weights_ + (h * at_once_ + r) * span + j * lanes, _mm512_mul_ps(sum, _mm512_set1_ps(worth)));
        }
    }

    int64_t query_bytes_;
    std::unique_ptr<char[]> packed_;
    char* packed_queries_;  // [head][64 numbers][four numbers][digit][row][4]
    char* products_;        // of some steps
};

// Walks over as much of a range as makes whole spans that every query sees; returns where it ends.
inline int64_t walk_amx_streams(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                                int64_t coming, const char* prepared, AttendState state) {
    constexpr int64_t span = StreamsShape::span;
    int64_t start = range.start;
    if (!AmxStreams::suit(job) || !StreamsShape::suit(job, range) || start + span > range.stop) return start;
    AmxStreams streams(job, keys, values, prepared, state);
    for (; start + span <= range.stop && StreamsShape::see_all(job, start); start += span) streams.run(start, start + 2 * span <= coming);
    return start;
}

}  // namespace
}  // namespace kvmmap
