// Attention over 272 positions at a time, walked as 16 streams of 17 positions side by side: a lane a stream.
//
// A tile of 64 positions touches a head's share of every row, a kilobyte apart, and no hardware prefetcher follows that; what
// software prefetches is bounded by the 24 lines that a core of Zen 4 can have under way to its first-level cache: half of
// what it reads in order. A stream is read in order, all heads of a position and then those of the next, and 16 of them
// are read about as fast as one. 17 positions, and not 16: streams that are a multiple of 4096 bytes apart would fall into
// the same set of the first-level cache.
//
// One or two query rows a KV head are bounded by memory: values are walked in order, too, with the sums of all heads in
// memory, and rows are fetched ahead in their stream. More of them are bounded by products: there the sums stay in
// registers for a head's 272 positions, and what comes next is fetched into the second-level cache meanwhile.
#pragma once

#include <memory>

#include "attend_bytes_avx512.h"
#include "attend_short_softmax_avx512.h"

namespace kvmmap {
namespace {

// What does not depend on how rows are stored.
struct StreamsShape {
    static constexpr int64_t lanes = 16, length = 17, span = lanes * length;
    static constexpr int64_t second_level = 640 * 1024;  // what may be fetched into that cache and stay there

    static bool few(const AttendJob& job) { return job.n * job.group() <= 2; }

    static bool suit(const AttendJob& job, const AttendRange& range) {
        return job.dim % 64 == 0 && job.value_dim % 64 == 0 && range.head == 0 && range.head_end == job.kv_heads &&
               (few(job) || span * job.kv_heads * std::max(job.dim, job.value_dim) <= second_level);
    }

    static constexpr int64_t distance = 1024;  // to fetch ahead within a stream

    // One slab's share of a span.
    struct Slab {
        const char* codes = nullptr;
        int64_t row = 0;  // bytes, of all heads

        int64_t stream() const { return length * row; }
        int64_t bytes() const { return lanes * stream(); }
    };

    // 16 lines to fetch at a time: one of each stream, or one after the other.
    struct Lines {
        const char* first;
        int64_t apart, step;
        int64_t left;  // times that there is something to fetch

        // Inlined by force, as Ahead's.
        [[gnu::always_inline]] void fetch(int) {
            if (left <= 0) return;
            --left;
            for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(first + i * apart, 0, 2);
            first += step;
        }
    };

    // What is `distance` ahead of byte `at` of each stream, as much as a row has; behind the end of the streams come those of
    // `then`.
    static Lines streams_ahead(const Slab& now, const Slab& then, int64_t at, int64_t row_bytes) {
        const int64_t lines = (row_bytes + 63) / 64;
        at += distance;
        if (at < now.stream()) return {now.codes + at, now.stream(), 64, lines};
        at -= now.stream();
        if (at < then.stream()) return {then.codes + at, then.stream(), 64, lines};
        return {nullptr, 0, 0, 0};
    }

    // From byte `at` of a slab on, line by line, `times` 16 of them.
    static Lines lines_at(const Slab& slab, int64_t at, int64_t times) {
        if (at >= slab.bytes()) return {nullptr, 0, 0, 0};
        return {slab.codes + at, 64, 64 * lanes, times};
    }
};

// One query row, a position of every stream, 64 numbers from d on.
template <int digits, class Values>
[[gnu::noinline]] void add_16(const Values& stored, const char* values, int64_t d, int64_t stream, const char* weights,
                              __m512i* sums) {
    using Sums = HalfSums<digits>;
    Sums first(sums), second(sums + Sums::registers);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q, values += 4 * stream, weights += step_bytes<digits>) {
        const FourRows four(stored, values, stream, d);
        __m512i a, b;
        four.half<false>(a, b);
        first.add(a, b, weights);
        four.half<true>(a, b);
        second.add(a, b, weights);
    }
    first.keep(sums), second.keep(sums + Sums::registers);
}

// Keys and Values load rows as attend_rows_avx512.h says.
template <int digits, class Keys, class Values>
class Streams : public StreamsShape {
  public:
    // `keys` and `values` are rows as they are stored, with their scales.
    Streams(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const char* prepared, AttendState state)
        : job_(job), keys_(job.dim), values_(job.value_dim), stored_keys_(keys), stored_values_(values),
          heads_(job.kv_heads), rows_(job.n * job.group()), at_once_(std::min(rows_, most_rows)), value_parts_(job.value_dim / 64), key_row_(heads_ * keys_.row_bytes), value_row_(heads_ * values_.row_bytes),
          state_(state), softmax_(job.softcap, state, Bytes<digits>::width(job.value_dim)), worth_(heads_ * at_once_), largest_(heads_),
          queries_(heads_ * rows_), sums_(heads_ * rows_) {
        // Not push_back: what it grows by is a function that other objects share, and this one's needs AVX-512.
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows_; ++r) {
                queries_[h * rows_ + r] = prepared + row_of(h, r) * Bytes<digits>::query_bytes(job.dim);
                sums_[h * rows_ + r] = state.sums + row_of(h, r) * Bytes<digits>::width(job.value_dim);
            }
        const int64_t kept = few(job) ? heads_ * rows_ * value_parts_ * part_registers * 64 : 0;
        memory_.reset(new char[64 + 4 * span * heads_ * (at_once_ + 3) + kept]);
        weights_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
        key_scales_ = weights_ + heads_ * at_once_ * span;
        value_scales_ = key_scales_ + heads_ * span;
        inverses_ = value_scales_ + heads_ * span;
        kept_ = reinterpret_cast<__m512i*>(inverses_ + heads_ * span);
    }

    virtual ~Streams() = default;

    // Every query sees all of the span that starts at row `start`.
    bool see_all(int64_t start) const {
        for (int64_t i = 0; i < job_.n; ++i)
            if (!Sight(job_, i).whole(start, start + span)) return false;
        return true;
    }

    // Adds the span at row `start` to the state. `more`: the span behind it is next.
    void run(int64_t start, bool more) {
        take_scales<Keys>(stored_keys_, start, 1.0f, key_scales_);
        take_scales<Values>(stored_values_, start, few(job_) || digits == 3 ? sums_scale : 1.0f, value_scales_);
        if (!few(job_) && digits == 2)
            for (int64_t h = 0; h < heads_; ++h) largest_[h] = take_logarithms(value_scales_ + h * span, inverses_ + h * span, span);
        const Slab keys{stored_keys_.codes + start * key_row_, key_row_};
        const Slab values{stored_values_.codes + start * value_row_, value_row_};
        const Slab next = more ? Slab{keys.codes + span * key_row_, key_row_} : Slab{};
        for (int64_t row = 0; row < rows_; row += at_once_) {
            const int64_t count = std::min(at_once_, rows_ - row);
            const bool last = row + count == rows_;
            score(start, keys, values, row, count, more && row == 0);
            weigh(row, count);
            if (few(job_)) add_in_order(values, next);
            else add_by_head(values, last ? next : Slab{}, row, count);
        }
    }

  protected:
    using Sums = HalfSums<digits>;
    static constexpr int64_t most_rows = 16;               // of weights that are kept at a time, a head
    static constexpr int part_registers = 2 * Sums::registers;  // of sums over 64 numbers

    // Row r of a head's queries, as the state counts them: over queries, and within a query over its query heads.
    int64_t row_of(int64_t head, int64_t r) const {
        return r / job_.group() * job_.q_heads + head * job_.group() + r % job_.group();
    }

    // Scales of a span, times `factor`: [position][head] -> [head][position within its stream][stream].
    template <class Rows>
    void take_scales(const CodedRows& rows, int64_t start, float factor, float* out) const {
        const int64_t stream = length * heads_;
        const char* scales = rows.scales + start * heads_ * scale_size<Rows>;
        const __m512 by = _mm512_set1_ps(factor);
        int64_t h = 0, j = 0;
        for (int64_t f = 0; f < stream; f += 16) {
            const __mmask16 mask = stream - f >= 16 ? 0xffff : (1 << (stream - f)) - 1;
            __m512i v[16];
            for (int64_t i = 0; i < 16; ++i) {
                const char* some = scales + (i * stream + f) * scale_size<Rows>;
                if constexpr (Rows::half_scales)
                    v[i] = _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, some)));
                else v[i] = _mm512_maskz_loadu_epi32(mask, some);
            }
            transpose_16(v);
            for (int64_t i = 0; i < 16 && f + i < stream; ++i) {
                _mm512_store_ps(out + h * span + j * lanes, _mm512_mul_ps(_mm512_castsi512_ps(v[i]), by));
                if (++h == heads_) h = 0, ++j;
            }
        }
    }

    template <class Rows>
    static constexpr int64_t scale_size = Rows::half_scales ? 2 : 4;

    // Products of queries and keys, in place of the weights they will become.
    virtual void score(int64_t start, const Slab& keys, const Slab& values, int64_t row, int64_t count, bool more) {
        const char* key_scales = stored_keys_.scales + (start + span) * heads_ * scale_size<Keys>;
        const char* value_scales = stored_values_.scales + (start + span) * heads_ * scale_size<Values>;
        for (int64_t j = 0, step = 0; j < length; ++j) {
            for (int64_t h = 0; h < heads_; ++h, ++step) {
                if (more) {  // a line holds the scales of 16 positions and heads
                    __builtin_prefetch(key_scales + step * 64, 0, 2);
                    __builtin_prefetch(value_scales + step * 64, 0, 2);
                }
                const int64_t at = step * keys_.row_bytes, times = job_.dim / 64;
                Lines ahead = few(job_) ? streams_ahead(keys, values, at, keys_.row_bytes)
                                        : lines_at(values, row == 0 ? step * times * 64 * lanes : values.bytes(), times);
                in_fours(0, count, [&](auto n, int64_t r) {
                    multiply_keys<digits, decltype(n)::value>(keys_, keys.codes + at, keys.stream(), job_.dim, &queries_[h * rows_ + row + r],
                                                      weights_ + (h * at_once_ + r) * span + j * lanes, span, ahead);
                    ahead.left = 0;
                });
            }
        }
    }

    void weigh(int64_t row, int64_t count) {
        if constexpr (digits == 2)
            if (!few(job_)) return weigh_shortly(row, count);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < count; ++r) {
                float* weights = weights_ + (h * at_once_ + r) * span;
                softmax_.scale(weights, key_scales_ + h * span, span);
                softmax_.weigh(row_of(h, row + r), weights, value_scales_ + h * span, span);
                worth_[h * at_once_ + r] = store_weights<digits>(weights, span, reinterpret_cast<char*>(weights));
            }
    }

    void weigh_shortly(int64_t row, int64_t count) {
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8000);  // weights that are nothing beside the largest become zero, and nothing slow
        ShortSoftmax<Softmax<Bytes<digits>>> softmax(softmax_, state_, job_.softcap);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < count; ++r)
                worth_[h * at_once_ + r] = softmax.weigh(row_of(h, row + r), weights_ + (h * at_once_ + r) * span, span,
                                                         {key_scales_ + h * span, value_scales_ + h * span, inverses_ + h * span, largest_[h]});
        _mm_setcsr(mode);
    }

    WeightRows weight_rows(int64_t head, int64_t row, int64_t r) const {
        const int64_t at = head * at_once_ + r;
        return {reinterpret_cast<const char*>(weights_ + at * span), span * 4, &worth_[at], &sums_[head * rows_ + row + r]};
    }

    void add_by_head(const Slab& values, const Slab& next, int64_t row, int64_t count) {
        int64_t at = 0;
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t d = 0; d < job_.value_dim; d += 64, at += length * 64 * lanes) {
                Lines ahead = lines_at(next, at, length);
                in_fours(0, count, [&](auto n, int64_t r) {
                    multiply_values<digits, decltype(n)::value>(values_, values.codes + h * values_.row_bytes, d, values.row,
                                                        values.stream(), length, weight_rows(h, row, r), ahead);
                    ahead.left = 0;
                });
            }
    }

    void add_in_order(const Slab& values, const Slab& next) {
        std::fill_n(kept_, heads_ * rows_ * value_parts_ * part_registers, _mm512_setzero_si512());
        for (int64_t j = 0; j < length; ++j)
            for (int64_t h = 0; h < heads_; ++h) {
                const int64_t at = (j * heads_ + h) * values_.row_bytes;
                Lines ahead = streams_ahead(values, next, at, values_.row_bytes);
                __m512i* sums = kept_ + h * rows_ * value_parts_ * part_registers;
                for (int64_t d = 0; d < job_.value_dim; d += 64) {
                    ahead.fetch(16);
                    for (int64_t r = 0; r < rows_; ++r, sums += part_registers)
                        add_16<digits>(values_, values.codes + at, d, values.stream(), weight_rows(h, 0, r).digits + j * 4 * step_bytes<digits>, sums);
                }
            }
        const __m512i* sums = kept_;
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t d = 0; d < job_.value_dim; d += 64)
                for (int64_t r = 0; r < rows_; ++r, sums += part_registers) {
                    const WeightRows rows = weight_rows(h, 0, r);
                    Sums(sums).add_to(rows.sums[0] + d, rows.worth[0]);
                    Sums(sums + Sums::registers).add_to(rows.sums[0] + d + 32, rows.worth[0]);
                }
    }

    const AttendJob& job_;
    Keys keys_;
    Values values_;
    CodedRows stored_keys_, stored_values_;
    int64_t heads_, rows_, at_once_, value_parts_, key_row_, value_row_;
    AttendState state_;
    Softmax<Bytes<digits>> softmax_;
    std::vector<float> worth_;             // [head][row] of one unit of a weight
    std::vector<float> largest_;           // [head] scale of the values
    std::vector<const char*> queries_;     // [head][row], as prepared
    std::vector<float*> sums_;             // [head][row], in the state
    std::unique_ptr<char[]> memory_;       // of the five below
    float* weights_;                       // [head][row][position within its stream][stream]; digits, in the end
    float *key_scales_, *value_scales_;    // [head][position within its stream][stream]; of values logarithms, for ShortSoftmax
    float* inverses_;                      // the same, as it wants them
    __m512i* kept_;                        // [head][64 numbers][row][sums] of whole numbers
};

}  // namespace
}  // namespace kvmmap
