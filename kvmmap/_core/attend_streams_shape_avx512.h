// What walks over streams share that does not depend on how rows are stored: where streams lie, what is fetched ahead of them, and
// their scales.
#pragma once

#include "attend_digits_avx512.h"
#include "attend_tiles.h"

namespace kvmmap {
namespace {

struct StreamsShape {
    static constexpr int64_t lanes = 16, longest = 17, span = lanes * longest;
    static constexpr int64_t second_level = 640 * 1024;  // what may be fetched into that cache and stay there

    static bool few(const AttendJob& job) { return job.n * job.group() <= 2; }

    static bool suit(const AttendJob& job, const AttendRange& range) {
        return job.dim % 64 == 0 && job.value_dim % 64 == 0 && range.head == 0 && range.head_end == job.kv_heads &&
               (few(job) || span * job.kv_heads * std::max(job.dim, job.value_dim) <= second_level);
    }

    static constexpr int64_t distance = 1024;  // to fetch ahead within a stream

    // Rows [start, start + lanes * length) as streams of so many positions; those that are not seen, if any, count for nothing.
    struct Span {
        int64_t start = 0, length = longest;
        bool whole = true;
        __mmask16 seen[longest] = {};  // streams whose position of that number is seen, unless all are

        Span() = default;
        // A whole one.
        explicit Span(int64_t first) : start(first) {}
        // Of these rows, [from, to) are seen.
        Span(int64_t first, int64_t positions, int64_t from, int64_t to)
            : start(first), length(positions), whole(from == first && to == first + lanes * positions) {
            const __m512i apart = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                                     _mm512_set1_epi32(static_cast<int>(length)));
            const __m512i least = _mm512_set1_epi32(static_cast<int>(from - first)), end = _mm512_set1_epi32(static_cast<int>(to - first));
            for (int64_t j = 0; j < length; ++j) {
                const __m512i row = _mm512_add_epi32(apart, _mm512_set1_epi32(static_cast<int>(j)));
                seen[j] = _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(row, least), row, end);
            }
        }

        int64_t rows() const { return lanes * length; }
    };

    // Whether each_span has any span of a range, here and below of `least` rows at the least.
    static bool begins(const AttendJob& job, const AttendRange& range, int64_t least) {
        const int64_t rows = std::min(range.stop - range.start, span);
        return rows >= least && range.stop >= lanes && see_all(job, range.start, range.start + rows);
    }

    // Calls run(span, whether a whole one follows) for spans that have the rows of a range, as far as every query sees these;
    // returns where they end. What is left behind whole spans is one of shorter streams that ends with the range: it starts with
    // rows before the range where there are some, and else the first rows are one of their own.
    template <class Run>
    static int64_t each_span(const AttendJob& job, const AttendRange& range, int64_t coming, int64_t least, Run&& run) {
        int64_t start = range.start;
        for (; start + span <= range.stop && see_all(job, start, start + span); start += span) run(Span(start), start + 2 * span <= coming);
        const int64_t rest = range.stop - start;
        if (rest < least || rest >= span || !see_all(job, start, range.stop)) return start;
        const int64_t length = (rest + lanes - 1) / lanes, first = range.stop - lanes * length;
        if (first >= 0) {
            run(Span(first, length, start, range.stop), false);
            return range.stop;
        }
        const int64_t behind = rest / lanes * lanes;
        if (!behind) return start;
        if (behind < rest) run(Span(start, 1, start, range.stop - behind), false);
        run(Span(range.stop - behind, behind / lanes, range.stop - behind, range.stop), false);
        return range.stop;
    }

    // One slab's share of a span.
    struct Slab {
        const char* codes = nullptr;
        int64_t row = 0;  // bytes, of all heads
        int64_t length = longest;

        int64_t stream() const { return length * row; }
        int64_t bytes() const { return lanes * stream(); }
    };

    // Scales of a span that comes next, of keys and of values; none if there is no such span.
    struct Scales {
        const char *keys = nullptr, *values = nullptr;
    };

    // A line of them: it holds those of 16 positions and heads, or of 32.
    static void fetch_scales(const Scales& scales, int64_t step) {
        if (!scales.keys) return;
        __builtin_prefetch(scales.keys + step * 64, 0, 2);
        __builtin_prefetch(scales.values + step * 64, 0, 2);
    }

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

    // What is `distance` ahead of `bytes` from byte `at` on of each stream: the lines that start there, as others are ahead of
    // what comes before; behind the end of the streams come those of `then`.
    static Lines streams_ahead(const Slab& now, const Slab& then, int64_t at, int64_t bytes) {
        const int64_t lines = (at + bytes + 63) / 64 - (at + 63) / 64;
        at = (at + 63) / 64 * 64 + distance;
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

    // Every query sees rows [start, stop).
    static bool see_all(const AttendJob& job, int64_t start, int64_t stop) {
        for (int64_t i = 0; i < job.n; ++i)
            if (!Sight(job, i).whole(start, stop)) return false;
        return true;
    }

    // Scales of a span of so long streams, which they start with, times `factor`: [position][head] -> [head][position within its stream][stream].
    template <bool half>
    static void take_scales(const char* scales, int64_t heads, int64_t length, float factor, float* out) {
        constexpr int64_t bytes = half ? 2 : 4;
        const int64_t stream = length * heads;
        const __m512 by = _mm512_set1_ps(factor);
        int64_t h = 0, j = 0;
        for (int64_t f = 0; f < stream; f += 16) {
            const __mmask16 mask = stream - f >= 16 ? 0xffff : (1 << (stream - f)) - 1;
            __m512i v[16];
            for (int64_t i = 0; i < 16; ++i) {
                const char* some = scales + (i * stream + f) * bytes;
                if constexpr (half) v[i] = _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, some)));
                else v[i] = _mm512_maskz_loadu_epi32(mask, some);
            }
            transpose_16(v);
            for (int64_t i = 0; i < 16 && f + i < stream; ++i) {
                _mm512_store_ps(out + h * span + j * lanes, _mm512_mul_ps(_mm512_castsi512_ps(v[i]), by));
                if (++h == heads) h = 0, ++j;
            }
        }
    }
};

}  // namespace
}  // namespace kvmmap
