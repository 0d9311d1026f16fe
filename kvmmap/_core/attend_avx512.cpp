// Attention with AVX-512 and its dot product of bytes: tiles of 64 positions where a mask, an odd shape or the end of the
// rows asks for them, and else 16 streams side by side.
#include "attend_streams_avx512.h"

namespace kvmmap {
namespace {

void walk_streams_and_tiles(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared,
                            AttendState state) {
    AttendRange rest = range;
    if (Streams::suit(job, range) && rest.start + Streams::span <= rest.stop) {
        Streams streams(job, prepared, state);
        for (; rest.start + Streams::span <= rest.stop && streams.see_all(rest.start); rest.start += Streams::span)
            streams.run(rest.start, rest.start + 2 * Streams::span <= coming);
    }
    if (rest.start < rest.stop) walk<Bytes>(job, rest, coming, prepared, state);
}

}  // namespace

const AttendKernel attend_avx512 = {Streams::span,      Bytes::width, Bytes::finish,
                                    Bytes::query_bytes, store_query,  walk_streams_and_tiles};

}  // namespace kvmmap
