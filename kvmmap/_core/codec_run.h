// The codecs over whole arrays: strides in, threads shared out. What bindings.cpp calls.
#pragma once

#include "codec.h"
#include "rows_run.h"

namespace kvmmap {

// Codes and scales come out in C order. Returns -1, or the first row (C order) that holds a NaN, an infinity or a number
// that is beyond the codec's range.
int64_t encode_grid(RowFormat format, const RowGrid& x, char* codes, char* scales, int threads);

void decode_grid(RowFormat format, const char* codes, const char* scales, int64_t rows, int64_t dim, Dtype dtype, char* out,
                 int threads);

}  // namespace kvmmap
