// The row codecs: how a row of numbers becomes bytes and comes back. docs/format.md specifies each, byte by byte.
//
//   int8                one f32 scale a row (rows.h)
//   int3 int4 int5 int6 levels of a table of int8 values, one f16 scale a row
//   bf16 f16            the numbers themselves
//   e4m3 e5m2           8-bit floats; e4m3_row and e5m2_row with one f32 scale a row
//
// Every kernel gives the same bytes: all float operations are IEEE f32 ones in a fixed order, none of them contracted.
#pragma once

#include <cstdint>

#include "rows.h"

namespace kvmmap {

// As in the superblock.
enum class Codec : int {
    int8 = 1, bf16 = 2, f16 = 3, e4m3 = 4, e5m2 = 5, e4m3_row = 6, e5m2_row = 7, int3 = 8, int4 = 9, int5 = 10, int6 = 11
};

struct RowFormat {
    Codec codec;
    bool rotated;  // the superblock's transform 1

    bool plain_int8() const { return codec == Codec::int8 && !rotated; }
    bool takes(int64_t dim) const;
};

constexpr bool has_levels(Codec c) { return c >= Codec::int3; }
constexpr bool is_integer(Codec c) { return c == Codec::int8 || has_levels(c); }
constexpr int level_bits(Codec c) { return static_cast<int>(c) - static_cast<int>(Codec::int3) + 3; }

// Numbers in a row of levels, at most; a multiple of 8.
constexpr int64_t most_levels = 4096;

// Numbers behind the last row that `CodecKernels::encode` may read, whatever they are.
constexpr int64_t readable_behind = 8;

// Bytes of a row's codes, and of its scale.
constexpr int64_t code_bytes(Codec c, int64_t dim) {
    return has_levels(c) ? dim / 8 * level_bits(c) : c == Codec::bf16 || c == Codec::f16 ? 2 * dim : dim;
}
constexpr int64_t scale_bytes(Codec c) {
    return has_levels(c) ? 2 : c == Codec::int8 || c == Codec::e4m3_row || c == Codec::e5m2_row ? 4 : 0;
}

// The rotation of rows of `dim` numbers: each times its factor, a sign and the normalisation, then a Hadamard transform of
// each block. Blocks are powers of two, the largest first, as the binary digits of `dim` say.
struct Rotation {
    int64_t dim;
    const float* factors;
};

// Writes the factors of the first `dim` numbers.
void rotation_factors(int64_t dim, float* factors);

// What an instruction set brings. Rows of f32 lie side by side.
struct CodecKernels {
    // n rows in their dtype, `stride` bytes apart -> f32.
    void (*widen[dtype_count])(const char* x, int64_t stride, int64_t n, int64_t dim, float* out);
    void (*narrow[dtype_count])(const float* x, int64_t count, char* out);
    // As narrow; false if a number becomes infinite.
    bool (*within_f16)(const float* x, int64_t count, uint16_t* out);
    bool (*within_bf16)(const float* x, int64_t count, uint16_t* out);
    void (*rotate)(const Rotation& rotation, int64_t n, float* rows);
    void (*rotate_back)(const Rotation& rotation, int64_t n, float* rows);
    // f32, with `readable_behind` more, -> codes and scales; returns the first row that the codec cannot hold, or n. Not for
    // int8, nor for levels where `encode_rotated` takes them at any length.
    int64_t (*encode)(Codec codec, const float* x, int64_t n, int64_t dim, char* codes, char* scales);
    void (*decode)(Codec codec, const char* codes, const char* scales, int64_t n, int64_t dim, float* out);
    // Codes of levels -> the int8 values of the table, and their scales as f32.
    void (*levels)(Codec codec, const char* codes, int64_t n, int64_t dim, int8_t* out);
    void (*level_scales)(const char* scales, int64_t n, float* out);
    // Rotated rows of some lengths in one walk, from their dtype to codes and back: null where there is no such walk. The
    // same bytes as the steps above one by one.
    bool (*walks)(int64_t dim);
    int64_t (*encode_rotated)(Codec codec, Dtype dtype, const char* x, int64_t stride, int64_t n, const Rotation& rotation,
                              char* codes, char* scales);
    void (*decode_rotated)(Codec codec, const char* codes, const char* scales, int64_t n, const Rotation& rotation, Dtype dtype,
                           char* out);
};

extern const CodecKernels codec_portable;
#if defined(__x86_64__)
extern const CodecKernels codec_avx2;
extern const CodecKernels codec_avx512;
#elif defined(__aarch64__)
extern const CodecKernels codec_neon;
#endif

const CodecKernels& codec_kernels();  // of current_isa()

}  // namespace kvmmap
