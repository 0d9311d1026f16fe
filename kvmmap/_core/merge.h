// Attention over disjoint sets of keys, put together by the logarithms of its softmax denominators:
//
//   lse = log(sum_i e^lse_i),   out = sum_i e^(lse_i - lse) * out_i        (Flash-Decoding; Dao et al. 2023)
//
// part by part, in as much memory for any number of them. In f64: the parts were rounded once already.
#pragma once

#include <cstdint>

namespace kvmmap {

// What a row of the state holds before its `width` sums: of the parts so far, the largest lse (-inf before the first),
// and the sum of e^(lse - that). The sums are those of e^(lse - that) * out.
constexpr int64_t merge_head = 2;

// Takes in a part: out [rows, width], and lse [rows], -inf where it saw nothing.
void merge_part(double* state, const float* out, const float* lse, int64_t rows, int64_t width);

// Gives out [rows, width] and lse [rows] over all parts; zeros and -inf where none saw anything.
void merge_end(const double* state, float* out, float* lse, int64_t rows, int64_t width);

}  // namespace kvmmap
