// Attention with AVX-512 and its dot product of bytes (VNNI: vpdpbusd, 64 products an instruction).
//
// Keys and values are bytes already. Queries and weights become whole numbers of 24 bits, split into three digits
// of 8: three byte products take 3/64 of an instruction a number, against 1/16 for a fused multiply-add on floats plus
// the widening, and are exact, so that the result is better than f32's (2^-23 of the largest query or weight is lost,
// and nothing in summing). With two digits 2e-5 of the output would be lost.
//
// vpdpbusd multiplies unsigned by signed. Weights are never negative: their digits are the unsigned side. Queries have
// signed digits; there keys are the unsigned side, with 128 added, and a sum starts at -128 * (sum of digits) instead.
//
// It sums four neighbouring bytes into a lane. So codes are put in order as they are loaded: of keys, four numbers of a key
// side by side and 16 keys in a register; of values, four positions of a number side by side and 16 numbers in a
// register. No sum ever runs across lanes. The shuffles share the processor with the products, which take longer: to do
// both at once is faster than to keep what was put in order, as storing 64 bytes takes two cycles of Zen 4.
#include <immintrin.h>

#include "attend_tiles.h"

namespace kvmmap {
namespace {

// Queries become whole numbers within this, which is half a step less than three signed digits hold.
constexpr double query_unit = 127 * 65536;
constexpr int64_t step_digits = 16;       // four numbers' low digits, their middle ones, their high ones, and room

constexpr int64_t to_64(int64_t n) { return (n + 63) / 64 * 64; }

// A row of numbers, as digits: what follows it, step by step.
struct Digits {
    float worth;       // of one unit
    int32_t start[3];  // what the sums of low, middle and high digits start at
};

// 16 whole numbers -> their digits, in steps: the bytes of four numbers are put in order of their weight.
inline void store_digits(__m512i whole, char* out) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    _mm512_store_si512(out, _mm512_shuffle_epi8(whole, order));
}

inline void transpose_16(__m512i (&v)[16]) {  // 16 x 16 of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// vpdpbusd in place: sum += products of four unsigned and four signed bytes. From the intrinsic, GCC 12 copies every sum
// to another register and to the stack and back.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// The same four signed bytes for every lane.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, const char* signed_bytes) {
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(unsigned_bytes), "m"(*reinterpret_cast<const char(*)[4]>(signed_bytes)));
}

inline __m512i four_bytes(const char* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}

inline __m512 put_together(__m512i low, __m512i middle, __m512i high) {
    const __m512 small = _mm512_fmadd_ps(_mm512_cvtepi32_ps(middle), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), small);
}

// What sums are kept in goes by name and not by index: GCC would keep arrays on the stack.

// A query row's sums over 16 keys.
struct KeySums {
    __m512i low, middle, high;
    explicit KeySums(const Digits& row)
        : low(_mm512_set1_epi32(row.start[0])), middle(_mm512_set1_epi32(row.start[1])),
          high(_mm512_set1_epi32(row.start[2])) {}

    void add(__m512i keys, const char* step) {
        add_products(low, keys, step);
        add_products(middle, keys, step + 4);
        add_products(high, keys, step + 8);
    }

    void store(float worth, float* out) const {
        _mm512_store_ps(out, _mm512_mul_ps(put_together(low, middle, high), _mm512_set1_ps(worth)));
    }
};

// One digit's sums over 64 numbers.
struct DigitSums {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
};

// A query row's sums over 64 numbers of the values.
struct ValueSums {
    DigitSums low, middle, high;

    // Two halves, so that four registers less are in use at a time.
    void add_first(__m512i a, __m512i b, const char* step) {
        add_pair(low.a, low.b, a, b, step);
        add_pair(middle.a, middle.b, a, b, step + 4);
        add_pair(high.a, high.b, a, b, step + 8);
    }
    void add_second(__m512i c, __m512i d, const char* step) {
        add_pair(low.c, low.d, c, d, step);
        add_pair(middle.c, middle.d, c, d, step + 4);
        add_pair(high.c, high.d, c, d, step + 8);
    }
    static void add_pair(__m512i& x, __m512i& y, __m512i for_x, __m512i for_y, const char* digits) {
        const __m512i weights = four_bytes(digits);
        add_products(x, weights, for_x);
        add_products(y, weights, for_y);
    }

    void store(float worth, float* sums) const {
        store_part(low.a, middle.a, high.a, worth, sums);
        store_part(low.b, middle.b, high.b, worth, sums + 16);
        store_part(low.c, middle.c, high.c, worth, sums + 32);
        store_part(low.d, middle.d, high.d, worth, sums + 48);
    }
    static void store_part(__m512i l, __m512i m, __m512i h, float worth, float* sums) {
        const __m512 more = put_together(l, m, h);
        _mm512_store_ps(sums, _mm512_fmadd_ps(more, _mm512_set1_ps(worth), _mm512_load_ps(sums)));
    }
};

class Bytes {
  public:
    static constexpr int lanes = 16;

    struct Weights {
        alignas(64) char digits[4][tile / 4 * step_digits];
        float worth[4];
    };

    static int64_t width(int64_t value_dim) { return to_64(value_dim); }
    static int64_t query_bytes(int64_t dim) { return 64 + to_64(dim) / 4 * step_digits; }

    static void prepare(const float* query, int64_t dim, float factor, void* prepared) {
        auto* row = static_cast<Digits*>(prepared);
        char* out = static_cast<char*>(prepared) + 64;
        __m512 sizes = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += 16) sizes = _mm512_max_ps(sizes, _mm512_abs_ps(load_some(query + d, dim - d)));
        const double size = highest(sizes);
        // In double: queries are given as they are, and rounded once.
        const __m512d inverse = _mm512_set1_pd(size > 0 ? query_unit / size : 0);
        __m512i lows = _mm512_setzero_si512(), middles = lows, highs = lows;
        for (int64_t d = 0; d < to_64(dim); d += 16) {
            const __m512 x = load_some(query + d, dim - d);
            const __m256i first = _mm512_cvtpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), inverse));
            const __m256i second =
                _mm512_cvtpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)), inverse));
            const __m512i whole = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            // Each digit is a signed byte; what it is short of goes into the next.
            const __m512i half = _mm512_set1_epi32(128), byte = _mm512_set1_epi32(255);
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, half), 8);
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(upper, half), 8);
            lows = _mm512_add_epi32(lows, _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24));
            middles = _mm512_add_epi32(middles, _mm512_srai_epi32(_mm512_slli_epi32(upper, 24), 24));
            highs = _mm512_add_epi32(highs, high);
            const __m512i low_bytes = _mm512_or_si512(_mm512_and_si512(whole, byte),
                                                      _mm512_slli_epi32(_mm512_and_si512(upper, byte), 8));
            store_digits(_mm512_or_si512(low_bytes, _mm512_slli_epi32(high, 16)), out + d / 4 * step_digits);
        }
        // Bounded, so that a product of zero stays zero.
        row->worth = static_cast<float>(std::min(size / query_unit * factor, 3e38));
        row->start[0] = -128 * _mm512_reduce_add_epi32(lows);
        row->start[1] = -128 * _mm512_reduce_add_epi32(middles);
        row->start[2] = -128 * _mm512_reduce_add_epi32(highs);
    }

    // Within 64 numbers the bytes of four positions were interleaved by unpacking, within stretches of 16.
    static void finish(const float* sums, int64_t value_dim, float factor, float* out) {
        const __m128 scale = _mm_set1_ps(factor);
        for (int64_t d = 0; d < value_dim; d += 4) {
            const __m128 four = _mm_mul_ps(_mm_load_ps(sums + d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4), scale);
            _mm_mask_storeu_ps(out + d, value_dim - d < 4 ? (1 << (value_dim - d)) - 1 : 15, four);
        }
    }

    static float highest(__m512 v) { return _mm512_reduce_max_ps(v); }
    static float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

    Bytes(int64_t dim, int64_t value_dim)
        : dim_(dim), value_dim_(value_dim), padded_keys_(tile * to_64(dim)), padded_values_(tile * to_64(value_dim)) {}

    void load(const int8_t* keys, int64_t key_stride, const int8_t* values, int64_t value_stride, int64_t count) {
        whole(keys, key_stride, count, dim_, padded_keys_, keys_, key_stride_);
        whole(values, value_stride, count, value_dim_, padded_values_, values_, value_stride_);
    }

    template <int R>
    void scores(const char* const (&queries)[R], float (&out)[R][tile], Ahead& ahead) const {
        for (int64_t j = 0; j < tile; j += 16) {
            const int8_t* keys = keys_ + j * key_stride_;
            int r = 0;
            for (; r + 2 <= R; r += 2) score_rows<2>(keys, queries[r], queries[r + 1], out[r] + j, out[r + 1] + j, ahead);
            if (r < R) score_rows<1>(keys, queries[r], queries[r], out[r] + j, nullptr, ahead);
        }
    }

    // The largest weight becomes a number of 24 bits, by a power of two: its own 24 bits, and nothing to divide by.
    static void set(Weights& weights, int r, const float* w) {
        const __m512 a = _mm512_load_ps(w), b = _mm512_load_ps(w + 16), c = _mm512_load_ps(w + 32), d = _mm512_load_ps(w + 48);
        const float most = highest(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
        const int exponent = std::max(exponent_of(most), least_exponent);
        const __m512 factor = _mm512_set1_ps(power_of_two(24 - exponent));
        char* out = weights.digits[r];
        store_digits(_mm512_cvtps_epi32(_mm512_mul_ps(a, factor)), out);
        store_digits(_mm512_cvtps_epi32(_mm512_mul_ps(b, factor)), out + 4 * step_digits);
        store_digits(_mm512_cvtps_epi32(_mm512_mul_ps(c, factor)), out + 8 * step_digits);
        store_digits(_mm512_cvtps_epi32(_mm512_mul_ps(d, factor)), out + 12 * step_digits);
        weights.worth[r] = power_of_two(exponent - 24);
    }

    template <int R>
    void add(const Weights& weights, float* const (&sums)[R], Ahead& ahead) const {
        for (int64_t d = 0; d < value_dim_; d += 64) {
            int r = 0;
            for (; r + 2 <= R; r += 2) add_rows<2>(weights, r, d, sums[r] + d, sums[r + 1] + d, ahead);
            if (r < R) add_rows<1>(weights, r, d, sums[r] + d, nullptr, ahead);
        }
    }

  private:
    static __m512 load_some(const float* p, int64_t count) {
        return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0, p);
    }

    static constexpr int least_exponent = -100;  // what is smaller is nothing beside any sum

    // x < 2^exponent_of(x)
    static int exponent_of(float x) { return (_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(x))) >> 23 & 0xff) - 126; }

    static float power_of_two(int exponent) {
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((exponent + 127) << 23)));
    }

    // Rows that are not 64, or not of a multiple of 64 numbers, are padded with zeros: they weigh nothing, or are hidden.
    static void whole(const int8_t* from, int64_t stride, int64_t count, int64_t dim, std::vector<int8_t>& padded,
                      const int8_t*& rows, int64_t& row_stride) {
        rows = from, row_stride = stride;
        if (count == tile && dim % 64 == 0) return;
        const int64_t wide = to_64(dim);
        for (int64_t i = 0; i < count; ++i) std::memcpy(padded.data() + i * wide, from + i * stride, dim);
        std::fill(padded.begin() + count * wide, padded.end(), int8_t{0});
        rows = padded.data(), row_stride = wide;
    }

    // A function of its own, or what is around it would take its registers. So is the next.
    template <int R>
    [[gnu::noinline]] void score_rows(const int8_t* keys, const char* query, const char* next_query, float* out,
                                      float* next_out, Ahead& ahead) const {
        static_assert(R == 1 || R == 2);
        const auto* row = reinterpret_cast<const Digits*>(query);
        const auto* next_row = reinterpret_cast<const Digits*>(next_query);
        KeySums first(*row), second(*next_row);
        query += 64, next_query += 64;
        for (int64_t d = 0; d < dim_; d += 64) {
            ahead.fetch(14);
            __m512i v[16];
            for (int64_t i = 0; i < 16; ++i)
                v[i] = _mm512_xor_si512(_mm512_loadu_si512(keys + i * key_stride_ + d), _mm512_set1_epi8(-128));
            transpose_16(v);
            for (int i = 0; i < 16; ++i, query += step_digits, next_query += step_digits) {
                first.add(v[i], query);
                if constexpr (R == 2) second.add(v[i], next_query);
            }
        }
        first.store(row->worth, out);
        if constexpr (R == 2) second.store(next_row->worth, next_out);
    }

    // Has the compiler load anew what it would keep in registers that the sums need.
    static void forget(const char*& p) { asm("" : "+r"(p)); }

    template <int R>
    [[gnu::noinline]] void add_rows(const Weights& weights, int row, int64_t d, float* sums, float* more_sums,
                                    Ahead& ahead) const {
        static_assert(R == 1 || R == 2);
        ValueSums first, second;
        const int8_t* values = values_ + d;
        for (int64_t t = 0; t < tile / 4; ++t, values += 4 * value_stride_) {
            ahead.fetch(4);
            const __m512i v0 = _mm512_loadu_si512(values), v1 = _mm512_loadu_si512(values + value_stride_);
            const __m512i v2 = _mm512_loadu_si512(values + 2 * value_stride_);
            const __m512i v3 = _mm512_loadu_si512(values + 3 * value_stride_);
            const char* step = weights.digits[row] + t * step_digits;
            const char* next_step = weights.digits[row + R - 1] + t * step_digits;
            __m512i x = _mm512_unpacklo_epi8(v0, v1), y = _mm512_unpacklo_epi8(v2, v3);
            __m512i a = _mm512_unpacklo_epi16(x, y), b = _mm512_unpackhi_epi16(x, y);
            first.add_first(a, b, step);
            if constexpr (R == 2) second.add_first(a, b, next_step);
            forget(step), forget(next_step);
            x = _mm512_unpackhi_epi8(v0, v1), y = _mm512_unpackhi_epi8(v2, v3);
            a = _mm512_unpacklo_epi16(x, y), b = _mm512_unpackhi_epi16(x, y);
            first.add_second(a, b, step);
            if constexpr (R == 2) second.add_second(a, b, next_step);
        }
        first.store(weights.worth[row], sums);
        if constexpr (R == 2) second.store(weights.worth[row + 1], more_sums);
    }

    int64_t dim_, value_dim_, key_stride_, value_stride_;
    const int8_t *keys_, *values_;
    std::vector<int8_t> padded_keys_, padded_values_;
};

}  // namespace

const AttendKernel attend_avx512 = kernel_of<Bytes>();

}  // namespace kvmmap
