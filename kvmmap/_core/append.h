// Rows on their way into a layer: keys and values encoded, and kept in 16 bits besides, in one call.
#pragma once

#include "codec_run.h"
#include "recent.h"

namespace kvmmap {

// Where rows of one side go, by which codec.
struct EncodedRows {
    RowFormat format;
    char* codes;
    char* scales;
};

// Encodes as many positions of keys and of values; then keeps them from `start` on in the rings, if there are some. Returns -1,
// or the first row of keys that cannot be encoded, or -2 less the first such row of values: then nothing is kept.
int64_t append_rows(const RowGrid& keys, const EncodedRows& to_keys, const RowGrid& values, const EncodedRows& to_values,
                    const RecentRings* rings, int64_t start);

}  // namespace kvmmap
