// Attention of 5 to 16 rows of queries with AMX, for queries that were given in 16 bits: a decoding step with many query heads a
// KV head.
//
// Keys are the first operand here, 16 positions a tile, which needs them as they are stored: nothing is put in order. The digits
// of all queries are the columns of the second operand. So 16 positions of 128 numbers cost two products or four, of 16 cycles,
// where putting keys in order takes 128 shuffles; what comes out is put in order instead, and is less. Values are interleaved as
// for chunks. Fewer rows are walked as streams, which take less time up to four.
#pragma once

#include "attend_spans_amx.h"

namespace kvmmap {
namespace {

class AmxFew : AmxSpans {
    static constexpr int64_t positions = 128;  // at a time, of all heads: they and the next ones fit the second-level cache

  public:
    static bool suit(const AttendJob& job) { return job.n * job.group() >= 5 && job.n * job.group() <= tile_rows; }

    AmxFew(const AttendJob& job, const CodedRows& keys, const Packing& key_packing, const CodedRows& values,
           const Packing& value_packing, const char* prepared, AttendState state)
        : AmxSpans(job, keys, key_packing, values, value_packing, prepared, state, span,
                   job.n * job.group() > 8 ? tile_bytes : job.n * job.group() * 64,
                   job.kv_heads * query_bytes(job) + 32 * job.dim),
          queries_(extra_), plain_(queries_ + job.kv_heads * query_bytes(job)) {}

    // Adds a range to the state. Rows before `coming` will be walked next, and may be fetched.
    void run(const AttendRange& range, int64_t coming) {
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8000);  // as for chunks
        for (int64_t head = range.head; head < range.head_end; ++head) take_queries(head);
        for (int64_t start = range.start; start < range.stop; start += positions)
            for (int64_t head = range.head; head < range.head_end; ++head)
                run_head(head, start, std::min(positions, range.stop - start), ahead(range, start, head, coming));
        _tile_release();
        _mm_setcsr(mode);
    }

  private:
    static int64_t query_bytes(const AttendJob& job) { return digits * tile_rows * job.dim; }

    // Digits of a head's queries: [64 numbers][four numbers][low digits of rows, high ones][4], or those of low ones before those
    // of high ones where more than eight rows fill a tile each.
    void take_queries(int64_t head) {
        char* out = queries_ + head * query_bytes(job_);
        std::memset(out, 0, query_bytes(job_));
        const int64_t apart = rows_ > 8 ? 16 * job_.dim : 32;  // of the digits of a row
        for (int64_t r = 0; r < rows_; ++r) {
            const char* in = prepared_ + row_of(head, r) * Bytes<digits>::query_bytes(job_.dim) + query_header;
            for (int64_t d = 0; d < job_.dim; d += 4, in += step_bytes<digits>)
                for (int g = 0; g < digits; ++g) std::memcpy(out + d * 16 + g * apart + 4 * r, in + 4 * g, 4);
        }
    }

    // A head's share of the next positions of all heads: they lie side by side.
    Ahead ahead(const AttendRange& range, int64_t start, int64_t head, int64_t coming) const {
        if (start + 2 * positions > coming || range.head_end - range.head != job_.kv_heads) return {};
        const int64_t keys = positions * key_packing_.row_bytes, values = positions * value_packing_.row_bytes;
        const int64_t next = (start + positions) * job_.kv_heads;
        return {stored_keys_.codes + next * key_packing_.row_bytes + head * keys, keys,
                stored_values_.codes + next * value_packing_.row_bytes + head * values, values};
    }

    void run_head(int64_t head, int64_t start, int64_t count, Ahead ahead) {
        const Block block = block_at(head, 0);
        const Seen seen = look(block, start, start + count);
        if (seen.start >= seen.stop) return;
        const bool whole = seen.whole && seen.start == start && seen.stop == start + count;
        const int64_t row = start * job_.kv_heads + head;
        take_scales(row, count);
        begin_scores();
        configure_tiles(tile_rows);
        if (job_.softcap > 0) score<true>(head, row, count, ahead);
        else score<false>(head, row, count, ahead);
        alignas(64) float worth[tile_rows];
        if (!weigh_scores(block, start, 0, count, whole, worth)) return;
        configure_tiles(rows_ > 8 ? rows_ : digits * rows_);
        for (int64_t d = 0; d < job_.value_dim; d += 64)
            if (rows_ > 8) add_wide(block, row, count, d, worth, ahead);
            else add(block, row, count, d, worth, ahead);
    }

    // Values of 64 positions from j on, numbers d to d + 63, in order.
    void pack(int64_t row, int64_t count, int64_t j, int64_t d, char* out, Ahead& ahead) {
        const int64_t bytes = value_packing_.row_bytes;
        const bool last = j + 64 > count;
        const char* values = last ? last_rows(stored_values_, value_packing_, row, j, count)
                                  : stored_values_.codes + (row + j * job_.kv_heads) * bytes;
        value_packing_.some_values(values, last ? bytes : bytes * job_.kv_heads, job_.value_dim, d, out, ahead);
    }

    // Adds numbers d to d + 63 of the values, weighed, to the sums: both digits of up to eight rows are one operand. What was put
    // in order must not leave the first-level cache, where storing is slow that has to fetch.
    void add(const Block& block, int64_t row, int64_t count, int64_t d, const float* worth, Ahead& ahead) {
        stored_before();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const char* weights = weights_;
        pack(row, count, 0, d, values_, ahead);
        for (int64_t j = 0; j < count; j += 64, weights += digits * tile_bytes) {
            const char* values = values_ + j % 128 * 64;
            // One step ahead, as what was stored reaches tiles late.
            if (j + 64 < count) pack(row, count, j + 64, d, values_ + (j + 64) % 128 * 64, ahead);
            stored_before();
            _tile_loadd(4, weights, 64);
            _tile_loadd(6, values, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, values + tile_bytes, 64);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(6, values + 2 * tile_bytes, 64);
            _tile_dpbusd(2, 4, 6);
            _tile_loadd(7, values + 3 * tile_bytes, 64);
            _tile_dpbusd(3, 4, 7);
        }
        store_four();
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t i = 0; i < 4; ++i) {
                const int32_t* sums = products_ + 256 * i + 16 * r;
                add_to(block.row[r], d + 16 * i, put_together(_mm512_load_si512(sums), _mm512_load_si512(sums + 16 * rows_)), worth[r]);
            }
    }

    // The same of more rows.
    void add_wide(const Block& block, int64_t row, int64_t count, int64_t d, const float* worth, Ahead& ahead) {
        for (int64_t j = 0; j < count; j += 64) pack(row, count, j, d, values_ + j * 64, ahead);
        for (int64_t half = 0; half < 64; half += 32) {
            multiply_two<false>(values_ + half / 16 * tile_bytes, 4 * tile_bytes, count);
            for (int64_t r = 0; r < rows_; ++r)
                for (int64_t i = 0; i < 2; ++i)
                    add_to(block.row[r], d + half + 16 * i, sum_of(products_ + 512 * i + 16 * r), worth[r]);
        }
    }

    template <bool capped>
    void score(int64_t head, int64_t row, int64_t count, Ahead& ahead) {
        float worths[tile_rows] = {};
        for (int64_t r = 0; r < rows_; ++r)
            worths[r] = reinterpret_cast<const Digits*>(prepared_ + row_of(head, r) * Bytes<digits>::query_bytes(job_.dim))->worth;
        const char* queries = queries_ + head * query_bytes(job_);
        const int64_t bytes = key_packing_.row_bytes, whole = count / 64 * 64;
        for (int64_t j = 0; j < (count + 63) / 64 * 64; j += 32) {
            const bool last = j >= whole;  // rows that fill no 64
            int64_t stride = last ? bytes : bytes * job_.kv_heads;
            const char* keys = last ? last_rows(stored_keys_, key_packing_, row, whole, count) + (j - whole) * bytes
                                    : stored_keys_.codes + row * bytes + j * stride;
            if (key_packing_.plain) {
                key_packing_.plain(keys, stride, 32, job_.dim, plain_);
                keys = plain_, stride = job_.dim;
            }
            int32_t* products = products_ + j % 128 / 32 * 1024;
            if (rows_ > 8) {
                multiply_wide(queries, keys, stride, products, ahead);
                multiply_wide(queries, keys + 16 * stride, stride, products + 512, ahead);
            } else {
                multiply(queries, keys, stride, products, ahead);
            }
            // Products of before, while these are computed, and not the last ones, which are on their way to the cache.
            if (j >= 64) take_products<capped>(j - 64, worths, ahead);
        }
        const int64_t end = (count + 63) / 64 * 64;
        take_products<capped>(end - 64, worths, ahead);
        take_products<capped>(end - 32, worths, ahead);
    }

    // products[position][digit][row], of 32 positions.
    void multiply(const char* queries, const char* keys, int64_t stride, int32_t* products, Ahead& ahead) const {
        stored_before();
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < job_.dim; d += 64) {
            ahead.fetch(16);
            _tile_loadd(2, queries + d * 16, 64);
            _tile_loadd(6, keys + d, stride);
            _tile_dpbssd(0, 6, 2);
            _tile_loadd(7, keys + 16 * stride + d, stride);
            _tile_dpbssd(1, 7, 2);
        }
        _tile_stored(0, products, 64);
        _tile_stored(1, products + 256, 64);
    }

    // products[digit][position][row], of 16 positions.
    void multiply_wide(const char* queries, const char* keys, int64_t stride, int32_t* products, Ahead& ahead) const {
        stored_before();
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < job_.dim; d += 64) {
            _tile_loadd(6, keys + d, stride);
            ahead.fetch(8);
            _tile_loadd(2, queries + d * 16, 64);
            _tile_dpbssd(0, 6, 2);
            _tile_loadd(3, queries + 16 * job_.dim + d * 16, 64);
            _tile_dpbssd(1, 6, 3);
        }
        _tile_stored(0, products, 64);
        _tile_stored(1, products + 256, 64);
    }

    template <bool capped>
    void take_products(int64_t at, const float* worths, Ahead& ahead) {
        const int32_t* products = products_ + at % 128 / 32 * 1024;
        stored_before();
        for (int64_t j = at; j < at + 32; j += 16, products += rows_ > 8 ? 512 : 256) {
            const __m512 scale = _mm512_load_ps(key_scales_ + j), log = _mm512_load_ps(value_logs_ + j);
            __m512 rows[tile_rows];
            ahead.fetch(16);
            if (rows_ <= 8) eight_rows(products, rows);
            else sixteen_rows(products, rows);
            for (int64_t r = 0; r < rows_; ++r) take_scores<capped>(rows[r], worths[r], r, j, scale, log);
        }
    }

    // [16 positions][low digits of 8 rows, high ones] -> rows.
    static void eight_rows(const int32_t* products, __m512 (&rows)[tile_rows]) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(products + 16 * i);
        transpose_16(v);
        for (int r = 0; r < 8; ++r) rows[r] = put_together(v[r], v[r + 8]);
    }

    // [digit][16 positions][16 rows] -> rows.
    static void sixteen_rows(const int32_t* products, __m512 (&rows)[tile_rows]) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) v[i] = _mm512_castps_si512(sum_of(products + 16 * i));
        transpose_16(v);
        for (int r = 0; r < 16; ++r) rows[r] = _mm512_castsi512_ps(v[r]);
    }

    char* queries_;    // [head], in order
    char* plain_;      // 32 rows of keys
};

}  // namespace
}  // namespace kvmmap
