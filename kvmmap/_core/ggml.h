// Rows as llama.cpp keeps them in a KV cache: numbers, or ggml's blocks of 32 numbers with an f16 scale (and, in the types
// that end with _1, an f16 minimum). docs/format.md specifies the blocks, and the two transforms:
//
//   rotated      normalised Hadamard transforms of consecutive groups of numbers, without signs
//   interleaved  number 2i of a stored row is number i of the row, and 2i+1 is i + dim/2: the order of RoPE's pairs in GGUF
#pragma once

#include <cstdint>

#include "rows_run.h"

namespace kvmmap {

// ggml's numbers of the types.
enum class Ggml : int { f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, bf16 = 30 };

struct GgmlFormat {
    Ggml type;
    int64_t group;  // numbers that are rotated together, a power of two; 0 for none
    bool interleaved;
};

constexpr int64_t ggml_block = 32;

bool ggml_known(int type);
bool ggml_takes(GgmlFormat format, int64_t dim);
int64_t ggml_row_bytes(Ggml type, int64_t dim);

// Rows side by side -> rows in their dtype, and back. `encode_ggml` returns the first row with a number that the type can't
// hold, or -1.
void decode_ggml(GgmlFormat format, const char* in, int64_t rows, int64_t dim, Dtype dtype, char* out, int threads);
int64_t encode_ggml(GgmlFormat format, const RowGrid& x, char* out, int threads);

// How many numbers, or of blocks how many scales and minimums, are a NaN or an infinity.
int64_t special_numbers(Ggml type, const char* in, int64_t size);

}  // namespace kvmmap
