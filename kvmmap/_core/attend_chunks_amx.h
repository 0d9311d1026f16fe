// Attention of many rows of queries with AMX, for queries that were given in 16 bits: chunks of a prompt. Keys and values of a
// region of a head are put in order once, and stay in the second-level cache while all rows of queries go over them.
#pragma once

#include "attend_spans_amx.h"

namespace kvmmap {
namespace {

class AmxChunks : AmxSpans {
  public:
    static bool suit(const AttendJob& job) { return job.n * job.group() > tile_rows; }

    AmxChunks(const AttendJob& job, const CodedRows& keys, const Packing& key_packing, const CodedRows& values,
              const Packing& value_packing, const char* prepared, AttendState state)
        : AmxSpans(job, keys, key_packing, values, value_packing, prepared, state, region_of(job), tile_bytes,
                   blocks_of(job) * (block_bytes(job) + tile_rows * 4) + region_of(job) * job.dim),
          blocks_(blocks_of(job)), region_(region_of(job)), queries_(extra_), keys_(queries_ + blocks_ * block_bytes(job)),
          query_worths_(reinterpret_cast<float*>(keys_ + region_ * job.dim)) {}

    // Adds a range to the state.
    void run(const AttendRange& range) {
        // Weights that are nothing beside the largest become zero, and not numbers that the processor is slow with.
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8000);
        configure_tiles(tile_rows);
        for (int64_t head = range.head; head < range.head_end; ++head) {
            take_queries(head);
            for (int64_t start = range.start; start < range.stop; start += region_)
                run_region(head, start, std::min(region_, range.stop - start));
        }
        _tile_release();
        _mm_setcsr(mode);
    }

  private:
    static int64_t blocks_of(const AttendJob& job) { return (job.n * job.group() + tile_rows - 1) / tile_rows; }
    static int64_t block_bytes(const AttendJob& job) { return digits * tile_rows * job.dim; }

    // Positions put in order at a time: what stays in the second-level cache, and a multiple of a span.
    static int64_t region_of(const AttendJob& job) {
        return std::max<int64_t>(1, 512 * 1024 / (job.dim + job.value_dim) / span) * span;
    }

    // Digits of a head's queries, from steps of four numbers to [16 rows][digit][row][dim]; rows that are none are zeros.
    void take_queries(int64_t head) {
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        for (int64_t row = 0; row < blocks_ * tile_rows; ++row) {
            char* out = queries_ + row / tile_rows * block_bytes(job_) + row % tile_rows * job_.dim;
            const char* in = row < rows_ ? prepared_ + row_of(head, row) * Bytes<digits>::query_bytes(job_.dim) : nullptr;
            query_worths_[row] = in ? reinterpret_cast<const Digits*>(in)->worth : 0;
            for (int64_t d = 0; d < job_.dim; d += 64) {
                const char* steps = in + query_header + d / 4 * step_bytes<digits>;
                const __m512i a = in ? _mm512_load_si512(steps) : _mm512_setzero_si512();
                const __m512i b = in ? _mm512_load_si512(steps + 64) : _mm512_setzero_si512();
                _mm512_store_si512(out + d, _mm512_permutex2var_epi32(a, evens, b));
                _mm512_store_si512(out + tile_rows * job_.dim + d, _mm512_permutex2var_epi32(a, odds, b));
            }
        }
    }

    void run_region(int64_t head, int64_t start, int64_t count) {
        int64_t first = 0, last = job_.n;
        while (first < last && sights_[first].none(start, start + count)) ++first;
        while (last > first && sights_[last - 1].none(start, start + count)) --last;
        if (first == last) return;
        pack(head, start, count);
        const int64_t group = job_.group();
        for (int64_t b = first * group / tile_rows; b * tile_rows < last * group; ++b) {
            const Block block = block_at(head, b);
            for (int64_t at = 0; at < count; at += span) run_block(block, start + at, at, std::min(span, count - at));
        }
    }

    void pack(int64_t head, int64_t start, int64_t count) {
        const int64_t row = start * job_.kv_heads + head;
        RowsAhead keys_ahead = ahead(stored_keys_, key_packing_, row, count);
        RowsAhead values_ahead = ahead(stored_values_, value_packing_, row, count);
        pack_codes(stored_keys_, key_packing_, key_packing_.chunk_keys, job_.dim, row, count, keys_, keys_ahead);
        pack_codes(stored_values_, value_packing_, value_packing_.chunk_values, job_.value_dim, row, count, values_, values_ahead);
        take_scales(row, count);
    }

    RowsAhead ahead(const CodedRows& stored, const Packing& packing, int64_t row, int64_t count) const {
        const int64_t stride = job_.kv_heads * packing.row_bytes;
        return {stored.codes + row * packing.row_bytes + ahead_rows * stride, stride, packing.row_bytes, count - ahead_rows};
    }

    void run_block(const Block& block, int64_t start, int64_t at, int64_t count) {
        const Seen seen = look(block, start, start + count);
        if (seen.start >= seen.stop) return;
        at += seen.start - start, count = seen.stop - seen.start;
        const int64_t padded = (count + 63) / 64 * 64;
        begin_scores();
        if (job_.softcap > 0) score<true>(block, at, padded);
        else score<false>(block, at, padded);
        alignas(64) float worth[tile_rows];
        if (weigh_scores(block, seen.start, at, count, seen.whole, worth)) add(block, at, padded, worth);
    }

    // Exponents of a block's weights, less what is common to a row.
    template <bool capped>
    void score(const Block& block, int64_t at, int64_t count) {
        const int64_t dim = job_.dim, digit = tile_rows * dim;
        const char *queries = queries_ + block.number * block_bytes(job_), *keys = keys_ + at * dim;
        const float* worths = query_worths_ + block.number * tile_rows;
        for (int64_t j = 0; j < count; j += 32, keys += 32 * dim) {
            stored_before();
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < dim; d += 64) {
                _tile_loadd(4, queries + d, dim);
                _tile_stream_loadd(6, keys + d * 16, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(5, queries + digit + d, dim);
                _tile_dpbssd(1, 5, 6);
                _tile_stream_loadd(7, keys + 16 * dim + d * 16, 64);
                _tile_dpbssd(2, 4, 7);
                _tile_dpbssd(3, 5, 7);
            }
            int32_t* products = products_ + j % 64 / 32 * 1024;
            // The products before, while these are computed.
            if (j) take_products<capped>(products_ + (j + 32) % 64 / 32 * 1024, worths, at, j - 32);
            _tile_stored(0, products, 64);
            _tile_stored(1, products + 256, 64);
            _tile_stored(2, products + 512, 64);
            _tile_stored(3, products + 768, 64);
        }
        take_products<capped>(products_ + (count - 32) % 64 / 32 * 1024, worths, at, count - 32);
    }

    template <bool capped>
    void take_products(const int32_t* products, const float* worths, int64_t at, int64_t j) {
        stored_before();
        const float *scales = key_scales_ + at + j, *logs = value_logs_ + at + j;
        const __m512 first = _mm512_load_ps(scales), second = _mm512_load_ps(scales + 16);
        const __m512 first_log = _mm512_load_ps(logs), second_log = _mm512_load_ps(logs + 16);
        for (int64_t r = 0; r < tile_rows; ++r, products += 16) {
            take_scores<capped>(sum_of(products), worths[r], r, j, first, first_log);
            take_scores<capped>(sum_of(products + 512), worths[r], r, j + 16, second, second_log);
        }
    }

    // Adds values of a span, weighed, to a block's sums.
    void add(const Block& block, int64_t at, int64_t count, const float* worth) {
        const int64_t step = 64 * job_.value_dim;  // bytes of values that 64 positions take
        for (int64_t t = 0; t < job_.value_dim / 16; t += 2) {
            multiply_two<true>(values_ + at * job_.value_dim + t * tile_bytes, step, count);
            for (int64_t r = 0; r < block.rows; ++r)
                for (int64_t i = 0; i < 2; ++i) add_to(block.row[r], (t + i) * 16, sum_of(products_ + 512 * i + 16 * r), worth[r]);
        }
    }

    int64_t blocks_, region_;
    char* queries_;        // [16 rows][digit][row][dim]
    char* keys_;           // of a region of a head, in order
    float* query_worths_;  // of a unit of a row's products
};

}  // namespace
}  // namespace kvmmap
