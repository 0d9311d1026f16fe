// Attention with AVX-512 and its dot product of bytes, by the number of digits of queries and weights: tiles of 64 positions
// where a mask, an odd shape or the end of the rows asks for them, and else 16 streams side by side.
#pragma once

#include "attend_few_streams_avx512.h"
#include "attend_streams_avx512.h"

namespace kvmmap {
namespace {

using Rows = CodedRows;

// Walks over as much of a range as every query sees; returns where it ends.
template <int digits, class Keys, class Values>
int64_t walk_streams(const AttendJob& job, const Rows& keys, const Rows& values, const AttendRange& range, int64_t coming,
                     const char* prepared, AttendState state) {
    if (!StreamsShape::suit(job, range) || !StreamsShape::begins(job, range, least_rows<Keys, Values>(job))) return range.start;
    return Streams<digits, Keys, Values>(job, keys, values, prepared, state).walk(range, coming);
}

template <int digits>
void walk_streams_and_tiles(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared,
                            AttendState state) {
    const RowFormat int8{Codec::int8, false};
    const Rows keys{int8, static_cast<const char*>(job.key_rows), reinterpret_cast<const char*>(job.key_scales)};
    const Rows values{int8, static_cast<const char*>(job.value_rows), reinterpret_cast<const char*>(job.value_scales)};
    AttendRange rest = range;
    if (StreamsShape::few(job)) rest.start = walk_few<digits, FewStreams<digits>, false>(job, keys, values, range, coming, prepared, state);
    else rest.start = walk_streams<digits, Int8Rows, Int8Rows>(job, keys, values, range, coming, prepared, state);
    if (rest.start < rest.stop) walk<Bytes<digits>>(job, rest, coming, prepared, state);
}

using WalkStreams = int64_t (*)(const AttendJob&, const Rows&, const Rows&, const AttendRange&, int64_t, const char*, AttendState);

template <int digits, class Keys>
WalkStreams by_values(Codec values, int64_t dim) {
    const bool narrow = LevelRows<4, true>::suit(dim);
    if (values == Codec::int8) return walk_streams<digits, Keys, Int8Rows>;
    if (!narrow && !LevelRows<4, false>::suit(dim)) return nullptr;
    if (values == Codec::int4) return narrow ? walk_streams<digits, Keys, LevelRows<4, true>> : walk_streams<digits, Keys, LevelRows<4, false>>;
    if (values == Codec::int5) return narrow ? walk_streams<digits, Keys, LevelRows<5, true>> : walk_streams<digits, Keys, LevelRows<5, false>>;
    return nullptr;
}

// 6 bits are attended in place beside 6 bits and as values of int8 keys, and 3 bits beside 3: others are decoded first, as
// each pair more takes its time to compile.
template <int digits, int bits>
WalkStreams alike(int64_t dim, int64_t value_dim) {
    using Narrow = LevelRows<bits, true>;
    using Wide = LevelRows<bits, false>;
    if (Narrow::suit(dim) && Narrow::suit(value_dim)) return walk_streams<digits, Narrow, Narrow>;
    if (Wide::suit(dim) && Wide::suit(value_dim)) return walk_streams<digits, Wide, Wide>;
    return nullptr;
}

template <int digits>
WalkStreams with_six_bits(int64_t value_dim) {
    if (LevelRows<6, true>::suit(value_dim)) return walk_streams<digits, Int8Rows, LevelRows<6, true>>;
    return LevelRows<6, false>::suit(value_dim) ? walk_streams<digits, Int8Rows, LevelRows<6, false>> : nullptr;
}

template <int digits>
WalkStreams by_pair(Codec keys, int64_t dim, Codec values, int64_t value_dim) {
    const bool narrow = LevelRows<4, true>::suit(dim);
    if (keys == Codec::int6 && values == Codec::int6) return alike<digits, 6>(dim, value_dim);
    if (keys == Codec::int3 && values == Codec::int3) return alike<digits, 3>(dim, value_dim);
    if (keys == Codec::int8 && values == Codec::int6) return with_six_bits<digits>(value_dim);
    if (keys == Codec::int8) return by_values<digits, Int8Rows>(values, value_dim);
    if (!narrow && !LevelRows<4, false>::suit(dim)) return nullptr;
    if (keys == Codec::int4)
        return narrow ? by_values<digits, LevelRows<4, true>>(values, value_dim) : by_values<digits, LevelRows<4, false>>(values, value_dim);
    if (keys == Codec::int5)
        return narrow ? by_values<digits, LevelRows<5, true>>(values, value_dim) : by_values<digits, LevelRows<5, false>>(values, value_dim);
    return nullptr;
}

template <int digits>
int64_t walk_stored(const AttendJob& job, const Rows& keys, const Rows& values, const AttendRange& range, int64_t coming,
                    const char* prepared, AttendState state) {
    if (StreamsShape::few(job)) return walk_few<digits, FewStreams<digits>, false>(job, keys, values, range, coming, prepared, state);
    const WalkStreams run = by_pair<digits>(keys.format.codec, job.dim, values.format.codec, job.value_dim);
    return run ? run(job, keys, values, range, coming, prepared, state) : range.start;
}

template <int digits>
constexpr AttendKernel bytes_kernel() {
    using Engine = Bytes<digits>;
    return {StreamsShape::span, Engine::width, Engine::finish, Engine::query_bytes, store_query<digits>,
            walk_streams_and_tiles<digits>, walk_stored<digits>};
}

}  // namespace
}  // namespace kvmmap
