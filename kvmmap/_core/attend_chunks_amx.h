// Attention of many rows of queries with AMX, for queries that were given in 16 bits: chunks of a prompt.
//
// Keys and values of a region of a head are put in order once, and stay in the second-level cache while all rows of queries go
// over them, 16 rows and 512 positions at a time. Products with two digits take 8 instructions of 16 cycles for 16 rows and
// 16 positions; what would take longer is the softmax, so it is as short as 16 bits allow:
//
//   - The scale of a value's row is part of its weight's exponent, as a logarithm that is taken once a position. So the largest
//     weight is known before any is computed, and becomes 2^16 - 1: weights are narrowed to two digits as they are made.
//   - 2^x is a polynomial over [0, 1), within 2.6e-6 of the result, and two instructions that split and scale.
//   - Weights are narrowed four registers at a time, which leaves positions in an order that values share.
#pragma once

#include <memory>

#include "attend_packing_amx.h"
#include "attend_powers_avx512.h"

namespace kvmmap {
namespace {

class AmxChunks {
    static constexpr int64_t span = 512;
    static constexpr int64_t ahead_rows = 32;  // that are fetched while others are put in order
    static constexpr int digits = 2;
    static constexpr float most_weight = 65535, most_score = 0x1p126f;
    // Values this much smaller than the largest of a region, as a power of two, weigh as if they were not.
    static constexpr float least_scale = 0x1p-40f;

  public:
    static bool suit(const AttendJob& job) { return job.n * job.group() > tile_rows; }

    AmxChunks(const AttendJob& job, const CodedRows& keys, const Packing& key_packing, const CodedRows& values,
              const Packing& value_packing, const char* prepared, AttendState state)
        : job_(job), stored_keys_(keys), stored_values_(values), key_packing_(key_packing), value_packing_(value_packing),
          prepared_(prepared), state_(state), rows_(job.n * job.group()), blocks_((rows_ + tile_rows - 1) / tile_rows),
          width_(Bytes<digits>::width(job.value_dim)), region_(region_of(job)) {
        int64_t bytes = 64;
        const auto room = [&bytes](int64_t more) { return bytes += (more + 63) / 64 * 64, bytes - (more + 63) / 64 * 64; };
        const int64_t queries = room(blocks_ * block_bytes()), worths = room(blocks_ * tile_rows * 4), packed_keys = room(region_ * job.dim);
        const int64_t packed_values = room(region_ * job.value_dim), scales = room(3 * region_ * 4);
        const int64_t scores = room(tile_rows * span * 4), products = room(8 * tile_bytes), narrowed = room(digits * tile_rows * span);
        const int64_t rest = room(64 * std::max(key_packing.row_bytes, value_packing.row_bytes));
        memory_.reset(new char[bytes]);
        char* start = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(memory_.get()) / 64 * 64);
        queries_ = start + queries, query_worths_ = reinterpret_cast<float*>(start + worths);
        keys_ = start + packed_keys, values_ = start + packed_values;
        key_scales_ = reinterpret_cast<float*>(start + scales), value_logs_ = key_scales_ + region_, inverses_ = value_logs_ + region_;
        scores_ = reinterpret_cast<float*>(start + scores), products_ = reinterpret_cast<int32_t*>(start + products);
        weights_ = start + narrowed, rest_ = start + rest;
        for (int64_t i = 0; i < job.n; ++i) sights_.emplace_back(job, i);
    }

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
    int64_t block_bytes() const { return digits * tile_rows * job_.dim; }

    // Positions put in order at a time: what stays in the second-level cache, and a multiple of a span.
    static int64_t region_of(const AttendJob& job) {
        return std::max<int64_t>(1, 512 * 1024 / (job.dim + job.value_dim) / span) * span;
    }

    int64_t row_of(int64_t head, int64_t r) const {
        return r / job_.group() * job_.q_heads + head * job_.group() + r % job_.group();
    }

    // Digits of a head's queries, from steps of four numbers to [16 rows][digit][row][dim]; rows that are none are zeros.
    void take_queries(int64_t head) {
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        for (int64_t row = 0; row < blocks_ * tile_rows; ++row) {
            char* out = queries_ + row / tile_rows * block_bytes() + row % tile_rows * job_.dim;
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

    static int64_t scale_bytes_of(const CodedRows& rows) { return rows.format.codec == Codec::int8 ? 4 : 2; }

    // 16 rows of queries, or what is left of them.
    struct Block {
        int64_t number, rows, first_query, last_query;
        int64_t row[tile_rows];  // in the state
    };

    Block block_at(int64_t head, int64_t number) const {
        const int64_t from = number * tile_rows, rows = std::min(tile_rows, rows_ - from), group = job_.group();
        Block block{number, rows, from / group, (from + rows - 1) / group, {}};
        for (int64_t r = 0; r < rows; ++r) block.row[r] = row_of(head, from + r);
        return block;
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
        const int64_t heads = job_.kv_heads, row = start * heads + head, whole = count / 64 * 64;
        pack_codes(stored_keys_, key_packing_, key_packing_.chunk_keys, job_.dim, row, whole, count, keys_);
        pack_codes(stored_values_, value_packing_, value_packing_.chunk_values, job_.value_dim, row, whole, count, values_);
        key_packing_.scales(stored_keys_.scales + row * scale_bytes_of(stored_keys_), heads, count, 1.0f, key_scales_);
        value_packing_.scales(stored_values_.scales + row * scale_bytes_of(stored_values_), heads, count, 1.0f, value_logs_);
        for (int64_t j = count; j % 64; ++j) key_scales_[j] = value_logs_[j] = 0;
        const int64_t padded = (count + 63) / 64 * 64;
        __m512 most = _mm512_setzero_ps();
        for (int64_t j = 0; j < padded; j += 16) most = _mm512_max_ps(most, _mm512_load_ps(value_logs_ + j));
        largest_ = highest(most);
        // Of values that are all zeros, any scale will do.
        const __m512 unit = _mm512_set1_ps(largest_ > 0 ? 1 / largest_ : 0), least = _mm512_set1_ps(least_scale);
        for (int64_t j = 0; j < padded; j += 16) {
            const __m512 scale = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(value_logs_ + j), unit), least);
            _mm512_store_ps(inverses_ + j, _mm512_div_ps(_mm512_set1_ps(1), scale));
            _mm512_store_ps(value_logs_ + j, logarithm(scale));
        }
    }

    // `whole` rows from where they lie, and those that are left with zeros behind them.
    void pack_codes(const CodedRows& stored, const Packing& packing, decltype(Packing::chunk_keys) run, int64_t dim, int64_t row,
                    int64_t whole, int64_t count, char* out) {
        const int64_t bytes = packing.row_bytes, stride = job_.kv_heads * bytes;
        const char* from = stored.codes + row * bytes;
        RowsAhead ahead(from + ahead_rows * stride, stride, bytes, count - ahead_rows), none(from, 0, 0, 0);
        run(from, stride, whole, dim, out, ahead);
        if (whole == count) return;
        for (int64_t i = whole; i < count; ++i) std::memcpy(rest_ + (i - whole) * bytes, from + i * stride, bytes);
        std::memset(rest_ + (count - whole) * bytes, 0, (64 - (count - whole)) * bytes);
        run(rest_, bytes, 64, dim, out + whole * dim, none);
    }

    // Adds rows [start, start + count), which lie from `at` on in the region, to a block's state.
    void run_block(const Block& block, int64_t start, int64_t at, int64_t count) {
        bool none = true, whole = true;
        for (int64_t i = block.first_query; i <= block.last_query; ++i) {
            none &= sights_[i].none(start, start + count);
            whole &= sights_[i].whole(start, start + count);
        }
        if (none) return;
        const int64_t padded = (count + 63) / 64 * 64;
        if (job_.softcap > 0) score<true>(block, at, padded);
        else score<false>(block, at, padded);
        __m512 top = highest_scores();
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(top), _mm512_set1_ps(most_score), _CMP_NLT_UQ)) top = bound(padded);
        if (!whole || padded != count) top = hide(block, start, count, padded);
        alignas(64) float worth[tile_rows];
        if (weigh(block, top, at, padded, worth)) add(block, at, padded, worth);
    }

    // Exponents of a block's weights, less what is common to a row; the largest of each row in tops_.
    template <bool capped>
    void score(const Block& block, int64_t at, int64_t count) {
        const int64_t dim = job_.dim, digit = tile_rows * dim;
        const char *queries = queries_ + block.number * block_bytes(), *keys = keys_ + at * dim;
        const float* worths = query_worths_ + block.number * tile_rows;
        for (__m512& top : tops_) top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
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
            const __m512 worth = _mm512_set1_ps(worths[r]);
            __m512 a = _mm512_mul_ps(sum_of(products), first), b = _mm512_mul_ps(sum_of(products + 512), second);
            if constexpr (capped) {
                a = _mm512_add_ps(cap(_mm512_mul_ps(a, worth)), first_log);
                b = _mm512_add_ps(cap(_mm512_mul_ps(b, worth)), second_log);
            } else {
                a = _mm512_fmadd_ps(a, worth, first_log);
                b = _mm512_fmadd_ps(b, worth, second_log);
            }
            tops_[r] = _mm512_max_ps(tops_[r], _mm512_max_ps(a, b));
            _mm512_store_ps(scores_ + r * span + j, a);
            _mm512_store_ps(scores_ + r * span + j + 16, b);
        }
    }

    __m512 cap(__m512 scores) const {
        constexpr float log2_e = 1.44269504088896341f;
        const auto x = reinterpret_cast<Lanes<16>::F>(_mm512_mul_ps(scores, _mm512_set1_ps(1 / job_.softcap)));
        return _mm512_mul_ps(reinterpret_cast<__m512>(Lanes<16>::tanh(x)), _mm512_set1_ps(job_.softcap * log2_e));
    }

    static __m512 sum_of(const int32_t* products) {
        return put_together(_mm512_load_si512(products), _mm512_load_si512(products + 256));
    }

    __m512 highest_scores() const {
        return across(tops_, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    }

    // What is beyond f32 stays below infinity: its difference to the highest must be a number. Returns the highest scores, here
    // and below.
    __m512 bound(int64_t count) {
        const __m512 most = _mm512_set1_ps(most_score), least = _mm512_set1_ps(-most_score);
        return change_scores(tile_rows, count, [&](int64_t, int64_t, __m512 scores) {
            return _mm512_max_ps(least, _mm512_min_ps(most, scores));  // and a NaN stays one
        });
    }

    // Positions that a row does not see, and those that are none, get no weight.
    __m512 hide(const Block& block, int64_t start, int64_t count, int64_t padded) {
        return change_scores(block.rows, padded, [&](int64_t r, int64_t j, __m512 scores) {
            const Sight& sight = sights_[(block.number * tile_rows + r) / job_.group()];
            __mmask16 seen = 0;
            for (int64_t i = 0; i < 16; ++i) seen |= (j + i < count && sight.sees(start + j + i)) << i;
            return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), seen, scores);
        });
    }

    template <class Change>
    __m512 change_scores(int64_t rows, int64_t count, Change&& change) {
        for (int64_t r = 0; r < rows; ++r) {
            tops_[r] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
            for (int64_t j = 0; j < count; j += 16) {
                float* scores = scores_ + r * span + j;
                const __m512 changed = change(r, j, _mm512_load_ps(scores));
                tops_[r] = _mm512_max_ps(tops_[r], changed);
                _mm512_store_ps(scores, changed);
            }
        }
        return highest_scores();
    }

    // Weights, as digits, and what a unit of a row's is worth; false if there are none.
    bool weigh(const Block& block, __m512 top, int64_t at, int64_t count, float* worth) {
        const __mmask16 rows = block.rows < tile_rows ? (1 << block.rows) - 1 : 0xffff;
        const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        top = _mm512_mask_mov_ps(nothing, rows, top);
        const __mmask16 seen = _mm512_cmp_ps_mask(top, nothing, _CMP_NEQ_UQ);
        if (!seen) return false;
        alignas(64) float shift[tile_rows], before[tile_rows], tops[tile_rows], factors[tile_rows], totals[tile_rows];
        _mm512_store_ps(shift, _mm512_mask_sub_ps(nothing, seen, _mm512_set1_ps(log_most_weight), top));
        for (int64_t r = 0; r < tile_rows; ++r) before[r] = r < block.rows ? state_.top[block.row[r]] : 0;
        const __m512 was = _mm512_load_ps(before), now = _mm512_max_ps(was, top);
        const __mmask16 raised = _mm512_mask_cmp_ps_mask(seen, now, was, _CMP_GT_OQ);
        _mm512_store_ps(tops, now);
        _mm512_store_ps(factors, power(_mm512_maskz_sub_ps(raised, was, now)));
        for (int64_t r = 0; r < block.rows; ++r)
            if (raised >> r & 1) rescale(block.row[r], tops[r], factors[r]);
        __m512 sums[tile_rows];
        for (int64_t r = 0; r < tile_rows; ++r) sums[r] = narrow(scores_ + r * span, at, count, shift[r], weights_ + r * 64);
        const __m512 unit = _mm512_maskz_mul_ps(seen, power(_mm512_maskz_sub_ps(seen, top, now)), _mm512_set1_ps(1 / most_weight));
        _mm512_store_ps(totals, _mm512_mul_ps(across(sums, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }), unit));
        _mm512_store_ps(worth, _mm512_mul_ps(unit, _mm512_set1_ps(largest_ * sums_scale)));
        for (int64_t r = 0; r < block.rows; ++r)
            if (seen >> r & 1) state_.total[block.row[r]] += totals[r];
        return true;
    }

    static constexpr float log_most_weight = 15.9999779861f;

    // Exponents plus `more` become weights of two digits: [64 positions][digit][row][64]; returns what is to be
    // summed of them, without the scales of values.
    __m512 narrow(const float* scores, int64_t at, int64_t count, float more, char* out) const {
        const __m512 shift = _mm512_set1_ps(more);
        const __m512i bytes = _mm512_set1_epi16(255);
        __m512 total = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; j += 64, out += digits * tile_bytes) {
            __m512i whole[4];
#pragma GCC unroll 4
            for (int64_t v = 0; v < 4; ++v) {
                const __m512 w = power(_mm512_add_ps(_mm512_load_ps(scores + j + 16 * v), shift));
                total = _mm512_fmadd_ps(w, _mm512_load_ps(inverses_ + at + j + 16 * v), total);
                whole[v] = _mm512_cvtps_epi32(w);
            }
            const __m512i a = _mm512_packus_epi32(whole[0], whole[1]), b = _mm512_packus_epi32(whole[2], whole[3]);
            _mm512_store_si512(out, _mm512_packus_epi16(_mm512_and_si512(a, bytes), _mm512_and_si512(b, bytes)));
            _mm512_store_si512(out + tile_bytes, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
        }
        return total;
    }

    // A higher score than any before: what was summed counts for less.
    void rescale(int64_t row, float top, float factor) {
        state_.top[row] = top;
        state_.total[row] *= factor;
        float* sums = state_.sums + row * width_;
        for (int64_t i = 0; i < width_; i += 16)
            _mm512_store_ps(sums + i, _mm512_mul_ps(_mm512_load_ps(sums + i), _mm512_set1_ps(factor)));
    }

    // Adds values of a span, weighed, to a block's sums.
    void add(const Block& block, int64_t at, int64_t count, const float* worth) {
        const int64_t step = 64 * job_.value_dim;  // bytes of values that 64 positions take
        float* sums[tile_rows];
        for (int64_t r = 0; r < block.rows; ++r) sums[r] = state_.sums + block.row[r] * width_;
        for (int64_t t = 0; t < job_.value_dim / 16; t += 2) {
            const char *values = values_ + at * job_.value_dim + t * tile_bytes, *weights = weights_;
            stored_before();
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t j = 0; j < count; j += 64, values += step, weights += digits * tile_bytes) {
                _tile_loadd(4, weights, 64);
                _tile_stream_loadd(6, values, 64);
                _tile_dpbusd(0, 4, 6);
                _tile_loadd(5, weights + tile_bytes, 64);
                _tile_dpbusd(1, 5, 6);
                _tile_stream_loadd(7, values + tile_bytes, 64);
                _tile_dpbusd(2, 4, 7);
                _tile_dpbusd(3, 5, 7);
            }
            _tile_stored(0, products_, 64);
            _tile_stored(1, products_ + 256, 64);
            _tile_stored(2, products_ + 512, 64);
            _tile_stored(3, products_ + 768, 64);
            stored_before();
            for (int64_t r = 0; r < block.rows; ++r)
                for (int64_t i = 0; i < 2; ++i) {
                    float* out = sums[r] + (t + i) * 16;
                    const __m512 more = sum_of(products_ + 512 * i + 16 * r);
                    _mm512_store_ps(out, _mm512_fmadd_ps(more, _mm512_set1_ps(worth[r]), _mm512_load_ps(out)));
                }
        }
    }

    const AttendJob& job_;
    CodedRows stored_keys_, stored_values_;
    const Packing &key_packing_, &value_packing_;
    const char* prepared_;
    AttendState state_;
    int64_t rows_, blocks_, width_, region_;
    std::vector<Sight> sights_;
    __m512 tops_[tile_rows];
    float largest_ = 0;                                 // scale of a region's values
    std::unique_ptr<char[]> memory_;                    // of all that follow
    char* queries_;                                     // [16 rows][digit][row][dim]
    float* query_worths_;                               // of a unit of a row's products
    char *keys_, *values_;                              // of a region of a head, in order
    float *key_scales_, *value_logs_, *inverses_;       // [position]; of values, to the largest
    float* scores_;                                     // [row][position]
    int32_t* products_;                                 // two times four tiles
    char* weights_;                                     // [64 positions][digit][row][64]
    char* rest_;                                        // rows that fill no 64
};

}  // namespace
}  // namespace kvmmap
