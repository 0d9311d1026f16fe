// One pass of online softmax over tiles of 64 positions: what the kernels of attention share. A kernel file brings a
// struct, in a namespace without a name, that multiplies:
//
//   lanes                               floats it works on at a time
//   Number                              what keys and values are made of: int8_t, or floats of 32 or 16 bits
//   Weights                             weights of four rows over a tile, as it wants them
//   width, finish, query_bytes, prepare as in attend.h
//   Engine(dim, value_dim)              with room for one tile
//   load(keys, values, ...)             takes up a tile of one KV head
//   scores<R>(queries, out, ahead)      out[r][64] = query r . key codes, for R of 1 to 4; fetches what is ahead
//   set(weights, r, w)                  row r weighs w[64], none below 0
//   add<R>(weights, sums, ahead)        sums[r] += weights r . value codes
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "attend_softmax.h"
#include "lanes.h"

namespace kvmmap {
namespace {

constexpr int64_t tile = 64;

// Positions [low, high) and those below sinks, none of them below floor, as rows of the arrays.
struct Sight {
    int64_t low, high, sinks, floor;

    Sight(const AttendJob& job, int64_t query) {
        const int64_t position = job.query_start + query;
        high = job.causal ? position + 1 - job.first_position : std::numeric_limits<int64_t>::max();
        low = job.window ? position - job.window + 1 - job.first_position : std::numeric_limits<int64_t>::min();
        if (job.behind) high = std::min(high, position + 1 - job.behind - job.first_position);
        sinks = std::min(job.sinks - job.first_position, high);
        floor = job.within ? position + 1 - job.within - job.first_position : std::numeric_limits<int64_t>::min();
    }

    bool whole(int64_t start, int64_t stop) const { return stop <= high && start >= floor && (start >= low || stop <= sinks); }
    bool none(int64_t start, int64_t stop) const { return start >= high || stop <= floor || (stop <= low && start >= sinks); }

    // Whether row start + i is seen, in bit i, of 64 rows.
    uint64_t seen(int64_t start) const {
        const auto below = [start](int64_t row) {
            return row <= start ? 0 : row >= start + 64 ? ~uint64_t{0} : (uint64_t{1} << (row - start)) - 1;
        };
        return below(high) & ~below(floor) & (~below(low) | below(sinks));
    }

    // The part of rows [start, stop) outside of which none is seen.
    int64_t first(int64_t start, int64_t stop) const {
        return std::max(std::min(start < sinks ? start : std::max(start, low), stop), floor);
    }
    int64_t last(int64_t stop) const { return std::min(stop, high); }
};

// What comes next in memory, to be fetched into the second-level cache a few lines at a time, between other work: a
// core can have some forty lines under way, and drops what is asked for beyond that.
class Ahead {
  public:
    Ahead() = default;
    Ahead(const void* keys, int64_t key_bytes, const void* values, int64_t value_bytes)
        : now_(static_cast<const char*>(keys)), end_(now_ + key_bytes), then_(static_cast<const char*>(values)),
          then_end_(then_ + value_bytes) {}

    // Inlined by force: GCC takes a function that only prefetches for one without effects, and drops the call.
    [[gnu::always_inline]] void fetch(int lines) {
        if (now_ >= end_) {
            now_ = then_, end_ = then_end_, then_ = then_end_;
            if (now_ >= end_) return;
        }
        // A few lines past the end do no harm, and a loop of fixed length is faster.
        for (int i = 0; i < lines; ++i) __builtin_prefetch(now_ + 64 * i, 0, 2);
        now_ += 64 * lines;
    }

  private:
    const char *now_ = nullptr, *end_ = nullptr, *then_ = nullptr, *then_end_ = nullptr;
};

// Calls run(how many, the first) for rows [row, end): four at once as long as there are four.
template <class Run>
[[gnu::always_inline]] inline void in_fours(int64_t row, int64_t end, Run&& run) {
    for (; row + 4 <= end; row += 4) run(std::integral_constant<int, 4>{}, row);
    if (end - row == 3) run(std::integral_constant<int, 3>{}, row);
    if (end - row == 2) run(std::integral_constant<int, 2>{}, row);
    if (end - row == 1) run(std::integral_constant<int, 1>{}, row);
}

template <class Engine>
class Walk {
    static constexpr int W = Engine::lanes;
    using L = Lanes<W>;
    using F = typename L::F;
    using Number = typename Engine::Number;

  public:
    Walk(const AttendJob& job, const char* prepared, AttendState state)
        : job_(job), keys_(static_cast<const Number*>(job.key_rows)), values_(static_cast<const Number*>(job.value_rows)),
          prepared_(prepared), state_(state), engine_(job.dim, job.value_dim),
          query_bytes_(Engine::query_bytes(job.dim)), width_(Engine::width(job.value_dim)),
          softmax_(job.softcap, state, width_) {
        sights_.reserve(job.n);
        for (int64_t i = 0; i < job.n; ++i) sights_.emplace_back(job, i);
    }

    // Rows before `coming` will be walked next, and may be fetched.
    void run(const AttendRange& range, int64_t coming) {
        for (int64_t start = range.start; start < range.stop; start += tile) {
            const int64_t count = std::min(tile, range.stop - start);
            for (int64_t head = range.head; head < range.head_end; ++head) {
                run_head(head, start, count, ahead(range, start, head, coming));
            }
        }
    }

  private:
    // A head's share of the next tile of all heads: they lie side by side.
    Ahead ahead(const AttendRange& range, int64_t start, int64_t head, int64_t coming) const {
        if (start + 2 * tile > coming || range.head_end - range.head != job_.kv_heads) return {};
        const int64_t keys = tile * job_.dim, values = tile * job_.value_dim, next = (start + tile) * job_.kv_heads;
        constexpr int64_t bytes = sizeof(Number);
        return {keys_ + next * job_.dim + head * keys, keys * bytes, values_ + next * job_.value_dim + head * values,
                values * bytes};
    }

    void run_head(int64_t head, int64_t start, int64_t count, Ahead ahead) {
        int64_t first = 0, last = job_.n;
        while (first < last && sights_[first].none(start, start + count)) ++first;
        while (last > first && sights_[last - 1].none(start, start + count)) --last;
        if (first == last) return;

        const int64_t heads = job_.kv_heads;
        engine_.load(keys_ + (start * heads + head) * job_.dim, heads * job_.dim,
                     values_ + (start * heads + head) * job_.value_dim, heads * job_.value_dim, count);
        alignas(64) float key_scales[tile], value_scales[tile];
        gather(job_.key_scales, start * heads + head, count, 1.0f, key_scales);
        gather(job_.value_scales, start * heads + head, count, sums_scale, value_scales);

        in_fours(first * job_.group(), last * job_.group(), [&](auto n, int64_t from) {
            run_rows<decltype(n)::value>(head, start, count, from, key_scales, value_scales, ahead);
        });
    }

    void gather(const float* scales, int64_t first, int64_t count, float factor, float* out) const {
        for (int64_t j = 0; j < count; ++j) out[j] = scales ? scales[first + j * job_.kv_heads] * factor : factor;
        for (int64_t j = count; j < tile; ++j) out[j] = 0;
    }

    // Rows `from` on of this head, counted over queries and then over the query heads of its group.
    template <int N>
    void run_rows(int64_t head, int64_t start, int64_t count, int64_t from, const float* key_scales,
                  const float* value_scales, Ahead& ahead) {
        const int64_t group = job_.group();
        const char* queries[N];
        float* sums[N];
        alignas(64) float scores[N][tile];
        int64_t rows[N];
        for (int r = 0; r < N; ++r) {
            rows[r] = (from + r) / group * job_.q_heads + head * group + (from + r) % group;
            queries[r] = prepared_ + rows[r] * query_bytes_;
            sums[r] = state_.sums + rows[r] * width_;
        }
        engine_.template scores<N>(queries, scores, ahead);
        bool any = false;
        for (int r = 0; r < N; ++r) {
            const Sight& sight = sights_[(from + r) / group];
            any |= weigh(rows[r], scores[r], sight, start, count, key_scales, value_scales);
            engine_.set(weights_, r, scores[r]);
        }
        if (any) engine_.template add<N>(weights_, sums, ahead);
    }

    // Scores -> weights of the values' codes, in place; false if they are all zero.
    bool weigh(int64_t row, float* scores, const Sight& sight, int64_t start, int64_t count, const float* key_scales,
               const float* value_scales) {
        softmax_.scale(scores, key_scales, tile);
        if (count < tile || !sight.whole(start, start + count)) hide(scores, sight, start, count);
        return softmax_.weigh(row, scores, value_scales, tile);
    }

    static void hide(float* scores, const Sight& sight, int64_t start, int64_t count) {
        const uint64_t seen = sight.seen(start);
        for (int64_t j = 0; j < tile; ++j)
            if (j >= count || !(seen >> j & 1)) scores[j] = -std::numeric_limits<float>::infinity();
    }

    const AttendJob& job_;
    const Number *keys_, *values_;
    const char* prepared_;
    AttendState state_;
    Engine engine_;
    typename Engine::Weights weights_;
    int64_t query_bytes_, width_;
    Softmax<Engine> softmax_;
    std::vector<Sight> sights_;
};

template <class Engine>
void walk(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared, AttendState state) {
    Walk<Engine>(job, prepared, state).run(range, coming);
}

template <class Engine>
constexpr AttendKernel kernel_of() {
    return {tile, Engine::width, Engine::finish, Engine::query_bytes, Engine::prepare, walk<Engine>, nullptr};
}

}  // namespace
}  // namespace kvmmap
