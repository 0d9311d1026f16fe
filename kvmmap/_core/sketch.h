// Sketches: for a block of positions, the least and the greatest of each channel of a head's dequantised keys, and the
// bound on q . k that follows from them (Quest; Tang et al. 2024, arXiv:2406.10774, section 3.2):
//
//   q . k <= sum_d max(q_d * min_d, q_d * max_d)     for every key k of the block
//
// Both are bf16, rounded outward, so that the bound still holds. Every kernel gives the same sketches.
#pragma once

#include <cstdint>

namespace kvmmap {

// codes int8 [blocks * tokens, heads, dim], scales f32 [blocks * tokens, heads] -> bf16 bits [blocks, heads, 2, dim];
// `room` has 2 * heads * dim floats to work in.
using SketchBlocks = void (*)(const int8_t* codes, const float* scales, int64_t blocks, int64_t tokens, int64_t heads,
                              int64_t dim, float* room, uint16_t* sketches);

// queries' parts f32 [heads * group, 2, dim], sketches [blocks, heads, 2, dim] -> f32 [heads * group, blocks]: the
// negative parts of a query meet the least keys and the positive ones the greatest, which makes the sum of maxima above.
using BoundBlocks = void (*)(const float* parts, int64_t group, const uint16_t* sketches, int64_t blocks,
                             int64_t heads, int64_t dim, float* bounds);

struct SketchKernels {
    SketchBlocks sketch;
    BoundBlocks bound;
};

extern const SketchKernels sketch_portable;
#if defined(__x86_64__)
extern const SketchKernels sketch_avx2;
extern const SketchKernels sketch_avx512;
#endif

const SketchKernels& sketch_kernels();  // of current_isa()

}  // namespace kvmmap
