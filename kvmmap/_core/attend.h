// Attention over coded rows where they lie: softmax(q k^T) v for keys and values of int8 codes with one scale a row.
//
//   s_j   = scale * key_scale_j * (q . key_codes_j)              cap * tanh(s_j / cap) where there is a cap
//   out   = sum_j e^(s_j - lse) * value_scale_j * value_codes_j,   lse = log(sum_j e^s_j)
//
// Other codecs reach the same kernels by way of attend_decode.h. Where keys are rotated, so are the queries, once, which leaves
// products as they are; where values are, what comes out is rotated back, once.
//
// over the positions j that a query sees. Online softmax in one pass (Milakov & Gimelshein, arXiv:1805.02867), in tiles of
// 64 or more positions (as FlashAttention, arXiv:2205.14135, cuts them), with the positions shared out over threads and
// the partial results merged by their lse (split-K; Flash-Decoding).
#pragma once

#include <cstdint>

#include "codec.h"

namespace kvmmap {

// Heads [head, head_end) attend over rows [start, stop).
struct AttendRange {
    int64_t head, head_end, start, stop;
};

// Keys or values as they are stored: [rows, kv_heads] of codes, and of scales where the codec has some.
struct CodedRows {
    RowFormat format;
    const char* codes;
    const char* scales;
};

struct AttendJob {
    const float* queries;  // [n, q_heads, dim], finite
    int64_t n, q_heads, kv_heads, dim, value_dim;

    // Set by attend(), for a kernel: int8 codes or floats, whichever it takes.
    const void* key_rows;       // [rows, kv_heads, dim]
    const float* key_scales;    // [rows, kv_heads]; none where numbers are their own
    const void* value_rows;     // [rows, kv_heads, value_dim]
    const float* value_scales;  // [rows, kv_heads]

    int64_t first_position;  // of row 0

    float scale;
    float softcap;  // 0: none

    // Queries were given in 16 bits, and products may lose less than that has lost, where a kernel is faster then.
    bool short_queries;

    // Query i stands at query_start + i, and sees a position that is at most its own if causal, and that is within its
    // window or below sinks.
    int64_t query_start;
    bool causal;
    int64_t window;  // positions, its own included; 0: no limit
    int64_t sinks;

    // Whatever the above says: positions, its own included, of which a query sees none but these, and none of these; 0: no
    // limit. Later positions belong to them.
    int64_t within, behind;

    const AttendRange* ranges;
    int64_t num_ranges;

    float* out;  // [n, q_heads, value_dim]
    float* lse;  // [n, q_heads], natural logarithm; -inf, and zeros in out, where a query head sees nothing

    // Rows of query head h of query i are numbered i * q_heads + h.
    int64_t rows() const { return n * q_heads; }
    int64_t group() const { return q_heads / kv_heads; }
};

void attend(AttendJob job, const CodedRows& keys, const CodedRows& values, int threads);

class FirstRead;

// Rows of consecutive positions that lie apart from others of the same codecs: row 0 of these is row `start` of the job.
struct AttendExtent {
    int64_t start;
    CodedRows keys, values;
    FirstRead* first_read = nullptr;  // hashes blocks of these rows that were not read before; what is not walked is left to finish()
};

// The same over extents in ascending order of start, the first of which starts at 0: each has the rows up to the next one's.
void attend(AttendJob job, const AttendExtent* extents, int64_t count, int threads);

// Sums are kept times this, so that no sum of 2^24 values overflows whose average does not.
constexpr float sums_scale = 0x1p-24f;

// Running sums of every query row over the positions seen so far; what a thread works on, and hands over to be merged.
struct AttendState {
    float* top;    // [rows] largest score so far, in units of log 2; -inf before the first
    float* total;  // [rows] sum of 2^(score - top)
    float* sums;   // [rows, width] sum of 2^(score - top) * value, numbers in the kernel's own order
};

// What an instruction set brings.
struct AttendKernel {
    // Positions it works on at a time; work is cut between those.
    int64_t tile;
    // Floats of a row of sums: value_dim, rounded up to what the kernel works in.
    int64_t (*width)(int64_t value_dim);
    // out[value_dim] = factor * a row of sums, its numbers put in order.
    void (*finish)(const float* sums, int64_t value_dim, float factor, float* out);
    // Queries as the kernel wants them: bytes a row, and how to make one (times `factor`).
    int64_t (*query_bytes)(int64_t dim);
    void (*prepare)(const float* query, int64_t dim, float factor, void* prepared);
    // Adds what `range` holds to the state. `prepared` has all rows of queries. What lies before row `coming` will be
    // walked next, and may be fetched.
    void (*walk)(const AttendJob& job, const AttendRange& range, int64_t coming, const char* prepared, AttendState state);
    // The same for rows as they are stored, as far as the kernel can read them from the start of the range on; returns where
    // it ended. Null where it can't read any but those of walk.
    int64_t (*walk_stored)(const AttendJob& job, const CodedRows& keys, const CodedRows& values, const AttendRange& range,
                           int64_t coming, const char* prepared, AttendState state);
    // Positions that it works on at a time for a job, where that differs from `tile`; else null.
    int64_t (*tile_of)(const AttendJob& job) = nullptr;

    int64_t tile_for(const AttendJob& job) const { return tile_of ? tile_of(job) : tile; }
};

// Over int8 codes, over f32 numbers, and over numbers of 16 bits as they are stored.
extern const AttendKernel attend_portable, attend_floats_portable, attend_f16_portable, attend_bf16_portable;
#if defined(__x86_64__)
extern const AttendKernel attend_avx2, attend_short_avx2, attend_floats_avx2, attend_f16_avx2, attend_bf16_avx2;
extern const AttendKernel attend_avx512, attend_short_avx512, attend_floats_avx512, attend_f16_avx512, attend_bf16_avx512;
extern const AttendKernel attend_amx, attend_short_amx;  // where the compiler knows the instructions: KVMMAP_AMX
#elif defined(__aarch64__)
extern const AttendKernel attend_neon, attend_floats_neon, attend_f16_neon, attend_bf16_neon;
extern const AttendKernel attend_dotprod, attend_short_dotprod, attend_short_i8mm;  // KVMMAP_BYTE_PRODUCTS
#endif

}  // namespace kvmmap
