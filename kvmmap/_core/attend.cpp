// Sharing one attention out over threads, and putting its parts together. What happens within a part is a kernel's.
#include "attend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "attend_decode.h"
#include "cpu.h"
#include "first_read.h"
#include "parallel.h"
#include "room.h"

namespace kvmmap {
namespace {

// Of each instruction set, by what rows are made of, and whether queries were given in 16 bits.
const AttendKernel& attend_kernel(Numbers numbers, [[maybe_unused]] bool short_queries) {
    const auto choose = [numbers](const AttendKernel& codes, const AttendKernel& floats, const AttendKernel& f16,
                                  const AttendKernel& bf16) -> const AttendKernel& {
        return numbers == Numbers::codes ? codes : numbers == Numbers::floats ? floats : numbers == Numbers::f16 ? f16 : bf16;
    };
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx2:
            return choose(short_queries ? attend_short_avx2 : attend_avx2, attend_floats_avx2, attend_f16_avx2, attend_bf16_avx2);
        case Isa::avx512:
            return choose(short_queries ? attend_short_avx512 : attend_avx512, attend_floats_avx512, attend_f16_avx512, attend_bf16_avx512);
#if defined(KVMMAP_AMX)
        case Isa::amx:
            return choose(short_queries ? attend_short_amx : attend_amx, attend_floats_avx512, attend_f16_avx512, attend_bf16_avx512);
#endif
#elif defined(__aarch64__)
#if defined(KVMMAP_BYTE_PRODUCTS)
        case Isa::dotprod:
            return choose(short_queries ? attend_short_dotprod : attend_dotprod, attend_floats_neon, attend_f16_neon, attend_bf16_neon);
        case Isa::i8mm:
            return choose(short_queries ? attend_short_i8mm : attend_dotprod, attend_floats_neon, attend_f16_neon, attend_bf16_neon);
#endif
        case Isa::neon: return choose(attend_neon, attend_floats_neon, attend_f16_neon, attend_bf16_neon);
#endif
        default: return choose(attend_portable, attend_floats_portable, attend_f16_portable, attend_bf16_portable);
    }
}

constexpr float nothing = -std::numeric_limits<float>::infinity();

// Sums over more positions than this are put together from parts: f32 sums of a million terms, one by one, lose digits.
// A multiple of what kernels work on at a time: 64, and 272.
constexpr int64_t part_positions = 4352;

// Bytes of rows that are worth a thread: some 20 us of work, as much as it takes to wake one.
constexpr int64_t thread_bytes = 256 * 1024;

struct State {
    Room memory;
    AttendState view;

    State(int64_t rows, int64_t width) : memory(rows * (width + 2) * 4) {
        float* start = memory.floats();
        view = {start + rows * width, start + rows * width + rows, start};
    }
};

// The rows of query heads that belong to KV heads [head, head_end): calls body(row).
template <class Body>
void each_row(const AttendJob& job, int64_t head, int64_t head_end, Body&& body) {
    for (int64_t i = 0; i < job.n; ++i)
        for (int64_t q = head * job.group(); q < head_end * job.group(); ++q) body(i * job.q_heads + q);
}

void clear(AttendState state, int64_t row, int64_t width) {
    state.top[row] = nothing;
    state.total[row] = 0;
    std::fill_n(state.sums + row * width, width, 0.0f);
}

// Adds a row of `part` to the same row of `whole`.
void merge(AttendState whole, AttendState part, int64_t row, int64_t width) {
    if (part.top[row] == nothing) return;
    const float top = std::max(whole.top[row], part.top[row]);
    const float keep = std::exp2(whole.top[row] - top), add = std::exp2(part.top[row] - top);
    float* sums = whole.sums + row * width;
    const float* more = part.sums + row * width;
    for (int64_t i = 0; i < width; ++i) sums[i] = sums[i] * keep + more[i] * add;
    whole.total[row] = whole.total[row] * keep + part.total[row] * add;
    whole.top[row] = top;
}

// The ranges of positions that some query sees, as rows; what lies between them is never touched.
std::vector<AttendRange> seen_ranges(const AttendJob& job) {
    const int64_t last = job.query_start + job.n - 1;
    int64_t end = job.causal ? last + 1 - job.first_position : std::numeric_limits<int64_t>::max();
    if (job.behind) end = std::min(end, last + 1 - job.behind - job.first_position);
    const int64_t floor = job.within ? job.query_start + 1 - job.within - job.first_position : 0;
    const int64_t begin = job.window ? job.query_start - job.window + 1 - job.first_position : 0;
    const int64_t sinks = job.sinks - job.first_position;
    std::vector<AttendRange> kept;
    for (int64_t i = 0; i < job.num_ranges; ++i) {
        AttendRange r = job.ranges[i];
        r.start = std::max(r.start, floor);
        const int64_t stop = std::min(r.stop, end);
        if (r.start < begin && sinks > r.start) kept.push_back({r.head, r.head_end, r.start, std::min({stop, sinks, begin})});
        kept.push_back({r.head, r.head_end, std::max(r.start, begin), stop});
    }
    kept.erase(std::remove_if(kept.begin(), kept.end(), [](const AttendRange& r) { return r.start >= r.stop; }), kept.end());
    return kept;
}

// Rows that lie in extents, and how they reach the kernel.
struct Source {
    const AttendExtent* extents;
    int64_t count;
    AttendForms forms;

    // The number of the extent that has a row.
    int64_t of(int64_t row) const {
        int64_t number = count - 1;
        while (extents[number].start > row) --number;
        return number;
    }
    // One past the last row of an extent.
    int64_t stop(int64_t number) const {
        return number + 1 < count ? extents[number + 1].start : std::numeric_limits<int64_t>::max();
    }
};

// The same, each range within one extent.
std::vector<AttendRange> visible(const AttendJob& job, const Source& source) {
    const std::vector<AttendRange> whole = seen_ranges(job);
    if (source.count == 1) return whole;
    std::vector<AttendRange> cut;
    for (AttendRange r : whole)
        while (r.start < r.stop) {
            const int64_t stop = std::min(r.stop, source.stop(source.of(r.start)));
            cut.push_back({r.head, r.head_end, r.start, stop});
            r.start = stop;
        }
    return cut;
}

// Positions of ranges, each head's counted by itself: what parts are measured in.
int64_t work_of(const std::vector<AttendRange>& ranges) {
    int64_t total = 0;
    for (const AttendRange& r : ranges) total += (r.head_end - r.head) * (r.stop - r.start);
    return total;
}

// Part p of ranges that are cut, between tiles, into parts with these shares of the work.
std::vector<AttendRange> part_of(const std::vector<AttendRange>& ranges, int64_t p, const std::vector<double>& shares, int64_t tile) {
    const auto total = static_cast<double>(work_of(ranges));
    const auto parts = static_cast<int64_t>(shares.size()) - 1;
    std::vector<AttendRange> mine;
    int64_t before = 0;  // work in the ranges before
    for (const AttendRange& r : ranges) {
        const int64_t heads = r.head_end - r.head, count = r.stop - r.start;
        // Where part q begins within this range.
        auto bound = [&](int64_t q) {
            if (q == parts) return count;
            const int64_t position = (static_cast<int64_t>(total * shares[q]) - before) / heads;
            return std::max<int64_t>(0, std::min(count, (position + tile / 2) / tile * tile));
        };
        if (bound(p) < bound(p + 1)) mine.push_back({r.head, r.head_end, r.start + bound(p), r.start + bound(p + 1)});
        before += heads * count;
    }
    return mine;
}

// How a job is cut into pieces: by queries, which have rows of their own in a state, and where those are few by positions,
// with a state for each part.
struct Plan {
    int64_t threads, blocks;
    std::vector<double> shares;  // where the parts begin, of the whole work; and 1

    int64_t parts() const { return static_cast<int64_t>(shares.size()) - 1; }
};

// Positions that are worth a part of their own.
constexpr int64_t shortest_part = 256;

// Parts of even work.
std::vector<double> even_shares(int64_t parts) {
    std::vector<double> shares(parts + 1);
    for (int64_t p = 0; p <= parts; ++p) shares[p] = static_cast<double>(p) / static_cast<double>(parts);
    return shares;
}

// Parts that become smaller to the end, each a half of what there is left for a thread: all threads then end within one of
// the smallest parts, and there are few places where a walk over rows begins anew.
std::vector<double> falling_shares(double least, int64_t threads) {
    std::vector<double> shares{0};
    for (double left = 1; left > 0;) {
        left -= std::max(least, left / static_cast<double>(2 * threads));
        if (left < least / 2) left = 0;
        shares.push_back(1 - left);
    }
    return shares;
}

// Query rows of a KV head that are worth a walk over the positions: as many as kernels work on at a time.
constexpr int64_t block_rows = 16;

Plan plan(const AttendJob& job, const std::vector<AttendRange>& ranges, int64_t tile, int64_t threads) {
    int64_t bytes = 0;
    for (const AttendRange& r : ranges)
        bytes += (r.head_end - r.head) * (r.stop - r.start) * (job.dim + job.value_dim + 8);
    const int64_t rows = job.n * job.group();
    threads = std::min(threads, bytes * std::max<int64_t>(1, rows / 4) / thread_bytes);
    if (threads <= 1) return {1, 1, {0, 1}};
    const int64_t pieces = threads * pieces_each;
    const int64_t blocks = std::max<int64_t>(1, std::min({pieces, job.n, rows / block_rows}));
    if (blocks > 1) return {threads, blocks, even_shares((pieces + blocks - 1) / blocks)};
    int64_t heads = 1;
    for (const AttendRange& r : ranges) heads = std::max(heads, r.head_end - r.head);
    const auto least = static_cast<double>(heads * std::max(tile, shortest_part));
    return {threads, 1, falling_shares(least / static_cast<double>(work_of(ranges)), threads)};
}

// A job for queries [begin, end) of another's; the numbers of its rows start at begin * q_heads of the other's.
AttendJob for_queries(const AttendJob& job, int64_t begin, int64_t end) {
    AttendJob some = job;
    some.n = end - begin;
    some.query_start += begin;
    return some;
}

AttendState from_row(AttendState state, int64_t row, int64_t width) {
    return {state.top + row, state.total + row, state.sums + row * width};
}

// None where numbers are their own: what such a codec's pointer points to is not to be read.
const float* scales_of(const CodedRows& rows) {
    return scale_bytes(rows.format.codec) ? reinterpret_cast<const float*>(rows.scales) : nullptr;
}

// Has the kernel walk over a range of one extent, what must be decoded for it a span at a time.
void walk(const AttendJob& job, const AttendKernel& kernel, AttendRange range, int64_t coming, const char* prepared,
          AttendState state, const Source& source, DecodedRows* decoded) {
    const int64_t number = source.of(range.start);
    const AttendExtent& extent = source.extents[number];
    AttendJob here = job;
    here.first_position += extent.start;
    here.key_rows = extent.keys.codes, here.key_scales = scales_of(extent.keys);
    here.value_rows = extent.values.codes, here.value_scales = scales_of(extent.values);
    range.start -= extent.start, range.stop -= extent.start;
    coming = std::min(coming, source.stop(number)) - extent.start;
    if (!decoded) return kernel.walk(here, range, coming, prepared, state);
    decoded->use(here, extent.keys, extent.values);
    int64_t start = range.start;
    if (kernel.walk_stored) start = kernel.walk_stored(here, extent.keys, extent.values, range, coming, prepared, state);
    for (; start < range.stop; start += decoded->span()) {
        const AttendRange span{range.head, range.head_end, start, std::min(range.stop, start + decoded->span())};
        const AttendJob part = decoded->take(span);
        kernel.walk(part, {span.head, span.head_end, 0, span.stop - span.start}, span.stop - span.start, prepared, state);
    }
}

// The same, and hashes the blocks that are read for the first time, part by part while they are in cache. Attention comes first:
// it computes while memory is fetched, and hashing would wait for it.
void walk_and_hash(const AttendJob& job, const AttendKernel& kernel, AttendRange range, int64_t coming, const char* prepared,
                   AttendState state, const Source& source, DecodedRows* decoded) {
    const AttendExtent& extent = source.extents[source.of(range.start)];
    if (!extent.first_read) return walk(job, kernel, range, coming, prepared, state, source, decoded);
    FirstRead& unread = *extent.first_read;
    for (const int64_t step = unread.step(kernel.tile_for(job)); range.start < range.stop; range.start += step) {
        const int64_t stop = std::min(range.stop, range.start + step);
        unread.map(range.start - extent.start, coming - extent.start);
        walk(job, kernel, {range.head, range.head_end, range.start, stop}, coming, prepared, state, source, decoded);
        unread.hash(range.start - extent.start, stop - extent.start, stop < coming);
    }
}

// Walks over ranges, with a state that was not used yet.
void run_part(const AttendJob& job, const AttendKernel& kernel, const Source& source, const std::vector<AttendRange>& ranges,
              const char* prepared, int64_t width, AttendState state) {
    std::unique_ptr<DecodedRows> decoded;
    if (source.forms.any()) {
        int64_t longest = 0;
        for (const AttendRange& r : ranges) longest = std::max(longest, std::min(r.stop - r.start, part_positions));
        decoded = std::make_unique<DecodedRows>(job, source.extents->keys, source.extents->values, kernel.tile, longest);
    }
    for (int64_t row = 0; row < job.rows(); ++row) clear(state, row, width);
    std::unique_ptr<State> part;
    int64_t walked = 0;
    for (const AttendRange& r : ranges) {
        for (int64_t start = r.start; start < r.stop; start += part_positions) {
            const AttendRange piece{r.head, r.head_end, start, std::min(r.stop, start + part_positions)};
            if (walked + (piece.stop - piece.start) <= part_positions) {
                walk_and_hash(job, kernel, piece, r.stop, prepared, state, source, decoded.get());
            } else {
                if (!part) part = std::make_unique<State>(job.rows(), width);
                each_row(job, r.head, r.head_end, [&](int64_t row) { clear(part->view, row, width); });
                walk_and_hash(job, kernel, piece, r.stop, prepared, part->view, source, decoded.get());
                each_row(job, r.head, r.head_end, [&](int64_t row) { merge(state, part->view, row, width); });
            }
            walked += piece.stop - piece.start;
        }
    }
}

void finish(const AttendJob& job, const AttendKernel& kernel, AttendState state, int64_t width) {
    for (int64_t row = 0; row < job.rows(); ++row) {
        const bool seen = state.total[row] > 0;
        const float factor = seen ? 1.0f / (state.total[row] * sums_scale) : 0.0f;
        kernel.finish(state.sums + row * width, job.value_dim, factor, job.out + row * job.value_dim);
        constexpr double log_2 = 0.693147180559945309417;
        job.lse[row] = seen ? static_cast<float>((state.top[row] + std::log2(static_cast<double>(state.total[row]))) * log_2) : nothing;
    }
}

void rotate(int64_t dim, int64_t rows, float* numbers, void (*run)(const Rotation&, int64_t, float*)) {
    std::vector<float> factors(dim);
    rotation_factors(dim, factors.data());
    run({dim, factors.data()}, rows, numbers);
}

}  // namespace

void attend(AttendJob job, const CodedRows& keys, const CodedRows& values, int threads) {
    const AttendExtent whole{0, keys, values};
    attend(job, &whole, 1, threads);
}

void attend(AttendJob job, const AttendExtent* extents, int64_t count, int threads) {
    const CodedRows &keys = extents->keys, &values = extents->values;  // the codecs of all
    const Source source{extents, count, forms_of(keys, values)};
    const AttendKernel& kernel = attend_kernel(numbers_of(keys, values), job.short_queries);
    std::vector<float> rotated;
    if (keys.format.rotated) {
        rotated.assign(job.queries, job.queries + job.rows() * job.dim);
        rotate(job.dim, job.rows(), rotated.data(), codec_kernels().rotate);
        job.queries = rotated.data();
    }
    const int64_t width = kernel.width(job.value_dim), query_bytes = kernel.query_bytes(job.dim);

    constexpr float log2_e = 1.44269504088896341f;
    const float factor = job.softcap > 0 ? job.scale : job.scale * log2_e;
    const Room memory(job.rows() * query_bytes);
    char* prepared = memory.data();
    for (int64_t row = 0; row < job.rows(); ++row)
        kernel.prepare(job.queries + row * job.dim, job.dim, factor, prepared + row * query_bytes);

    const std::vector<AttendRange> ranges = visible(job, source);
    // Many query rows walk over the same positions again and again, in an order of their own.
    if (job.n * job.group() > block_rows)
        for (int64_t i = 0; i < count; ++i)
            if (extents[i].first_read) extents[i].first_read->prepare(threads);
    const int64_t tile = kernel.tile_for(job);
    const Plan cuts = plan(job, ranges, tile, threads);
    const int64_t parts = cuts.parts();
    std::vector<State> states;
    states.reserve(parts);
    for (int64_t p = 0; p < parts; ++p) states.emplace_back(job.rows(), width);
    parallel_pieces(cuts.blocks * parts, static_cast<int>(cuts.threads), [&](int64_t piece) {
        // The last queries, which see most, come first.
        const int64_t block = cuts.blocks - 1 - piece / parts, p = piece % parts;
        const int64_t begin = job.n * block / cuts.blocks, end = job.n * (block + 1) / cuts.blocks;
        const AttendJob mine = for_queries(job, begin, end);
        const std::vector<AttendRange> seen = cuts.blocks == 1 ? ranges : visible(mine, source);
        run_part(mine, kernel, source, part_of(seen, p, cuts.shares, tile), prepared + begin * job.q_heads * query_bytes,
                 width, from_row(states[p].view, begin * job.q_heads, width));
    });
    for (int64_t p = 1; p < parts; ++p)
        for (int64_t row = 0; row < job.rows(); ++row) merge(states[0].view, states[p].view, row, width);
    finish(job, kernel, states[0].view, width);
    if (values.format.rotated) rotate(job.value_dim, job.rows(), job.out, codec_kernels().rotate_back);
}

}  // namespace kvmmap
