// Keys and values in the order in which AMX multiplies them: a tile's second operand has four neighbouring bytes of a column in a
// lane, as vpdpbusd wants them. Shared by the walks over few rows of queries and over many.
#pragma once

#include "attend_bytes_avx512.h"

namespace kvmmap {
namespace {

constexpr int64_t tile_rows = 16, tile_bytes = 1024;

// Rows that lie apart and come next, to be fetched a few lines at a time.
class RowsAhead {
  public:
    RowsAhead(const char* rows, int64_t stride, int64_t row_bytes, int64_t count)
        : row_(rows), end_(rows + count * stride), stride_(stride), row_bytes_(row_bytes) {}

    [[gnu::always_inline]] void fetch(int lines) {
        for (int i = 0; i < lines && row_ < end_; ++i) {
            __builtin_prefetch(row_ + at_, 0, 3);
            at_ += 64;
            if (at_ >= row_bytes_) at_ = 0, row_ += stride_;
        }
    }

  private:
    const char *row_, *end_;
    int64_t stride_, row_bytes_, at_ = 0;
};

// How rows of a codec are put in order; rows of 64 numbers each, `stride` bytes apart, `count` of them.
struct Packing {
    int64_t row_bytes;
    // [16 positions][64 numbers] -> [four numbers][position], tile by tile.
    void (*keys)(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out, Ahead& ahead);
    // [64 positions][16 numbers] -> [four positions][number], tile by tile, numbers in the order of the sums.
    void (*values)(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out, Ahead& ahead);
    // The same for chunks; of values, positions are in the order of weights whose four registers of 16 were narrowed to one:
    // fours 4 v + i at 4 i + v.
    void (*chunk_keys)(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out, RowsAhead& ahead);
    void (*chunk_values)(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out, RowsAhead& ahead);
    // The same of numbers d to d + 63 of 64 positions.
    void (*some_values)(const char* rows, int64_t stride, int64_t dim, int64_t d, char* out, Ahead& ahead);
    // Rows as int8, one after the other; none where they are stored so.
    void (*plain)(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out);
    // Scales of every `heads`-th row, times `factor`.
    void (*scales)(const char* scales, int64_t heads, int64_t count, float factor, float* out);
};

template <class Rows, class Fetch>
void pack_keys(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out, Fetch& ahead) {
    const Rows stored(dim);
    for (int64_t j = 0; j < count; j += 16, rows += 16 * stride)
        for (int64_t d = 0; d < dim; d += 64, out += tile_bytes) {
            ahead.fetch(16);
            __m512i v[16];
            for (int64_t i = 0; i < 16; ++i) v[i] = stored.load(rows + i * stride, d);
            transpose_16(v);
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * 64, v[i]);
        }
}

template <class Rows, class Fetch, bool narrowed>
void pack_some_values(const char* rows, int64_t stride, int64_t dim, int64_t d, char* out, Fetch& ahead) {
    const Rows stored(dim);
    for (int64_t i = 0; i < 16; ++i) {
        ahead.fetch(4);
        const FourRows four(stored, rows + 4 * i * stride, stride, d);
        __m512i a, b, c, e;
        four.half<false>(a, b);
        four.half<true>(c, e);
        char* to = out + (narrowed ? i % 4 * 4 + i / 4 : i) * 64;
        _mm512_store_si512(to, a), _mm512_store_si512(to + tile_bytes, b);
        _mm512_store_si512(to + 2 * tile_bytes, c), _mm512_store_si512(to + 3 * tile_bytes, e);
    }
}

template <class Rows, class Fetch, bool narrowed>
void pack_values(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out, Fetch& ahead) {
    for (int64_t j = 0; j < count; j += 64, rows += 64 * stride)
        for (int64_t d = 0; d < dim; d += 64, out += 4 * tile_bytes)
            pack_some_values<Rows, Fetch, narrowed>(rows, stride, dim, d, out, ahead);
}

template <class Rows>
void write_plain(const char* rows, int64_t stride, int64_t count, int64_t dim, char* out) {
    const Rows stored(dim);
    for (int64_t i = 0; i < count; ++i, rows += stride)
        for (int64_t d = 0; d < dim; d += 64, out += 64) _mm512_store_si512(out, stored.load(rows, d));
}

template <class Rows>
void pack_scales(const char* scales, int64_t heads, int64_t count, float factor, float* out) {
    for (int64_t j = 0; j < count; ++j) {
        if constexpr (Rows::half_scales) {
            uint16_t half;
            std::memcpy(&half, scales + 2 * j * heads, 2);
            out[j] = _cvtsh_ss(half) * factor;
        } else {
            float scale;
            std::memcpy(&scale, scales + 4 * j * heads, 4);
            out[j] = scale * factor;
        }
    }
}

template <class Rows>
Packing packing_of(int64_t dim) {
    return {Rows(dim).row_bytes, pack_keys<Rows, Ahead>, pack_values<Rows, Ahead, false>, pack_keys<Rows, RowsAhead>,
            pack_values<Rows, RowsAhead, true>, pack_some_values<Rows, Ahead, true>,
            Rows::half_scales ? write_plain<Rows> : nullptr, pack_scales<Rows>};
}

template <int bits>
bool find_level_packing(int64_t dim, Packing& found) {
    if (LevelRows<bits, true>::suit(dim)) found = packing_of<LevelRows<bits, true>>(dim);
    else if (LevelRows<bits, false>::suit(dim)) found = packing_of<LevelRows<bits, false>>(dim);
    else return false;
    return true;
}

// How rows of a codec are put in order, none where they can't be.
inline bool find_packing(Codec codec, int64_t dim, Packing& found) {
    if (dim % 64) return false;
    switch (codec) {
        case Codec::int8: found = packing_of<Int8Rows>(dim); return true;
        case Codec::int3: return find_level_packing<3>(dim, found);
        case Codec::int4: return find_level_packing<4>(dim, found);
        case Codec::int5: return find_level_packing<5>(dim, found);
        case Codec::int6: return find_level_packing<6>(dim, found);
        default: return false;
    }
}

// The instructions take the numbers of tiles as they are written, and GCC does not know that they read memory.
inline void stored_before() { asm volatile("" ::: "memory"); }

// Tiles 6 and 7 have 16 rows, the others as many as there are rows of queries at a time.
inline void configure_tiles(int64_t rows) {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = 64;  // bytes of a row
        config[48 + i] = static_cast<uint8_t>(i < 6 ? rows : tile_rows);
    }
    stored_before();
    _tile_loadconfig(config);
}

}  // namespace
}  // namespace kvmmap
