// Attention with AVX-512 and its dot product of bytes: tiles of 64 positions where a mask, an odd shape or the end of the
// rows asks for them, and else 16 streams side by side.
#include "attend_floats.h"
#include "attend_streams_avx512.h"

namespace kvmmap {
namespace {

using Rows = CodedRows;

// Walks over as much of a range as makes whole spans that every query sees; returns where it ends.
template <class Keys, class Values>
int64_t walk_streams(const AttendJob& job, const Rows& keys, const Rows& values, const AttendRange& range, int64_t coming,
                     const char* prepared, AttendState state) {
    constexpr int64_t span = StreamsShape::span;
    int64_t start = range.start;
    if (!StreamsShape::suit(job, range) || start + span > range.stop) return start;
    Streams<Keys, Values> streams(job, keys, values, prepared, state);
    for (; start + span <= range.stop && streams.see_all(start); start += span) streams.run(start, start + 2 * span <= coming);
    return start;
}

void walk_streams_and_tiles(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared,
                            AttendState state) {
    const RowFormat int8{Codec::int8, false};
    const Rows keys{int8, static_cast<const char*>(job.key_rows), reinterpret_cast<const char*>(job.key_scales)};
    const Rows values{int8, static_cast<const char*>(job.value_rows), reinterpret_cast<const char*>(job.value_scales)};
    AttendRange rest = range;
    rest.start = walk_streams<Int8Rows, Int8Rows>(job, keys, values, range, coming, prepared, state);
    if (rest.start < rest.stop) walk<Bytes>(job, rest, coming, prepared, state);
}

using WalkStreams = int64_t (*)(const AttendJob&, const Rows&, const Rows&, const AttendRange&, int64_t, const char*, AttendState);

template <class Keys>
WalkStreams by_values(Codec values, int64_t dim) {
    const bool narrow = LevelRows<4, true>::suit(dim);
    if (values == Codec::int8) return walk_streams<Keys, Int8Rows>;
    if (!narrow && !LevelRows<4, false>::suit(dim)) return nullptr;
    if (values == Codec::int4) return narrow ? walk_streams<Keys, LevelRows<4, true>> : walk_streams<Keys, LevelRows<4, false>>;
    if (values == Codec::int5) return narrow ? walk_streams<Keys, LevelRows<5, true>> : walk_streams<Keys, LevelRows<5, false>>;
    return nullptr;
}

WalkStreams by_pair(Codec keys, int64_t dim, Codec values, int64_t value_dim) {
    const bool narrow = LevelRows<4, true>::suit(dim);
    if (keys == Codec::int8) return by_values<Int8Rows>(values, value_dim);
    if (!narrow && !LevelRows<4, false>::suit(dim)) return nullptr;
    if (keys == Codec::int4)
        return narrow ? by_values<LevelRows<4, true>>(values, value_dim) : by_values<LevelRows<4, false>>(values, value_dim);
    if (keys == Codec::int5)
        return narrow ? by_values<LevelRows<5, true>>(values, value_dim) : by_values<LevelRows<5, false>>(values, value_dim);
    return nullptr;
}

int64_t walk_stored(const AttendJob& job, const Rows& keys, const Rows& values, const AttendRange& range, int64_t coming,
                    const char* prepared, AttendState state) {
    const WalkStreams run = by_pair(keys.format.codec, job.dim, values.format.codec, job.value_dim);
    return run ? run(job, keys, values, range, coming, prepared, state) : range.start;
}

}  // namespace

const AttendKernel attend_avx512 = {StreamsShape::span, Bytes::width, Bytes::finish,
                                    Bytes::query_bytes, store_query,  walk_streams_and_tiles,
                                    walk_stored};
const AttendKernel attend_floats_avx512 = kernel_of<Floats<16, float>>();
const AttendKernel attend_f16_avx512 = kernel_of<Floats<16, F16>>();
const AttendKernel attend_bf16_avx512 = kernel_of<Floats<16, Bf16>>();

}  // namespace kvmmap
