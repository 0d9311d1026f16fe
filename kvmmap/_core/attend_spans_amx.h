// What walks with AMX for queries that were given in 16 bits share: from products of queries and keys to sums of values, over
// 512 positions of a head and 16 rows of queries, or fewer, at a time.
//
// Products with two digits take 8 instructions of 16 cycles for 16 rows and 16 positions; what would take longer is the softmax,
// so it is as short as 16 bits allow:
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

class AmxSpans {
  protected:
    static constexpr int64_t span = 512;
    static constexpr int64_t ahead_rows = 32;  // that are fetched while others are put in order
    static constexpr int digits = 2;

    // `most`: positions put in order at a time, a multiple of a span. `digit_apart`: bytes between a row's digits of
    // weights. `extra`: bytes that a walk wants for itself.
    AmxSpans(const AttendJob& job, const CodedRows& keys, const Packing& key_packing, const CodedRows& values,
             const Packing& value_packing, const char* prepared, AttendState state, int64_t most, int64_t digit_apart, int64_t extra)
        : job_(job), stored_keys_(keys), stored_values_(values), key_packing_(key_packing), value_packing_(value_packing),
          prepared_(prepared), state_(state), rows_(job.n * job.group()), width_(Bytes<digits>::width(job.value_dim)), digit_apart_(digit_apart) {
        int64_t bytes = 64;
        const auto room = [&bytes](int64_t more) { return bytes += (more + 63) / 64 * 64, bytes - (more + 63) / 64 * 64; };
        const int64_t packed = room(most * job.value_dim), scales = room(3 * most * 4), scores = room(tile_rows * span * 4);
        const int64_t products = room(16 * tile_bytes), narrowed = room(digits * tile_rows * span);
        const int64_t rest = room(64 * std::max(key_packing.row_bytes, value_packing.row_bytes)), own = room(extra);
        memory_.reset(new char[bytes]);
        char* start = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(memory_.get()) / 64 * 64);
        values_ = start + packed, weights_ = start + narrowed, rest_ = start + rest, extra_ = start + own;
        key_scales_ = reinterpret_cast<float*>(start + scales), value_logs_ = key_scales_ + most, inverses_ = value_logs_ + most;
        scores_ = reinterpret_cast<float*>(start + scores), products_ = reinterpret_cast<int32_t*>(start + products);
        for (int64_t i = 0; i < job.n; ++i) sights_.emplace_back(job, i);
    }

    int64_t row_of(int64_t head, int64_t r) const {
        return r / job_.group() * job_.q_heads + head * job_.group() + r % job_.group();
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

    void take_scales(int64_t row, int64_t count) {
        const int64_t heads = job_.kv_heads, padded = (count + 63) / 64 * 64;
        key_packing_.scales(stored_keys_.scales + row * scale_bytes_of(stored_keys_), heads, count, 1.0f, key_scales_);
        value_packing_.scales(stored_values_.scales + row * scale_bytes_of(stored_values_), heads, count, 1.0f, value_logs_);
        for (int64_t j = count; j < padded; ++j) key_scales_[j] = value_logs_[j] = 0;
        largest_ = take_logarithms(value_logs_, inverses_, padded);
    }

    // Puts `count` rows in order: whole 64 from where they lie, and those that are left with zeros behind them.
    template <class Fetch>
    void pack_codes(const CodedRows& stored, const Packing& packing,
                    void (*run)(const char*, int64_t, int64_t, int64_t, char*, Fetch&), int64_t dim, int64_t row, int64_t count,
                    char* out, Fetch& ahead) {
        const int64_t bytes = packing.row_bytes, stride = job_.kv_heads * bytes, whole = count / 64 * 64;
        run(stored.codes + row * bytes, stride, whole, dim, out, ahead);
        if (whole < count) run(last_rows(stored, packing, row, whole, count), bytes, 64, dim, out + whole * dim, ahead);
    }

    // Rows `from` to `count`, and zeros behind them, 64 in all.
    const char* last_rows(const CodedRows& stored, const Packing& packing, int64_t row, int64_t from, int64_t count) {
        const int64_t bytes = packing.row_bytes;
        for (int64_t i = from; i < count; ++i)
            std::memcpy(rest_ + (i - from) * bytes, stored.codes + (row + i * job_.kv_heads) * bytes, bytes);
        std::memset(rest_ + (count - from) * bytes, 0, (64 - (count - from)) * bytes);
        return rest_;
    }

    // What a block sees of some rows: [start, stop), and whether all of its queries see all of those.
    struct Seen {
        int64_t start, stop;
        bool whole;
    };

    // Of rows [start, stop); it starts whole 64 behind `start`.
    Seen look(const Block& block, int64_t start, int64_t stop) const {
        Seen seen{stop, start, true};
        for (int64_t i = block.first_query; i <= block.last_query; ++i) {
            if (sights_[i].none(start, stop)) continue;
            seen.start = std::min(seen.start, sights_[i].first(start, stop));
            seen.stop = std::max(seen.stop, sights_[i].last(stop));
        }
        seen.start = start + (seen.start - start) / 64 * 64;
        for (int64_t i = block.first_query; i <= block.last_query; ++i) seen.whole &= sights_[i].whole(seen.start, seen.stop);
        return seen;
    }

    // Scores of rows [start, start + count), whose scales lie from `at` on, become weights, and what a unit of a row's is worth;
    // false if there are none.
    bool weigh_scores(const Block& block, int64_t start, int64_t at, int64_t count, bool whole, float* worth) {
        const int64_t padded = (count + 63) / 64 * 64;
        __m512 top = highest_scores();
        if (_mm512_mask_cmp_ps_mask(rows_of(block), _mm512_abs_ps(top), _mm512_set1_ps(most_score), _CMP_NLT_UQ))
            top = bound(block, padded);
        if (!whole || padded != count) top = hide(block, start, count, padded);
        return weigh(block, top, at, padded, worth);
    }

    void begin_scores() {
        for (__m512& top : tops_) top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    }

    static __m512 sum_of(const int32_t* products) {
        return put_together(_mm512_load_si512(products), _mm512_load_si512(products + 256));
    }

    // Products of codes become scores of row r at 16 positions from j on.
    template <bool capped>
    [[gnu::always_inline]] void take_scores(__m512 product, float worth, int64_t r, int64_t j, __m512 scale, __m512 log) {
        product = _mm512_mul_ps(product, scale);
        const __m512 by = _mm512_set1_ps(worth);
        const __m512 score = capped ? _mm512_add_ps(cap(_mm512_mul_ps(product, by)), log) : _mm512_fmadd_ps(product, by, log);
        tops_[r] = _mm512_max_ps(tops_[r], score);
        _mm512_store_ps(scores_ + r * span + j, score);
    }

    __m512 cap(__m512 scores) const {
        constexpr float log2_e = 1.44269504088896341f;
        const auto x = reinterpret_cast<Lanes<16>::F>(_mm512_mul_ps(scores, _mm512_set1_ps(1 / job_.softcap)));
        return _mm512_mul_ps(reinterpret_cast<__m512>(Lanes<16>::tanh(x)), _mm512_set1_ps(job_.softcap * log2_e));
    }

  private:
    static __mmask16 rows_of(const Block& block) { return static_cast<__mmask16>((1 << block.rows) - 1); }

    __m512 highest_scores() const {
        return across(tops_, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    }

    // What is beyond f32 stays below infinity: its difference to the highest must be a number. Returns the highest scores, here
    // and below.
    __m512 bound(const Block& block, int64_t count) {
        const __m512 most = _mm512_set1_ps(most_score), least = _mm512_set1_ps(-most_score);
        return change_scores(block.rows, count, [&](int64_t, int64_t, __m512 scores) {
            return _mm512_max_ps(least, _mm512_min_ps(most, scores));  // and a NaN stays one
        });
    }

    // Positions that a row does not see, and those that are none, get no weight.
    __m512 hide(const Block& block, int64_t start, int64_t count, int64_t padded) {
        return change_scores(block.rows, padded, [&](int64_t r, int64_t j, __m512 scores) {
            const Sight& sight = sights_[(block.number * tile_rows + r) / job_.group()];
            __mmask16 seen = static_cast<__mmask16>(sight.seen(start + j));
            if (j + 16 > count) seen &= static_cast<__mmask16>((1 << std::max<int64_t>(count - j, 0)) - 1);
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

    bool weigh(const Block& block, __m512 top, int64_t at, int64_t count, float* worth) {
        const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        top = _mm512_mask_mov_ps(nothing, rows_of(block), top);
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
        __m512 sums[tile_rows] = {};
        for (int64_t r = 0; r < block.rows; ++r) sums[r] = narrow(scores_ + r * span, at, count, shift[r], weights_ + r * 64);
        const __m512 unit = _mm512_maskz_mul_ps(seen, power(_mm512_maskz_sub_ps(seen, top, now)), _mm512_set1_ps(1 / most_weight));
        _mm512_store_ps(totals, _mm512_mul_ps(across(sums, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }), unit));
        _mm512_store_ps(worth, _mm512_mul_ps(unit, _mm512_set1_ps(largest_ * sums_scale)));
        for (int64_t r = 0; r < block.rows; ++r)
            if (seen >> r & 1) state_.total[block.row[r]] += totals[r];
        return true;
    }

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
            _mm512_store_si512(out + digit_apart_, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
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

  protected:
    // Multiplies weights with two tiles of values for every 64 positions, `step` bytes apart: two digits of each tile's products,
    // in four tiles of `products_`. Values beyond the second-level cache are streamed.
    template <bool streamed>
    void multiply_two(const char* values, int64_t step, int64_t count) {
        const char* weights = weights_;
        stored_before();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t j = 0; j < count; j += 64, values += step, weights += digits * tile_bytes) {
            _tile_loadd(4, weights, 64);
            if constexpr (streamed) _tile_stream_loadd(6, values, 64);
            else _tile_loadd(6, values, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(5, weights + tile_bytes, 64);
            _tile_dpbusd(1, 5, 6);
            if constexpr (streamed) _tile_stream_loadd(7, values + tile_bytes, 64);
            else _tile_loadd(7, values + tile_bytes, 64);
            _tile_dpbusd(2, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        store_four();
    }

    void store_four() {
        _tile_stored(0, products_, 64);
        _tile_stored(1, products_ + 256, 64);
        _tile_stored(2, products_ + 512, 64);
        _tile_stored(3, products_ + 768, 64);
        stored_before();
    }

    // Adds 16 sums to a row's, in units of `worth`.
    void add_to(int64_t row, int64_t d, __m512 more, float worth) const {
        float* sums = state_.sums + row * width_ + d;
        _mm512_store_ps(sums, _mm512_fmadd_ps(more, _mm512_set1_ps(worth), _mm512_load_ps(sums)));
    }

    const AttendJob& job_;
    CodedRows stored_keys_, stored_values_;
    const Packing &key_packing_, &value_packing_;
    const char* prepared_;
    AttendState state_;
    int64_t rows_, width_, digit_apart_;
    std::vector<Sight> sights_;
    float largest_ = 0;                            // scale of the values in order
    std::unique_ptr<char[]> memory_;               // of all that follow
    char* values_;                                 // in order
    float *key_scales_, *value_logs_, *inverses_;  // [position]; of values, to the largest
    float* scores_;                                // [row][position]
    int32_t* products_;                            // sixteen tiles
    char* weights_;                                // [64 positions][digit][row][64]
    char* rest_;                                   // rows that fill no 64
    char* extra_;

  private:
    __m512 tops_[tile_rows];
};

}  // namespace
}  // namespace kvmmap
