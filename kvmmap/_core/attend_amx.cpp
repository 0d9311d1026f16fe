// Attention with AMX where there are enough rows of queries, and as with AVX-512 elsewhere.
#include "attend_chunks_amx.h"
#include "attend_few_amx.h"
#include "attend_few_streams_amx.h"
#include "attend_streams_amx.h"
#include "attend_tiles_amx.h"

namespace kvmmap {
namespace {

template <int digits>
bool suits(const AttendJob& job) {
    return digits == 2 ? AmxFew::suit(job) || AmxChunks::suit(job) : AmxWalk::suit(job);
}

// Walks over a range, or whole tiles of 64 positions of it; returns where it ends.
template <int digits>
int64_t walk_tiles(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                   int64_t coming, const char* prepared, AttendState state) {
    Packing key_packing, value_packing;
    if (!suits<digits>(job) || !find_packing(keys.format.codec, job.dim, key_packing) ||
        !find_packing(values.format.codec, job.value_dim, value_packing))
        return range.start;
    if constexpr (digits == 2) {
        if (AmxChunks::suit(job)) AmxChunks(job, keys, key_packing, values, value_packing, prepared, state).run(range);
        else AmxFew(job, keys, key_packing, values, value_packing, prepared, state).run(range, coming);
        return range.stop;
    } else {
        return AmxWalk(job, keys, key_packing, values, value_packing, prepared, state).run(range, coming);
    }
}

// Walks over whole spans of a range; returns where it ends.
template <int digits>
int64_t walk_three_or_four(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                           int64_t coming, const char* prepared, AttendState state) {
    if constexpr (digits == 2) return walk_few_amx<2>(job, keys, values, range, coming, prepared, state);
    else return walk_amx_streams(job, keys, values, range, coming, prepared, state);
}

template <int digits>
const AttendKernel& avx512() {
    return digits == 2 ? attend_short_avx512 : attend_avx512;
}

template <int digits>
void walk_codes(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared, AttendState state) {
    const RowFormat int8{Codec::int8, false};
    const CodedRows keys{int8, static_cast<const char*>(job.key_rows), reinterpret_cast<const char*>(job.key_scales)};
    const CodedRows values{int8, static_cast<const char*>(job.value_rows), reinterpret_cast<const char*>(job.value_scales)};
    AttendRange rest = range;
    if (StreamsShape::few(job)) rest.start = walk_few_amx<digits>(job, keys, values, range, coming, prepared, state);
    else if (three_or_four(job)) rest.start = walk_three_or_four<digits>(job, keys, values, range, coming, prepared, state);
    else rest.start = walk_tiles<digits>(job, keys, values, range, coming, prepared, state);
    if (rest.start < rest.stop) avx512<digits>().walk(job, rest, coming, prepared, state);
}

template <int digits>
int64_t walk_stored(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                    int64_t coming, const char* prepared, AttendState state) {
    if (StreamsShape::few(job)) return walk_few_amx<digits>(job, keys, values, range, coming, prepared, state);
    if (!suits<digits>(job)) {
        AttendRange rest = range;
        if (three_or_four(job)) rest.start = walk_three_or_four<digits>(job, keys, values, range, coming, prepared, state);
        return rest.start < rest.stop ? avx512<digits>().walk_stored(job, keys, values, rest, coming, prepared, state) : rest.start;
    }
    return walk_tiles<digits>(job, keys, values, range, coming, prepared, state);
}

template <int digits>
int64_t tile_of(const AttendJob& job) {
    return suits<digits>(job) ? amx_span : avx512<digits>().tile;
}

template <int digits>
constexpr AttendKernel amx_kernel() {
    using Engine = Bytes<digits>;
    return {amx_span, Engine::width, Engine::finish, Engine::query_bytes, store_query<digits>, walk_codes<digits>,
            walk_stored<digits>, tile_of<digits>};
}

}  // namespace

const AttendKernel attend_amx = amx_kernel<3>();
const AttendKernel attend_short_amx = amx_kernel<2>();

}  // namespace kvmmap
