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
    std::vector<char*> encoded;  // where rows are encoded to, an array each, and how many rows these have
    int64_t encoded_rows;

    // Bytes of a position in each of its arrays.
    std::vector<int64_t> row_bytes() const;
};

// What has become of a position. If either says that something was wrong, it was not kept.
struct Appended {
    int64_t bad;  // -1; the first row of keys that can't be encoded, or -2 less such a row of values: then nothing was written
    int error;    // an errno, or 0
};

// Encodes a position's rows [1, heads, dim] into row `position % encoded_rows` of `encoded`, writes them to the file, and keeps
// them in the rings.
Appended append_step(const StepLayer& layer, int fd, int64_t position, const RowGrid& keys, const RowGrid& values);

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
