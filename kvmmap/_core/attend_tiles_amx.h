// Attention of f32 queries with AMX: the products of 16 rows of digits with 16 positions or numbers, over 64 bytes of each, are one
// instruction that takes 16 cycles: eight times what vpdpbusd does in that time. The digits, their sums and the sums' order are
// those of attend_bytes_avx512.h, so that either takes up where the other has ended.
//
// A tile's second operand has four neighbouring bytes of a column in a lane, as vpdpbusd wants them. So keys and values of a
// span of a head are put in that order once, in memory that stays in the second-level cache, and all rows of queries are
// multiplied with them, 16 at a time. More than eight rows are worth it: a chunk of a prompt takes a third of the time. For
// eight, storing what was put in order takes as long as the products that are saved, and fewer are walked as streams.
#pragma once

#include <memory>

#include "attend_packing_amx.h"

namespace kvmmap {
namespace {

constexpr int64_t amx_span = 256;  // positions put in order at a time; a multiple of 64

class AmxWalk {
    static constexpr int digits = 3;

  public:
    static bool suit(const AttendJob& job) { return job.n * job.group() > 8; }

    AmxWalk(const AttendJob& job, const CodedRows& keys, const Packing& key_packing, const CodedRows& values,
            const Packing& value_packing, const char* prepared, AttendState state)
        : job_(job), stored_keys_(keys), stored_values_(values), key_packing_(key_packing), value_packing_(value_packing),
          prepared_(prepared), state_(state), rows_(job.n * job.group()), at_once_(std::min(rows_, tile_rows)),
          width_(Bytes<digits>::width(job.value_dim)), softmax_(job.softcap, state, width_) {
        const int64_t blocks = (rows_ + tile_rows - 1) / tile_rows;
        const int64_t queries = job.kv_heads * blocks * block_bytes();
        memory_.reset(new char[64 + queries + amx_span * (job.dim + job.value_dim + 8 + tile_rows * (4 + digits)) + 8 * tile_bytes]);
        queries_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
        keys_ = queries_ + queries;
        values_ = keys_ + amx_span * job.dim;
        key_scales_ = reinterpret_cast<float*>(values_ + amx_span * job.value_dim);
        value_scales_ = key_scales_ + amx_span;
        weights_ = value_scales_ + amx_span;
        weight_digits_ = reinterpret_cast<char*>(weights_ + tile_rows * amx_span);
        sums_ = reinterpret_cast<int32_t*>(weight_digits_ + digits * tile_rows * amx_span);
        std::memset(weight_digits_, 0, digits * tile_rows * amx_span);
        for (int64_t i = 0; i < job.n; ++i) sights_.emplace_back(job, i);
    }

    // Adds whole tiles of 64 positions of a range to the state; returns where they end.
    int64_t run(const AttendRange& range, int64_t coming) {
        const int64_t stop = range.start + (range.stop - range.start) / 64 * 64;
        if (range.start == stop) return stop;
        for (int64_t head = range.head; head < range.head_end; ++head) take_queries(head);
        configure_tiles(at_once_);
        if (rows_ <= tile_rows) {  // bounded by memory: in the order of the rows
            for (int64_t start = range.start; start < stop; start += amx_span)
                for (int64_t head = range.head; head < range.head_end; ++head)
                    run_head(head, start, std::min(amx_span, stop - start), ahead(range, start, head, coming));
        } else {  // by products: all spans of a head, so that its sums stay in cache
            for (int64_t head = range.head; head < range.head_end; ++head)
                for (int64_t start = range.start; start < stop; start += amx_span)
                    run_head(head, start, std::min(amx_span, stop - start), Ahead{});
        }
        _tile_release();
        return stop;
    }

  private:
    int64_t block_bytes() const { return digits * tile_rows * job_.dim; }

    int64_t row_of(int64_t head, int64_t r) const {
        return r / job_.group() * job_.q_heads + head * job_.group() + r % job_.group();
    }

    char* queries_of(int64_t head, int64_t row) const {
        const int64_t blocks = (rows_ + tile_rows - 1) / tile_rows;
        return queries_ + (head * blocks + row / tile_rows) * block_bytes();
    }

    // Digits of a head's queries, from steps of four numbers to [16 rows][digit][row][dim].
    void take_queries(int64_t head) {
        for (int64_t row = 0; row < rows_; ++row) {
            const char* in = prepared_ + row_of(head, row) * Bytes<digits>::query_bytes(job_.dim) + query_header;
            char* out = queries_of(head, row) + row % tile_rows * job_.dim;
            for (int64_t d = 0; d < job_.dim; d += 4, in += step_bytes<digits>)
                for (int g = 0; g < digits; ++g) std::memcpy(out + g * tile_rows * job_.dim + d, in + 4 * g, 4);
        }
        for (int64_t row = rows_; row % tile_rows && rows_ > tile_rows; ++row)
            for (int g = 0; g < digits; ++g)
                std::memset(queries_of(head, row) + (g * tile_rows + row % tile_rows) * job_.dim, 0, job_.dim);
    }

    // A head's share of the next span of all heads: they lie side by side.
    Ahead ahead(const AttendRange& range, int64_t start, int64_t head, int64_t coming) const {
        if (start + 2 * amx_span > coming || range.head_end - range.head != job_.kv_heads) return {};
        const int64_t keys = amx_span * key_packing_.row_bytes, values = amx_span * value_packing_.row_bytes;
        const int64_t next = (start + amx_span) * job_.kv_heads;
        return {stored_keys_.codes + next * key_packing_.row_bytes + head * keys, keys,
                stored_values_.codes + next * value_packing_.row_bytes + head * values, values};
    }

    static int64_t scale_bytes_of(const CodedRows& rows) { return rows.format.codec == Codec::int8 ? 4 : 2; }

    void run_head(int64_t head, int64_t start, int64_t count, Ahead ahead) {
        int64_t first = 0, last = job_.n;
        while (first < last && sights_[first].none(start, start + count)) ++first;
        while (last > first && sights_[last - 1].none(start, start + count)) --last;
        if (first == last) return;

        const int64_t heads = job_.kv_heads, row = start * heads + head;
        key_packing_.keys(stored_keys_.codes + row * key_packing_.row_bytes, heads * key_packing_.row_bytes, count, job_.dim, keys_, ahead);
        value_packing_.values(stored_values_.codes + row * value_packing_.row_bytes, heads * value_packing_.row_bytes, count,
                              job_.value_dim, values_, ahead);
        key_packing_.scales(stored_keys_.scales + row * scale_bytes_of(stored_keys_), heads, count, 1.0f, key_scales_);
        value_packing_.scales(stored_values_.scales + row * scale_bytes_of(stored_values_), heads, count, sums_scale, value_scales_);

        const int64_t end = last * job_.group();
        for (int64_t from = first * job_.group() / tile_rows * tile_rows; from < end; from += tile_rows)
            run_seen(head, start, count, from, std::min(tile_rows, rows_ - from));
    }

    // Without the whole 64 positions before and behind what rows of queries see.
    void run_seen(int64_t head, int64_t start, int64_t count, int64_t from, int64_t rows) {
        int64_t first = start + count, last = start;
        for (int64_t i = from / job_.group(); i <= (from + rows - 1) / job_.group(); ++i) {
            if (sights_[i].none(start, start + count)) continue;
            first = std::min(first, sights_[i].first(start, start + count));
            last = std::max(last, sights_[i].last(start + count));
        }
        if (first >= last) return;
        const int64_t at = (first - start) / 64 * 64;
        run_rows(head, start + at, at, (last - start - at + 63) / 64 * 64, from, rows);
    }

    // `at`: where these positions begin of those in order.
    void run_rows(int64_t head, int64_t start, int64_t at, int64_t count, int64_t from, int64_t rows) {
        score(head, at, count, from, rows);
        float worth[tile_rows];
        bool any = false;
        for (int64_t r = 0; r < rows; ++r) {
            float* weights = weights_ + r * amx_span;
            const Sight& sight = sights_[(from + r) / job_.group()];
            softmax_.scale(weights, key_scales_ + at, count);
            if (!sight.whole(start, start + count)) hide(sight, start, count, weights);
            any |= softmax_.weigh(row_of(head, from + r), weights, value_scales_ + at, count);
            worth[r] = store_weight_rows(weights, count, r);
        }
        if (any) add(head, at, count, from, rows, worth);
    }

    static void hide(const Sight& sight, int64_t start, int64_t count, float* scores) {
        for (int64_t j = 0; j < count; j += 64) {
            const uint64_t seen = sight.seen(start + j);
            for (int64_t i = 0; i < 64; i += 16)
                _mm512_mask_store_ps(scores + j + i, static_cast<__mmask16>(~seen >> i), _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
        }
    }

    // Products of queries and keys, in place of the weights they will become.
    void score(int64_t head, int64_t at, int64_t count, int64_t from, int64_t rows) {
        const char *queries = queries_of(head, from), *keys = keys_ + at * job_.dim;
        const int64_t dim = job_.dim, digit = tile_rows * dim;
        float worth[tile_rows];
        for (int64_t r = 0; r < rows; ++r)
            worth[r] = reinterpret_cast<const Digits*>(prepared_ + row_of(head, from + r) * Bytes<digits>::query_bytes(dim))->worth;
        for (int64_t j = 0; j < count; j += 16) {
            stored_before();
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            for (int64_t d = 0; d < dim; d += 64, keys += tile_bytes) {
                _tile_loadd(6, keys, 64);
                _tile_loadd(3, queries + d, dim);
                _tile_dpbssd(0, 3, 6);
                _tile_loadd(4, queries + digit + d, dim);
                _tile_dpbssd(1, 4, 6);
                _tile_loadd(5, queries + 2 * digit + d, dim);
                _tile_dpbssd(2, 5, 6);
            }
            _tile_stored(0, sums_, 64);
            _tile_stored(1, sums_ + 256, 64);
            _tile_stored(2, sums_ + 512, 64);
            for (int64_t r = 0; r < rows; ++r)
                _mm512_store_ps(weights_ + r * amx_span + j, _mm512_mul_ps(sum_of(sums_ + 16 * r), _mm512_set1_ps(worth[r])));
        }
    }

    // 16 numbers of a row, of which the digits' sums lie a tile apart.
    static __m512 sum_of(const int32_t* sums) {
        return put_together(_mm512_load_si512(sums), _mm512_load_si512(sums + 256), _mm512_load_si512(sums + 512));
    }

    // As store_weights, digit by digit: [digit][row][position].
    float store_weight_rows(const float* weights, int64_t count, int64_t row) {
        constexpr int bits = 8 * digits;
        __m512 most = _mm512_load_ps(weights);
        for (int64_t j = 16; j < count; j += 16) most = _mm512_max_ps(most, _mm512_load_ps(weights + j));
        const int exponent = std::max(exponent_of(highest(most)), least_exponent);
        const __m512 factor = _mm512_set1_ps(power_of_two(bits - exponent));
        char* out = weight_digits_ + row * amx_span;
        for (int64_t j = 0; j < count; j += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(weights + j), factor));
            for (int g = 0; g < digits; ++g, whole = _mm512_srli_epi32(whole, 8))
                _mm_store_si128(reinterpret_cast<__m128i*>(out + g * tile_rows * amx_span + j), _mm512_cvtepi32_epi8(whole));
        }
        return power_of_two(exponent - bits);
    }

    // sums += weights . values.
    void add(int64_t head, int64_t at, int64_t count, int64_t from, int64_t rows, const float* worth) {
        const int64_t step = job_.value_dim * 64;  // bytes of values that 64 positions take
        constexpr int64_t digit = tile_rows * amx_span;
        float* sums[tile_rows];
        for (int64_t r = 0; r < rows; ++r) sums[r] = state_.sums + row_of(head, from + r) * width_;
        for (int64_t t = 0; t < job_.value_dim / 16; ++t) {
            const char *values = values_ + at * job_.value_dim + t * tile_bytes, *weights = weight_digits_;
            stored_before();
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            for (int64_t j = 0; j < count; j += 64, values += step, weights += 64) {
                _tile_loadd(6, values, 64);
                _tile_loadd(3, weights, amx_span);
                _tile_dpbusd(0, 3, 6);
                _tile_loadd(4, weights + digit, amx_span);
                _tile_dpbusd(1, 4, 6);
                _tile_loadd(5, weights + 2 * digit, amx_span);
                _tile_dpbusd(2, 5, 6);
            }
            _tile_stored(0, sums_, 64);
            _tile_stored(1, sums_ + 256, 64);
            _tile_stored(2, sums_ + 512, 64);
            for (int64_t r = 0; r < rows; ++r) {
                float* out = sums[r] + t * 16;
                _mm512_store_ps(out, _mm512_fmadd_ps(sum_of(sums_ + 16 * r), _mm512_set1_ps(worth[r]), _mm512_load_ps(out)));
            }
        }
    }

    const AttendJob& job_;
    CodedRows stored_keys_, stored_values_;
    const Packing &key_packing_, &value_packing_;
    const char* prepared_;
    AttendState state_;
    int64_t rows_, at_once_, width_;
    Softmax<Bytes<digits>> softmax_;
    std::vector<Sight> sights_;
    std::unique_ptr<char[]> memory_;  // of all that follow
    char* queries_;                   // [head][16 rows][digit][row][dim]
    char *keys_, *values_;            // of a span of a head, in order
    float *key_scales_, *value_scales_;
    float* weights_;                  // [row][position]
    char* weight_digits_;             // [digit][row][position]
    int32_t* sums_;                   // tiles of sums
};

}  // namespace
}  // namespace kvmmap
