// One query over rows of 16 bits, read in the order in which they lie: the last positions of a layer, which were not read
// since the step before, and layers that are stored so.
//
// Tiles of attend_tiles.h take a head's share of every row at a time, a kilobyte or more apart, and wait for each. Here 16
// positions of all heads are multiplied before the next 16, which are fetched meanwhile. 16 products of a position and a
// row of queries are summed up together, in 30 shuffles where one by one they take 100.
#pragma once

#include <memory>

#include "attend_floats.h"

namespace kvmmap {
namespace {

// Lane i: the sum of v[i].
inline __m512 sum_each(const __m512 (&v)[16]) {
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

template <class Number>
class OneQuery {
    using Engine = Floats<16, Number>;
    static constexpr int64_t chunk = 16, most = 256;  // positions that are multiplied together, and weighed together

  public:
    // The range is one that the query sees all of.
    static bool suits(const AttendJob& job, const AttendRange& range) {
        return job.n == 1 && job.dim % 16 == 0 && job.value_dim % 16 == 0 && Sight(job, 0).whole(range.start, range.stop);
    }

    OneQuery(const AttendJob& job, const char* prepared, AttendState state)
        : job_(job), group_(job.group()), query_(Engine::query_bytes(job.dim) / 4), key_row_(job.kv_heads * job.dim), value_row_(job.kv_heads * job.value_dim),
          keys_(static_cast<const Number*>(job.key_rows)), values_(static_cast<const Number*>(job.value_rows)),
          queries_(reinterpret_cast<const float*>(prepared)), state_(state),
          softmax_(job.softcap, state, Engine::width(job.value_dim)), memory_(new char[64 + 4 * most * (job.q_heads + 2)]) {
        scores_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
        ones_ = scores_ + job.q_heads * most, factors_ = ones_ + most;
        std::fill_n(ones_, most, 1.0f);
        std::fill_n(factors_, most, sums_scale);
    }

    void run(const AttendRange& range, int64_t coming) {
        fetch(keys_, key_row_, range.start, range.stop, range.head, range);
        for (int64_t start = range.start; start < range.stop; start += most) {
            const int64_t stop = std::min(start + most, range.stop);
            for (int64_t at = start; at < stop; at += chunk)
                each_head(range, [&](int64_t head) {
                    if (at + chunk < stop) fetch(keys_, key_row_, at + chunk, stop, head, range);
                    else fetch(values_, value_row_, start, stop, head, range);
                    score(head, start, at, stop);
                });
            for (int64_t row = range.head * group_; row < range.head_end * group_; ++row) weigh(row, stop - start);
            for (int64_t at = start; at < stop; at += chunk)
                each_head(range, [&](int64_t head) {
                    if (at + chunk < stop) fetch(values_, value_row_, at + chunk, stop, head, range);
                    else fetch(keys_, key_row_, stop, std::max(stop, coming), head, range);
                    add(head, start, at, stop);
                });
        }
    }

  private:
    template <class Run>
    static void each_head(const AttendRange& range, Run&& run) {
        for (int64_t head = range.head; head < range.head_end; ++head) run(head);
    }

    // A head's share of fetching the next chunk, which has all heads side by side.
    static void fetch(const Number* rows, int64_t row, int64_t start, int64_t stop, int64_t head, const AttendRange& range) {
        const int64_t count = std::min(chunk, stop - start) * row * 2, heads = range.head_end - range.head;
        const char* from = reinterpret_cast<const char*>(rows + start * row);
        const int64_t share = (count + heads - 1) / heads, done = (head - range.head) * share;
        for (int64_t at = done; at < std::min(count, done + share); at += 64) __builtin_prefetch(from + at, 0, 2);
    }

    // Where the rows of a chunk lie; behind the last one it is there again, and does not count.
    void locate(const Number* rows, int64_t row, int64_t at, int64_t stop, const Number* (&found)[chunk]) const {
        for (int64_t j = 0; j < chunk; ++j) found[j] = rows + std::min(at + j, stop - 1) * row;
    }

    void score(int64_t head, int64_t start, int64_t at, int64_t stop) const {
        const Number* rows[chunk];
        locate(keys_ + head * job_.dim, key_row_, at, stop, rows);
        in_fours(head * group_, (head + 1) * group_, [&](auto n, int64_t row) {
            multiply<decltype(n)::value>(rows, queries_ + row * query_, scores_ + row * most + at - start);
        });
    }

    // R rows of queries with 16 positions.
    template <int R>
    void multiply(const Number* const (&rows)[chunk], const float* queries, float* out) const {
        constexpr int room = R == 3 ? 4 : R, count = 16 / room;  // positions whose sums are made together
        for (int first = 0; first < chunk; first += count) {
            __m512 sums[16];
            for (auto& sum : sums) sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < job_.dim; d += 16) {
                __m512 q[R];
                for (int r = 0; r < R; ++r) q[r] = _mm512_loadu_ps(queries + r * query_ + Engine::query_header + d);
#pragma GCC unroll 16
                for (int j = 0; j < count; ++j) {
                    const __m512 key = (__m512)widen<16>(rows[first + j] + d);
                    for (int r = 0; r < R; ++r) sums[r * count + j] = _mm512_fmadd_ps(key, q[r], sums[r * count + j]);
                }
            }
            // Lanes are positions of one row of queries after the other.
            __m512 worth = _mm512_set1_ps(queries[0]);
            for (int r = 1; r < R; ++r)
                worth = _mm512_mask_mov_ps(worth, static_cast<__mmask16>(0xffff << r * count), _mm512_set1_ps(queries[r * query_]));
            const __m512 all = _mm512_mul_ps(sum_each(sums), worth);
            if constexpr (R == 1) {
                _mm512_store_ps(out, all);
            } else if constexpr (R == 2) {
                _mm256_store_ps(out + first, _mm512_castps512_ps256(all));
                _mm256_store_ps(out + most + first, _mm512_extractf32x8_ps(all, 1));
            } else {
                _mm_store_ps(out + first, _mm512_castps512_ps128(all));
                _mm_store_ps(out + most + first, _mm512_extractf32x4_ps(all, 1));
                _mm_store_ps(out + 2 * most + first, _mm512_extractf32x4_ps(all, 2));
                if constexpr (R == 4) _mm_store_ps(out + 3 * most + first, _mm512_extractf32x4_ps(all, 3));
            }
        }
    }

    // Scores of some positions -> weights, in place; what is behind the last one weighs nothing.
    void weigh(int64_t row, int64_t count) {
        float* scores = scores_ + row * most;
        const int64_t whole = (count + chunk - 1) / chunk * chunk;
        softmax_.scale(scores, ones_, whole);
        for (int64_t j = count; j < whole; ++j) scores[j] = -std::numeric_limits<float>::infinity();
        softmax_.weigh(row, scores, factors_, whole);
    }

    void add(int64_t head, int64_t start, int64_t at, int64_t stop) const {
        const Number* rows[chunk];
        locate(values_ + head * job_.value_dim, value_row_, at, stop, rows);
        const int64_t width = Engine::width(job_.value_dim);
        in_fours(head * group_, (head + 1) * group_, [&](auto n, int64_t row) {
            constexpr int R = decltype(n)::value, N = R == 1 ? 8 : 4;
            const float* weights = scores_ + row * most + at - start;
            float* sums = state_.sums + row * width;
            int64_t d = 0;
            for (; d + 16 * N <= job_.value_dim; d += 16 * N) add_numbers<R, N>(rows, d, weights, sums, width);
            for (; d + 64 <= job_.value_dim; d += 64) add_numbers<R, 4>(rows, d, weights, sums, width);
            for (; d < job_.value_dim; d += 16) add_numbers<R, 1>(rows, d, weights, sums, width);
        });
    }

    // 16 positions are summed by themselves first: one after the other, thousands of terms lose digits.
    template <int R, int N>
    static void add_numbers(const Number* const (&rows)[chunk], int64_t d, const float* weights, float* sums, int64_t width) {
        __m512 s[R][N];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < N; ++i) s[r][i] = _mm512_setzero_ps();
        for (int j = 0; j < chunk; ++j) {
            __m512 v[N];
            for (int i = 0; i < N; ++i) v[i] = (__m512)widen<16>(rows[j] + d + 16 * i);
            for (int r = 0; r < R; ++r) {
                const __m512 w = _mm512_set1_ps(weights[r * most + j]);
                for (int i = 0; i < N; ++i) s[r][i] = _mm512_fmadd_ps(v[i], w, s[r][i]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < N; ++i) {
                float* sum = sums + r * width + d + 16 * i;
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), s[r][i]));
            }
    }

    const AttendJob& job_;
    int64_t group_, query_, key_row_, value_row_;
    const Number *keys_, *values_;
    const float* queries_;
    AttendState state_;
    Softmax<Engine> softmax_;
    std::unique_ptr<char[]> memory_;
    float *scores_, *ones_, *factors_;  // [rows of queries, most], [most], [most]
};

template <class Number>
void walk_halves(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared, AttendState state) {
    if (OneQuery<Number>::suits(job, range)) OneQuery<Number>(job, prepared, state).run(range, coming);
    else walk<Floats<16, Number>>(job, range, coming, prepared, state);
}

template <class Number>
constexpr AttendKernel halves_kernel() {
    AttendKernel kernel = kernel_of<Floats<16, Number>>();
    kernel.walk = walk_halves<Number>;
    return kernel;
}

}  // namespace
}  // namespace kvmmap
