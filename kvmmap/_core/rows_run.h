// The codec over whole arrays: strides in, threads shared out. What bindings.cpp calls.
#pragma once

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "rows.h"

namespace kvmmap {

// outer x inner rows of dim numbers, as a [position, head, head_dim] tensor has them; strides in bytes.
struct RowGrid {
    const void* data;
    int64_t outer, inner, dim;
    int64_t outer_stride, inner_stride;
    Dtype dtype;
};

// Codes and scales come out in C order. Returns -1, or the first row (C order) that is not finite.
int64_t quantize_grid(const RowGrid& x, int8_t* codes, float* scales, int threads);

void dequantize_grid(const int8_t* codes, const float* scales, int64_t rows, int64_t dim, Dtype dtype, void* out,
                     int threads);

// A thread earns its start-up with a mebibyte of work (about 50 us at memory speed).
inline int worth_threads(int64_t bytes, int threads) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, bytes >> 20)));
}

inline void lower_to(std::atomic<int64_t>& value, int64_t candidate) {
    int64_t seen = value.load();
    while (candidate < seen && !value.compare_exchange_weak(seen, candidate)) {
    }
}

}  // namespace kvmmap
