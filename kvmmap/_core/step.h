// A decoding step of one layer: a position appended, and attention of one position's queries, without anything of either
// call being made anew. What a layer's calls have in common is kept between them.
#pragma once

#include <cstdint>
#include <vector>

#include "codec_run.h"
#include "recent.h"

namespace kvmmap {

// One layer of a file, as a step needs it.
struct StepLayer {
    RowFormat keys, values;
    int64_t kv_heads, dim, value_dim;
    std::vector<int64_t> offsets;  // of the arrays in the file, in the order of a file's sections
    bool keeps_recent;
    RecentRing ring, first;  // as in RecentView
    int64_t window, sinks;

    // Bytes of a position in each of its arrays.
    std::vector<int64_t> row_bytes() const;
};

// Encodes a position's rows [1, heads, dim] into `scratch`, which has room for them, writes them to the file and keeps them in
// the rings. Returns 0, an errno, or -1 if a row can't be encoded: then nothing was written.
int append_step(const StepLayer& layer, int fd, int64_t position, const RowGrid& keys, const RowGrid& values, char* scratch);

// Attention of one position's queries, the last one's, over `length` positions.
struct StepQuery {
    RowGrid rows;  // [1, heads, dim]
    float scale, softcap;
    int64_t window;  // 0: all
    int threads;
    void* out;  // [heads, value_dim], of the queries' dtype
};

// Returns whether all queries are finite; if not, `out` is as it was.
bool attend_step(const StepLayer& layer, const StepQuery& query, const AttendExtent& extent, int64_t length);

}  // namespace kvmmap
