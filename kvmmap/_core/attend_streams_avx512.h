// Attention over 272 positions at a time, walked as 16 streams of 17 positions side by side: a lane a stream.
//
// A tile of 64 positions touches a head's share of every row, a kilobyte apart, and no hardware prefetcher follows that; what
// software prefetches is bounded by the 24 lines that a core of Zen 4 can have under way to its first-level cache: half of
// what it reads in order. A stream is read in order, all heads of a position and then those of the next, and 16 of them
// are read about as fast as one. 17 positions, and not 16: streams that are a multiple of 4096 bytes apart would fall into
// the same set of the first-level cache.
//
// From three query rows a KV head on, products bound the speed: sums stay in registers for a head's 272 positions, and what comes
// next is fetched into the second-level cache meanwhile. attend_few_streams_avx512.h has one and two.
#pragma once

#include <memory>

#include "attend_bytes_avx512.h"
#include "attend_short_softmax_avx512.h"
#include "attend_streams_shape_avx512.h"

namespace kvmmap {
namespace {

// Rows of a span that are worth a walk: fewer are decoded first where each four rows of queries would look codes up again, and
// where looking up takes longer (6 and 3 bits).
template <class Keys, class Values>
int64_t least_rows(const AttendJob& job) {
    constexpr bool plain = Keys::number_bits == 8 && Values::number_bits == 8;
    constexpr bool quick = Keys::number_bits % 3 && Values::number_bits % 3;
    return plain || (quick && job.n * job.group() <= 4) ? 1 : StreamsShape::span;
}

// Keys and Values load rows as attend_rows_avx512.h says. Walk is what derives from this, and has score(), which stores products
// of queries and keys in place of the weights they will become.
template <int digits, class Keys, class Values, class Walk>
class StreamsOf : public StreamsShape {
  public:
    // `keys` and `values` are rows as they are stored, with their scales.
    StreamsOf(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const char* prepared, AttendState state)
        : job_(job), keys_(job.dim), values_(job.value_dim), stored_keys_(keys), stored_values_(values),
          heads_(job.kv_heads), rows_(job.n * job.group()), at_once_(std::min(rows_, most_rows)),
          key_row_(heads_ * keys_.row_bytes), value_row_(heads_ * values_.row_bytes),
          state_(state), softmax_(job.softcap, state, Bytes<digits>::width(job.value_dim)), worth_(heads_ * at_once_), largest_(heads_),
          queries_(heads_ * rows_), sums_(heads_ * rows_) {
        // Not push_back: what it grows by is a function that other objects share, and this one's needs AVX-512.
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < rows_; ++r) {
                queries_[h * rows_ + r] = prepared + row_of(h, r) * Bytes<digits>::query_bytes(job.dim);
                sums_[h * rows_ + r] = state.sums + row_of(h, r) * Bytes<digits>::width(job.value_dim);
            }
        memory_.reset(new char[64 + 4 * span * heads_ * (at_once_ + 3)]);
        weights_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
        key_scales_ = weights_ + heads_ * at_once_ * span;
        value_scales_ = key_scales_ + heads_ * span;
        inverses_ = value_scales_ + heads_ * span;
    }

    // Adds a span to the state. `more`: a whole one behind it is next.
    void run(const Span& now, bool more) {
        now_ = now;
        take_scales<Keys>(stored_keys_, 1.0f, key_scales_);
        take_scales<Values>(stored_values_, digits == 3 ? sums_scale : 1.0f, value_scales_);
        if (!now.whole)  // where nothing is seen, scales may be anything
            for (int64_t h = 0; h < heads_; ++h)
                for (int64_t j = 0; j < now.length; ++j) {
                    float* scales = value_scales_ + h * span + j * lanes;
                    _mm512_store_ps(scales, _mm512_maskz_load_ps(now.seen[j], scales));
                }
        if (digits == 2)
            for (int64_t h = 0; h < heads_; ++h) largest_[h] = take_logarithms(value_scales_ + h * span, inverses_ + h * span, now.rows());
        const Slab keys{stored_keys_.codes + now.start * key_row_, key_row_, now.length};
        const Slab values{stored_values_.codes + now.start * value_row_, value_row_, now.length};
        const Slab next = more ? Slab{keys.codes + span * key_row_, key_row_} : Slab{};
        for (int64_t row = 0; row < rows_; row += at_once_) {
            const int64_t count = std::min(at_once_, rows_ - row);
            const bool last = row + count == rows_;
            static_cast<Walk*>(this)->score(keys, values, row, count, more && row == 0);
            weigh(row, count);
            add_by_head(values, last ? next : Slab{}, row, count);
        }
    }

    // Walks over as much of a range as every query sees; returns where it ends.
    int64_t walk(const AttendRange& range, int64_t coming) {
        return each_span(job_, range, coming, least_rows<Keys, Values>(job_), [this](const Span& span, bool more) { run(span, more); });
    }

  protected:
    static constexpr int64_t most_rows = 16;  // of weights that are kept at a time, a head

    // Row r of a head's queries, as the state counts them: over queries, and within a query over its query heads.
    int64_t row_of(int64_t head, int64_t r) const {
        return r / job_.group() * job_.q_heads + head * job_.group() + r % job_.group();
    }

    template <class Rows>
    void take_scales(const CodedRows& rows, float factor, float* out) const {
        StreamsShape::take_scales<Rows::half_scales>(scales_at<Rows>(rows, now_.start), heads_, now_.length, factor, out);
    }

    template <class Rows>
    const char* scales_at(const CodedRows& rows, int64_t start) const {
        return rows.scales + start * heads_ * (Rows::half_scales ? 2 : 4);
    }

    Scales coming_scales(bool more) const {
        if (!more) return {};
        return {scales_at<Keys>(stored_keys_, now_.start + span), scales_at<Values>(stored_values_, now_.start + span)};
    }

    void weigh(int64_t row, int64_t count) {
        if constexpr (digits == 2) return weigh_shortly(row, count);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < count; ++r) {
                float* weights = weights_ + (h * at_once_ + r) * span;
                softmax_.scale(weights, key_scales_ + h * span, now_.rows());
                if (!now_.whole) hide(weights);
                softmax_.weigh(row_of(h, row + r), weights, value_scales_ + h * span, now_.rows());
                worth_[h * at_once_ + r] = store_weights<digits>(weights, now_.rows(), reinterpret_cast<char*>(weights));
            }
    }

    void hide(float* scores) const {
        const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t j = 0; j < now_.length; ++j) _mm512_mask_store_ps(scores + j * lanes, static_cast<__mmask16>(~now_.seen[j]), nothing);
    }

    void weigh_shortly(int64_t row, int64_t count) {
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8000);  // weights that are nothing beside the largest become zero, and nothing slow
        ShortSoftmax<Softmax<Bytes<digits>>> softmax(softmax_, state_, job_.softcap);
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t r = 0; r < count; ++r)
                worth_[h * at_once_ + r] = softmax.weigh(row_of(h, row + r), weights_ + (h * at_once_ + r) * span, now_.rows(),
                                                         {key_scales_ + h * span, value_scales_ + h * span, inverses_ + h * span, largest_[h],
                                                          now_.whole ? nullptr : now_.seen});
        _mm_setcsr(mode);
    }

    WeightRows weight_rows(int64_t head, int64_t row, int64_t r) const {
        const int64_t at = head * at_once_ + r;
        return {reinterpret_cast<const char*>(weights_ + at * span), span * 4, &worth_[at], &sums_[head * rows_ + row + r]};
    }

    void add_by_head(const Slab& values, const Slab& next, int64_t row, int64_t count) {
        int64_t at = 0;
        for (int64_t h = 0; h < heads_; ++h)
            for (int64_t d = 0; d < job_.value_dim; d += 64, at += now_.length * 64 * lanes) {
                Lines ahead = lines_at(next, at, now_.length);
                in_fours(0, count, [&](auto n, int64_t r) {
                    multiply_values<digits, decltype(n)::value>(values_, values.codes + h * values_.row_bytes, d, values.row,
                                                        values.stream(), now_.length, weight_rows(h, row, r), ahead);
                    ahead.left = 0;
                });
            }
    }

    const AttendJob& job_;
    Span now_;
    Keys keys_;
    Values values_;
    CodedRows stored_keys_, stored_values_;
    int64_t heads_, rows_, at_once_, key_row_, value_row_;
    AttendState state_;
    Softmax<Bytes<digits>> softmax_;
    std::vector<float> worth_;             // [head][row] of one unit of a weight
    std::vector<float> largest_;           // [head] scale of the values
    std::vector<const char*> queries_;     // [head][row], as prepared
    std::vector<float*> sums_;             // [head][row], in the state
    std::unique_ptr<char[]> memory_;       // of the four below
    float* weights_;                       // [head][row][position within its stream][stream]; digits, in the end
    float *key_scales_, *value_scales_;    // [head][position within its stream][stream]; of values logarithms, for ShortSoftmax
    float* inverses_;                      // the same, as it wants them
};

template <int digits, class Keys, class Values>
class Streams : public StreamsOf<digits, Keys, Values, Streams<digits, Keys, Values>> {
    using Base = StreamsOf<digits, Keys, Values, Streams>;
    using typename Base::Lines, typename Base::Slab;
    using Base::job_, Base::keys_, Base::heads_, Base::at_once_, Base::queries_, Base::rows_,
        Base::weights_, Base::now_, Base::lanes, Base::span;

  public:
    using Base::Base;

    void score(const Slab& keys, const Slab& values, int64_t row, int64_t count, bool more) {
        const auto scales = Base::coming_scales(more);
        for (int64_t j = 0, step = 0; j < now_.length; ++j) {
            for (int64_t h = 0; h < heads_; ++h, ++step) {
                Base::fetch_scales(scales, step);
                const int64_t at = step * keys_.row_bytes, times = job_.dim / 64;
                Lines ahead = Base::lines_at(values, row == 0 ? step * times * 64 * lanes : values.bytes(), times);
                in_fours(0, count, [&](auto n, int64_t r) {
                    multiply_keys<digits, decltype(n)::value>(keys_, keys.codes + at, keys.stream(), job_.dim, &queries_[h * rows_ + row + r],
                                                      weights_ + (h * at_once_ + r) * span + j * lanes, span, ahead);
                    ahead.left = 0;
                });
            }
        }
    }
};

}  // namespace
}  // namespace kvmmap
