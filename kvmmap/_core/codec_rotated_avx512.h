// Rotated rows, encoded and decoded in one walk: batches of 16 rows, whose scales are worked out together.
//
// The two ports for 512 bits limit the speed, so that every operation counts: some 160 a row of 128 numbers for int8, 190 to 210
// for 3 to 6 bits. The scales of a batch wait for a root and a quotient, some hundred cycles in which the processor codes the
// batch before.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "codec_rows.h"
#include "floats_avx512.h"
#include "planes_avx512.h"
#include "rotated_blocks_avx512.h"
#include "rotated_rows_avx512.h"
#include "rotation_avx512.h"
#include "scales_avx512.h"

namespace kvmmap {
namespace {

inline bool walks_avx512(int64_t dim) { return dim <= most_rotated; }

// A batch is rotated before the one that precedes it is coded.
template <class Batch>
int64_t encode_all(Codec codec, const char* x, int64_t stride, int64_t n, const Rotation& rotation, char* codes, char* scales) {
    const int64_t dim = rotation.dim, batch = Batch::batch_of(dim);
    const int64_t code_size = code_bytes(codec, dim), scale_size = scale_bytes(codec);
    Batch batches[2] = {Batch(dim), Batch(dim)};
    const auto rotate = [&](int64_t row, int turn) {
        const int rows = static_cast<int>(std::min(batch, n - row));
        return row + batches[turn].rotate(x + row * stride, stride, rows, rotation.factors);
    };
    int64_t finite = rotate(0, 0);
    int turn = 0;
    for (int64_t row = 0; row < n; row += batch, turn ^= 1) {
        const int64_t next = row + batch;
        if (finite < std::min(next, n)) return finite;
        if (next < n) finite = rotate(next, 1 - turn);
        const int done = batches[turn].code(x + next * stride, stride, codes + row * code_size, scales + row * scale_size);
        if (done < batches[turn].count()) return row + done;
    }
    return n;
}

// Rows of int8 values, to be multiplied by their scales.
template <Dtype D>
void restore(const int8_t* values, const float* scales, int n, const Rotation& rotation, char* out) {
    const int64_t dim = rotation.dim;
    alignas(64) float room[most_rotated];
    const auto source = [&](int row, int64_t i, __mmask16 mask) __attribute__((always_inline)) {
        const __m512i numbers = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, values + row * dim + 16 * i));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), _mm512_set1_ps(scales[row]));
    };
    const auto sink = [&](int row, int64_t first, auto& v, __mmask16 mask) __attribute__((always_inline)) {
        constexpr int R = sizeof v / sizeof v[0];
#pragma GCC unroll 16
        for (int64_t i = 0; i < R; ++i) {
            const __m512 factor = _mm512_maskz_loadu_ps(mask, rotation.factors + 16 * (first + i));
            store<D>(out + (row * dim + 16 * (first + i)) * item_bytes<D>, _mm512_mul_ps(v[i], factor), mask);
        }
    };
    transform_rows(dim, n, room, source, sink);
}

template <int bits, Dtype D>
void decode_all(const char* codes, const char* scales, int64_t n, const Rotation& rotation, char* out) {
    const int64_t dim = rotation.dim, batch = std::clamp<int64_t>(batch_numbers / dim, 1, rows_at_once);
    alignas(64) int8_t levels[bits == 8 ? 64 : batch_numbers];
    alignas(64) float wide[rows_at_once];
    for (int64_t row = 0; row < n; row += batch) {
        const int rows = static_cast<int>(std::min(batch, n - row));
        const char* in = codes + row * (dim * bits / 8);
        char* to = out + row * dim * item_bytes<D>;
        if constexpr (bits == 8) {
            restore<D>(reinterpret_cast<const int8_t*>(in), reinterpret_cast<const float*>(scales) + row, rows, rotation, to);
        } else {
            take_rows<bits>(in, rows, dim, levels);
            const __m256i halves = _mm256_maskz_loadu_epi16(first16(rows), scales + 2 * row);
            _mm512_store_ps(wide, _mm512_cvtph_ps(halves));
            restore<D>(levels, wide, rows, rotation, to);
        }
    }
}

// body(bits, D) as constants.
template <class Body>
inline auto of_kind(Codec codec, Dtype dtype, Body&& body) {
    const auto of_dtype = [&](auto bits) {
        if (dtype == Dtype::f16) return body(bits, std::integral_constant<Dtype, Dtype::f16>{});
        if (dtype == Dtype::bf16) return body(bits, std::integral_constant<Dtype, Dtype::bf16>{});
        return body(bits, std::integral_constant<Dtype, Dtype::f32>{});
    };
    switch (codec) {
        case Codec::int3: return of_dtype(std::integral_constant<int, 3>{});
        case Codec::int4: return of_dtype(std::integral_constant<int, 4>{});
        case Codec::int5: return of_dtype(std::integral_constant<int, 5>{});
        case Codec::int6: return of_dtype(std::integral_constant<int, 6>{});
        default: return of_dtype(std::integral_constant<int, 8>{});
    }
}

inline int64_t encode_rotated(Codec codec, Dtype dtype, const char* x, int64_t stride, int64_t n, const Rotation& rotation,
                              char* codes, char* scales) {
    return of_kind(codec, dtype, [&](auto bits, auto of) {
        constexpr Dtype D = of();
        switch (rotation.dim) {
            case 64: return encode_all<RotatedRows<bits(), 4, D>>(codec, x, stride, n, rotation, codes, scales);
            case 128: return encode_all<RotatedRows<bits(), 8, D>>(codec, x, stride, n, rotation, codes, scales);
            case 256: return encode_all<RotatedRows<bits(), 16, D>>(codec, x, stride, n, rotation, codes, scales);
            default: return encode_all<RotatedBlocks<bits(), D>>(codec, x, stride, n, rotation, codes, scales);
        }
    });
}

inline void decode_rotated(Codec codec, const char* codes, const char* scales, int64_t n, const Rotation& rotation, Dtype dtype,
                           char* out) {
    of_kind(codec, dtype, [&](auto bits, auto of) { decode_all<bits(), of()>(codes, scales, n, rotation, out); });
}

}  // namespace
}  // namespace kvmmap
