// How 64 numbers of a stored row get into a register as int8: of int8 codes, and of levels of 3 to 6 bits, which are looked
// up on the way, so that a quarter to five eighths of the bytes need not come from memory.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "codec_levels.h"

namespace kvmmap {
namespace {

// Rows of int8 codes.
struct Int8Rows {
    static constexpr int number_bits = 8;
    static constexpr bool half_scales = false;
    explicit Int8Rows(int64_t dim) : row_bytes(dim) {}

    const int64_t row_bytes;

    // Numbers d to d + 63.
    [[gnu::always_inline]] __m512i load(const char* row, int64_t d) const { return _mm512_loadu_si512(row + d); }
    // The same plus 128, unsigned.
    [[gnu::always_inline]] __m512i load_unsigned(const char* row, int64_t d) const {
        return _mm512_xor_si512(load(row, d), _mm512_set1_epi8(-128));
    }
};

// Bytes of any rows, as they lie: of packed ones two codes each.
struct PackedRows {
    [[gnu::always_inline]] __m512i load(const char* row, int64_t d) const { return _mm512_loadu_si512(row + d); }
};

// The levels of 4 or 5 bits, for 64 codes whose lower four bits are the lower or the upper ones of 64 bytes; `raised`: plus 128,
// unsigned.
template <int bits, bool raised>
class LevelTable {
    static_assert(bits == 4 || bits == 5);

  public:
#if defined(__AVX512VBMI__)
    // Fifth bits of 64 codes, at place 4 of each byte; what is at other places does not matter.
    using Fifth = __m512i;

    LevelTable() : table_(_mm512_inserti64x4(_mm512_castsi256_si512(half()), half(), 1)) {}

    [[gnu::always_inline]] static Fifth from_plane(const char* plane) {
        int64_t all;
        std::memcpy(&all, plane, 8);
        // Byte j of quadword q gets bit 8 q + j: it is shifted by 8 q + j - 4, modulo 64.
        const __m512i eights = _mm512_set_epi64(56 * ones, 48 * ones, 40 * ones, 32 * ones, 24 * ones, 16 * ones, 8 * ones, 0);
        const __m512i places = _mm512_add_epi8(_mm512_set1_epi64(0x03020100fffefdfc), eights);
        return _mm512_multishift_epi64_epi8(places, _mm512_set1_epi64(all));
    }
    // Of four codes a lane, bits 4 i to 4 i + 3 of the lane.
    [[gnu::always_inline]] static Fifth from_lanes(__m512i lanes, int i) {
        const __m512i places = _mm512_add_epi8(_mm512_set1_epi64(0x1f1e1d1cfffefdfc), _mm512_set1_epi8(static_cast<char>(4 * i)));
        return _mm512_multishift_epi64_epi8(places, lanes);
    }

    // Looks at six bits: those that are none of a code do not matter, as the table is there two or four times.
    [[gnu::always_inline]] __m512i lower(__m512i bytes) const { return _mm512_permutexvar_epi8(bytes, table_); }
    [[gnu::always_inline]] __m512i lower(__m512i bytes, Fifth fifth) const {
        return lower(_mm512_ternarylogic_epi32(fifth, bytes, _mm512_set1_epi8(15), 0xd8));  // four bits of bytes
    }
#else
    using Fifth = __mmask64;

    LevelTable() = default;

    [[gnu::always_inline]] static Fifth from_plane(const char* plane) {
        uint64_t all;
        std::memcpy(&all, plane, 8);
        return all;
    }
    [[gnu::always_inline]] static Fifth from_lanes(__m512i lanes, int i) {
        const __m512i lowest_byte = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
        const __m512i spread = _mm512_shuffle_epi8(_mm512_srli_epi32(lanes, 4 * i), lowest_byte);
        return _mm512_test_epi8_mask(spread, _mm512_set1_epi32(0x08040201));
    }

    [[gnu::always_inline]] __m512i lower(__m512i bytes) const {
        return _mm512_shuffle_epi8(first_, _mm512_and_si512(bytes, _mm512_set1_epi8(15)));
    }
    [[gnu::always_inline]] __m512i lower(__m512i bytes, Fifth fifth) const {
        const __m512i codes = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
        return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(first_, codes), fifth, second_, codes);
    }
#endif
    [[gnu::always_inline]] __m512i upper(__m512i bytes) const { return lower(_mm512_srli_epi16(bytes, 4)); }
    [[gnu::always_inline]] __m512i upper(__m512i bytes, Fifth fifth) const { return lower(_mm512_srli_epi16(bytes, 4), fifth); }

  private:
    static constexpr Register levels(int first) {
        Register found = level_register<bits>(first);
        if (raised)
            for (int8_t& value : found.values) value = static_cast<int8_t>(value ^ -128);
        return found;
    }
    static __m128i sixteen(bool highest) {
        static constexpr Register first = levels(0), last = levels((1 << bits) - 16);
        return _mm_load_si128(reinterpret_cast<const __m128i*>((highest ? last : first).values));
    }
#if defined(__AVX512VBMI__)
    static constexpr int64_t ones = 0x0101010101010101;

    static __m256i half() { return _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(false)), sixteen(true), 1); }

    __m512i table_;
#else
    const __m512i first_ = _mm512_broadcast_i32x4(sixteen(false)), second_ = _mm512_broadcast_i32x4(sixteen(true));
#endif
};

// Rows of levels: of 64 numbers if `narrow`, else of a multiple of 128. In a plane of four bits, 64 numbers are then the
// lower or the upper halves of 64 bytes, or of 32 bytes both; in one of two bits a quarter of each of 64 bytes, or half of
// each of 32, or all of 16.
template <int bits, bool narrow>
struct LevelRows {
    static constexpr int number_bits = bits;
    static constexpr bool half_scales = true;
    static bool suit(int64_t dim) {
        if (narrow) return dim == 64;
        return bits == 4 || bits == 5 ? dim % 128 == 0 : dim == 128 || dim % 256 == 0;
    }
    explicit LevelRows(int64_t dim) : row_bytes(dim / 8 * bits), half_(dim / 2), quarter_(dim / 4) {}

    const int64_t row_bytes;

    int64_t half() const { return half_; }

    [[gnu::always_inline]] __m512i load(const char* row, int64_t d) const {
        static constexpr Register first = level_register<bits>(0), second = level_register<bits>(16);
        return look_up(row, d, first, second);
    }
    [[gnu::always_inline]] __m512i load_unsigned(const char* row, int64_t d) const {
        static constexpr Register first = raised(level_register<bits>(0)), second = raised(level_register<bits>(16));
        return look_up(row, d, first, second);
    }

  private:
    static constexpr Register raised(Register r) {
        for (int8_t& value : r.values) value = static_cast<int8_t>(value ^ -128);
        return r;
    }

    [[gnu::always_inline]] __m512i look_up(const char* row, int64_t d, const Register& first, const Register& second) const {
        if constexpr (bits == 3) {
            uint64_t highest;
            std::memcpy(&highest, row + quarter_ + d / 8, 8);
            const __m512i codes = _mm512_or_si512(two_bits(row, d), _mm512_maskz_set1_epi8(highest, 4));
            return _mm512_shuffle_epi8(table(first), codes);
        } else if constexpr (bits == 6) {
            const __m512i codes = _mm512_or_si512(four_bits(row, d), _mm512_slli_epi16(two_bits(row + half_, d), 4));
            // Levels are even, 4 apart: the first one and so many steps.
            return _mm512_add_epi8(_mm512_slli_epi16(codes, 2), _mm512_set1_epi8(first.values[0]));
        } else {
            const __m512i codes = four_bits(row, d), found = _mm512_shuffle_epi8(table(first), codes);
            if constexpr (bits == 4) return found;
            uint64_t highest;
            std::memcpy(&highest, row + half_ + d / 8, 8);
            return _mm512_mask_shuffle_epi8(found, highest, table(second), codes);
        }
    }

    [[gnu::always_inline]] __m512i four_bits(const char* plane, int64_t d) const {
        __m512i codes;
        if constexpr (narrow) {
            const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
            codes = _mm512_mask_srli_epi16(both, 0xffff0000u, both, 4);
        } else {
            const bool upper = d >= half_;
            codes = _mm512_srl_epi16(_mm512_loadu_si512(plane + (upper ? d - half_ : d)), _mm_cvtsi32_si128(upper ? 4 : 0));
        }
        return _mm512_and_si512(codes, _mm512_set1_epi8(15));
    }

    // Bits of neighbouring bytes, which shifts bring along, are masked out.
    [[gnu::always_inline]] __m512i two_bits(const char* plane, int64_t d) const {
        __m512i codes;
        if constexpr (narrow) {
            codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
            codes = _mm512_srlv_epi64(codes, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
        } else if (quarter_ == 32) {
            codes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
            codes = _mm512_srl_epi64(codes, _mm_cvtsi32_si128(d ? 4 : 0));
            codes = _mm512_mask_srli_epi64(codes, 0xf0, codes, 2);
        } else {
            const int64_t which = (d >= quarter_) + (d >= 2 * quarter_) + (d >= 3 * quarter_);
            codes = _mm512_loadu_si512(plane + d - which * quarter_);
            codes = _mm512_srl_epi64(codes, _mm_cvtsi32_si128(static_cast<int>(2 * which)));
        }
        return _mm512_and_si512(codes, _mm512_set1_epi8(3));
    }

    [[gnu::always_inline]] static __m512i table(const Register& r) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(r.values)));
    }

    int64_t half_, quarter_;
};

// The lower or the upper halves of rows of 4 bits and a multiple of 128 numbers.
template <bool upper>
class HalfRows {
  public:
    explicit HalfRows(const LevelRows<4, false>& rows) : before_(upper ? rows.half() : 0) {}

    // Numbers d to d + 63 of a row, which are such halves.
    [[gnu::always_inline]] __m512i load(const char* row, int64_t d) const {
        const __m512i bytes = _mm512_loadu_si512(row + d - before_);
        return upper ? table_.upper(bytes) : table_.lower(bytes);
    }

  private:
    int64_t before_;
    LevelTable<4, false> table_;
};

}  // namespace
}  // namespace kvmmap
