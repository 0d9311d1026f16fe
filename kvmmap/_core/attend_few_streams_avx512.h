// Attention of one or two rows of queries a KV head, with AMX up to four, over 272 positions at a time, as 16 streams side by side
// (attend_streams_avx512.h says why): a decoding step without many query heads a KV head. Reading bounds it over int8 codes, and
// computing over codes of fewer bits.
//
// Keys and values are walked in order, so that every stream is read in order, with the sums of all heads in memory, and rows are
// fetched ahead in their stream. How rows of a codec are multiplied is behind a pointer to a function that takes a position of
// every stream, so that any codec of keys goes with any of values.
#pragma once

#include <memory>

#include "attend_bytes_avx512.h"
#include "attend_few_keys_avx512.h"
#include "attend_few_values_avx512.h"
#include "attend_streams_shape_avx512.h"

namespace kvmmap {
namespace {

// How rows of a codec take part, a position of every stream at a time; rows are `stride` bytes apart.
template <int digits>
struct FewRows {
    int64_t row_bytes = 0;
    bool half_scales = false;
    // Adds 16 values, times their weights, to sums: of 64 numbers after 64 numbers, as HalfSums keeps them.
    void (*add)(const char* values, int64_t stride, int64_t dim, const char* weights, __m512i* sums) = nullptr;
    // The same for three and for four rows of queries, where AMX multiplies keys; none for some codecs.
    void (*add_rows[2])(const char* values, int64_t stride, int64_t dim, const char* weights, __m512i* sums, RowsApart apart) = {};
    // Products of a prepared query and 16 keys; none where AMX multiplies them. `spread`: of one that spread_query has spread.
    bool spread = false;
    void (*multiply)(const char* keys, int64_t stride, int64_t dim, const char* query, float* out) = nullptr;
    // 16 keys as int8, one after the other, for AMX; none where they are stored so.
    void (*plain)(const char* keys, int64_t stride, int64_t dim, char* out) = nullptr;
};

// 2^x for x <= 0, and 0 below -126: Lanes::exp2, by fewer instructions.
[[gnu::always_inline]] inline __m512 exact_power(__m512 x) {
    const __m512 least = _mm512_set1_ps(-126.0f);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    const __m512 kept = _mm512_max_ps(least, x), whole = _mm512_roundscale_ps(kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(kept, whole);
    __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(normal, p, whole);
}

struct NothingAhead {
    void fetch(int) {}
};

template <int digits, class Rows>
void multiply_16(const char* keys, int64_t stride, int64_t dim, const char* query, float* out) {
    NothingAhead nothing;
    multiply_keys<digits, 1>(Rows(dim), keys, stride, dim, &query, out, 0, nothing);
}

template <class Rows>
void plain_16(const char* keys, int64_t stride, int64_t dim, char* out) {
    const Rows stored(dim);
    for (int64_t i = 0; i < 16; ++i, keys += stride)
        for (int64_t d = 0; d < dim; d += 64, out += 64) _mm512_store_si512(out, stored.load(keys, d));
}

// Of 4 or 5 bits and a multiple of 128 numbers.
template <int bits>
void plain_halves(const char* keys, int64_t stride, int64_t dim, char* out) {
    const LevelTable<bits, false> table;
    const auto run = [&](int64_t all) __attribute__((always_inline)) {
        const int64_t half = all / 2;
        for (int64_t d = 0; d < half; d += 64) {
            const char *row = keys + d, *plane = keys + half + d / 8;
            char* to = out + d;
#pragma GCC unroll 8
            for (int i = 0; i < 16; ++i, row += stride, plane += stride, to += all) {
                const __m512i bytes = _mm512_loadu_si512(row);
                if constexpr (bits == 5) {
                    _mm512_store_si512(to, table.lower(bytes, table.from_plane(plane)));
                    _mm512_store_si512(to + half, table.upper(bytes, table.from_plane(plane + half / 8)));
                } else {
                    _mm512_store_si512(to, table.lower(bytes));
                    _mm512_store_si512(to + half, table.upper(bytes));
                }
            }
        }
    };
    dim == 128 ? run(128) : run(dim);
}

template <int digits, class Rows, bool amx>
FewRows<digits> few_rows_of(int64_t dim) {
    FewRows<digits> found{Rows(dim).row_bytes, Rows::half_scales};
    constexpr int halves = std::is_same_v<Rows, LevelRows<4, false>> ? 4 : std::is_same_v<Rows, LevelRows<5, false>> ? 5 : 0;
    if constexpr (halves == 4) found.add = add_halves<digits>;
    else found.add = add_each_64<digits, Rows>;
    if constexpr (amx && digits == 2 && (halves == 4 || !Rows::half_scales))
        found.add_rows[0] = add_to_rows<digits, Rows, 3>, found.add_rows[1] = add_to_rows<digits, Rows, 4>;
    if constexpr (amx && halves) found.plain = plain_halves<halves>;
    else if constexpr (amx && Rows::half_scales) found.plain = plain_16<Rows>;
    else if constexpr (!amx && halves) found.multiply = multiply_halves<digits, halves>, found.spread = true;
    else if constexpr (!amx) found.multiply = multiply_16<digits, Rows>;
    return found;
}

template <int digits, int bits, bool amx>
FewRows<digits> few_level_rows(int64_t dim) {
    if (LevelRows<bits, true>::suit(dim)) return few_rows_of<digits, LevelRows<bits, true>, amx>(dim);
    if (LevelRows<bits, false>::suit(dim)) return few_rows_of<digits, LevelRows<bits, false>, amx>(dim);
    return {};
}

// With rows of 0 bytes where the kernel can't read them.
template <int digits, bool amx>
FewRows<digits> few_rows(Codec codec, int64_t dim) {
    switch (codec) {
        case Codec::int8: return few_rows_of<digits, Int8Rows, amx>(dim);
        case Codec::int3: return few_level_rows<digits, 3, amx>(dim);
        case Codec::int4: return few_level_rows<digits, 4, amx>(dim);
        case Codec::int5: return few_level_rows<digits, 5, amx>(dim);
        case Codec::int6: return few_level_rows<digits, 6, amx>(dim);
        default: return {};
    }
}

template <int digits>
class FewStreams : public StreamsShape {
  public:
    FewStreams(const AttendJob& job, const CodedRows& keys, const FewRows<digits>& key_rows, const CodedRows& values,
               const FewRows<digits>& value_rows, const char* prepared, AttendState state)
        : job_(job), keys_(key_rows), values_(value_rows), stored_keys_(keys), stored_values_(values), heads_(job.kv_heads),
          rows_(job.n * job.group()), parts_(job.value_dim / 64), key_row_(heads_ * keys_.row_bytes),
          value_row_(heads_ * values_.row_bytes), state_(state), softmax_(job.softcap, state, Bytes<digits>::width(job.value_dim)),
          worth_(heads_ * rows_), queries_(heads_ * rows_), sums_(heads_ * rows_) {
        // Not push_back: what it grows by is a function that other objects share, and this one's needs AVX-512.
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows_; ++r) {
                queries_[h * rows_ + r] = prepared + row_of(h, r) * Bytes<digits>::query_bytes(job.dim);
                sums_[h * rows_ + r] = state.sums + row_of(h, r) * Bytes<digits>::width(job.value_dim);
            }
        const int64_t spread = keys_.spread ? spread_bytes<digits>(job.dim) : 0;
        memory_.reset(new char[64 + 4 * span * heads_ * (rows_ + 2) + heads_ * rows_ * (parts_ * part_registers * 64 + spread)]);
        weights_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
        key_scales_ = weights_ + heads_ * rows_ * span;
        value_scales_ = key_scales_ + heads_ * span;
        kept_ = reinterpret_cast<__m512i*>(value_scales_ + heads_ * span);
        char* free = reinterpret_cast<char*>(kept_ + heads_ * rows_ * parts_ * part_registers);
        for (int64_t i = 0; spread && i < heads_ * rows_; ++i, free += spread)
            spread_query<digits>(queries_[i], job.dim, free), queries_[i] = free;
    }
    virtual ~FewStreams() = default;

    // Walks over as much of a range as every query sees; returns where it ends.
    int64_t walk(const AttendRange& range, int64_t coming) {
        return each_span(job_, range, coming, 1, [this](const Span& span, bool more) { run(span, more); });
    }

  protected:
    using Sums = HalfSums<digits>;
    static constexpr int part_registers = 2 * Sums::registers;  // of sums over 64 numbers

    // Products of queries and the keys of a span, in place of the weights they will become.
    virtual void score(const Slab& keys, const Slab& next, const Scales& scales) {
        for (int64_t step = 0, j = 0, h = 0; j < now_.length; ++step, h + 1 == heads_ ? h = 0, ++j : ++h) {
            fetch_scales(scales, step);
            const int64_t at = step * keys_.row_bytes;
            fetch(keys, next, at, keys_.row_bytes);
            for (int64_t r = 0; r < rows_; ++r)
                keys_.multiply(keys.codes + at, keys.stream(), job_.dim, queries_[h * rows_ + r], weights_of(h, r) + j * lanes);
        }
    }

    float* weights_of(int64_t h, int64_t r) const { return weights_ + (h * rows_ + r) * span; }

    // All lines that are ahead of a row of every stream.
    static void fetch(const Slab& now, const Slab& next, int64_t at, int64_t row_bytes) {
        Lines ahead = streams_ahead(now, next, at, row_bytes);
        while (ahead.left > 0) ahead.fetch(16);
    }

    const AttendJob& job_;
    Span now_;
    FewRows<digits> keys_, values_;
    CodedRows stored_keys_, stored_values_;
    int64_t heads_, rows_, parts_, key_row_, value_row_;
    AttendState state_;
    Softmax<Bytes<digits>> softmax_;
    std::vector<float> worth_;          // [head][row] of one unit of a weight
    std::vector<const char*> queries_;  // [head][row], as keys want them
    std::vector<float*> sums_;          // [head][row], in the state
    std::unique_ptr<char[]> memory_;    // of the four below, and of spread queries
    float* weights_;                    // [head][row][position within its stream][stream]; digits, in the end
    float *key_scales_, *value_scales_; // [head][position within its stream][stream]
    __m512i* kept_;                     // [head][row][64 numbers][sums] of whole numbers

  private:
    // Row r of a head's queries, as the state counts them: over queries, and within a query over its query heads.
    int64_t row_of(int64_t head, int64_t r) const {
        return r / job_.group() * job_.q_heads + head * job_.group() + r % job_.group();
    }

    // Adds a span to the state. `more`: a whole one behind it is next.
    void run(const Span& now, bool more) {
        now_ = now;
        take(stored_keys_, keys_, 1.0f, key_scales_);
        take(stored_values_, values_, sums_scale, value_scales_);
        const Slab keys{stored_keys_.codes + now.start * key_row_, key_row_, now.length};
        const Slab values{stored_values_.codes + now.start * value_row_, value_row_, now.length};
        // Values come right behind the keys, and keys behind the values.
        const int64_t next = now.start + span;
        score(keys, values, {more ? scales_at(stored_keys_, keys_, next) : nullptr, more ? scales_at(stored_values_, values_, next) : nullptr});
        weigh();
        add(values, more ? Slab{keys.codes + span * key_row_, key_row_} : Slab{});
    }

    const char* scales_at(const CodedRows& stored, const FewRows<digits>& rows, int64_t start) const {
        return stored.scales + start * heads_ * (rows.half_scales ? 2 : 4);
    }

    void take(const CodedRows& stored, const FewRows<digits>& rows, float factor, float* out) const {
        const char* scales = scales_at(stored, rows, now_.start);
        rows.half_scales ? take_scales<true>(scales, heads_, now_.length, factor, out)
                          : take_scales<false>(scales, heads_, now_.length, factor, out);
    }

    void weigh() {
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows_; ++r) {
                float *weights = weights_of(h, r), *key_scales = key_scales_ + h * span, *value_scales = value_scales_ + h * span;
                worth_[h * rows_ + r] = now_.whole ? weigh<true>(row_of(h, r), weights, key_scales, value_scales)
                                                   : weigh<false>(row_of(h, r), weights, key_scales, value_scales);
            }
    }

    // Products of a span become digits of weights, in their place; returns what one unit is worth. As Softmax does it, in three
    // walks over the registers in place of five.
    template <bool whole>
    float weigh(int64_t row, float* scores, const float* key_scales, const float* value_scales) {
        const int64_t count = now_.rows();
        if (job_.softcap > 0) softmax_.scale(scores, key_scales, count);
        const __m512 most = _mm512_set1_ps(0x1p126f), least = _mm512_set1_ps(-0x1p126f);
        __m512 best = least;
        for (int64_t j = 0; j < count; j += lanes) {
            __m512 score = _mm512_load_ps(scores + j);
            // A NaN is the second operand, and stays one.
            if (!(job_.softcap > 0)) score = _mm512_max_ps(least, _mm512_min_ps(most, _mm512_mul_ps(within_floats(score), _mm512_load_ps(key_scales + j))));
            if (!whole) score = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), now_.seen[j / lanes], score);
            _mm512_store_ps(scores + j, score);
            best = _mm512_max_ps(best, score);
        }
        const float highest_score = highest(best);
        if (highest_score > state_.top[row]) softmax_.rescale(row, highest_score);
        const __m512 top = _mm512_set1_ps(state_.top[row]);
        __m512 total = _mm512_setzero_ps(), largest = total;
        for (int64_t j = 0; j < count; j += lanes) {
            const __m512 p = exact_power(_mm512_sub_ps(_mm512_load_ps(scores + j), top)), scale = _mm512_load_ps(value_scales + j);
            // Where nothing is seen, scales may be anything.
            const __m512 weight = whole ? _mm512_mul_ps(p, scale) : _mm512_maskz_mul_ps(now_.seen[j / lanes], p, scale);
            total = _mm512_add_ps(total, p);
            largest = _mm512_max_ps(largest, weight);
            _mm512_store_ps(scores + j, weight);
        }
        state_.total[row] += _mm512_reduce_add_ps(total);
        return store_weights<digits>(scores, count, highest(largest), reinterpret_cast<char*>(scores));
    }

    void add(const Slab& values, const Slab& next) {
        std::fill_n(kept_, heads_ * rows_ * parts_ * part_registers, _mm512_setzero_si512());
        // A position at a time: with two of each stream at once, sums are loaded and stored half as often, but reading takes longer.
        for (int64_t j = 0; j < now_.length; ++j)
            for (int64_t h = 0; h < heads_; ++h) {
                const int64_t at = j * values.row + h * values_.row_bytes;
                fetch(values, next, at, values_.row_bytes);
                const char* weights = reinterpret_cast<const char*>(weights_of(h, 0)) + j * 4 * step_bytes<digits>;
                __m512i* sums = kept_ + h * rows_ * parts_ * part_registers;
                const RowsApart apart{parts_ * part_registers, 4 * span};
                if (rows_ > 2) {
                    values_.add_rows[rows_ - 3](values.codes + at, values.stream(), job_.value_dim, weights, sums, apart);
                } else {
                    for (int64_t r = 0; r < rows_; ++r, weights += apart.weights, sums += apart.sums)
                        values_.add(values.codes + at, values.stream(), job_.value_dim, weights, sums);
                }
            }
        const __m512i* sums = kept_;
        for (int64_t i = 0; i < heads_ * rows_; ++i)
            for (int64_t d = 0; d < job_.value_dim; d += 64, sums += part_registers) {
                Sums(sums).add_to(sums_[i] + d, worth_[i]);
                Sums(sums + Sums::registers).add_to(sums_[i] + d + 32, worth_[i]);
            }
    }
};

// Walks over as much of a range as every query sees; returns where it ends.
template <int digits, class Walk, bool amx>
int64_t walk_few(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range, int64_t coming,
                 const char* prepared, AttendState state) {
    if (!StreamsShape::suit(job, range) || !StreamsShape::begins(job, range, 1)) return range.start;
    const FewRows<digits> key_rows = few_rows<digits, amx>(keys.format.codec, job.dim);
    const FewRows<digits> value_rows = few_rows<digits, amx>(values.format.codec, job.value_dim);
    if (!key_rows.row_bytes || !value_rows.row_bytes) return range.start;
    const int64_t rows = job.n * job.group();
    if (rows > 2 && !value_rows.add_rows[rows - 3]) return range.start;
    return Walk(job, keys, key_rows, values, value_rows, prepared, state).walk(range, coming);
}

}  // namespace
}  // namespace kvmmap
