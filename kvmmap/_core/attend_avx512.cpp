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
// It sums four neighbouring bytes into a lane. So a tile of one head is first put in order in the first-level cache: for
// keys, four numbers of a key side by side and 16 keys in a register; for values, four positions of a number side by
// side and 16 numbers in a register. No sum ever runs across lanes, and the same product serves both.
#include <immintrin.h>

#include "attend_tiles.h"

namespace kvmmap {
namespace {

// Queries become whole numbers within this, which is half a step less than three signed digits hold.
constexpr double query_unit = 127 * 65536;
constexpr int64_t step_bytes = tile * 4;  // of codes: four bytes for each of 64 lanes
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

// What a product works with, by name and not as arrays: GCC would keep arrays on the stack, at half the speed.

// A step's codes: 64 lanes of four bytes.
struct Codes {
    __m512i a, b, c, d;
    explicit Codes(const char* packed)
        : a(_mm512_load_si512(packed)), b(_mm512_load_si512(packed + 64)), c(_mm512_load_si512(packed + 128)),
          d(_mm512_load_si512(packed + 192)) {}
};

// Which side of the product is unsigned.
enum class Unsigned { codes, digits };

// The sums of one digit of one row.
struct Sums {
    __m512i a, b, c, d;
    explicit Sums(int32_t start) : a(_mm512_set1_epi32(start)), b(a), c(a), d(a) {}

    template <Unsigned U>
    void add(const Codes& codes, const char* four) {
        int32_t bits;
        std::memcpy(&bits, four, 4);
        const __m512i digits = _mm512_set1_epi32(bits);
        add_products<U>(a, codes.a, digits);
        add_products<U>(b, codes.b, digits);
        add_products<U>(c, codes.c, digits);
        add_products<U>(d, codes.d, digits);
    }

    // vpdpbusd in place. From the intrinsic, GCC 12 copies every sum to another register and to the stack and back.
    template <Unsigned U>
    static void add_products(__m512i& sum, __m512i codes, __m512i digits) {
        if constexpr (U == Unsigned::codes) {
            asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
        } else {
            asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(digits), "v"(codes));
        }
    }
};

// The sums of one row.
struct RowSums {
    Sums low, middle, high;
    explicit RowSums(const Digits& row) : low(row.start[0]), middle(row.start[1]), high(row.start[2]) {}

    template <Unsigned U>
    void add(const Codes& codes, const char* step) {
        low.add<U>(codes, step);
        middle.add<U>(codes, step + 4);
        high.add<U>(codes, step + 8);
    }

    void store(float* product) const {
        store_part(product, low.a, middle.a, high.a);
        store_part(product + 16, low.b, middle.b, high.b);
        store_part(product + 32, low.c, middle.c, high.c);
        store_part(product + 48, low.d, middle.d, high.d);
    }

    static void store_part(float* product, __m512i l, __m512i m, __m512i h) {
        const __m512 small = _mm512_fmadd_ps(_mm512_cvtepi32_ps(m), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(l));
        _mm512_store_ps(product, _mm512_fmadd_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(65536.0f), small));
    }
};

class Bytes {
  public:
    static constexpr int lanes = 16;
    static constexpr int rows = 2;  // times four registers of lanes times three digits: 24 sums in 32 registers

    struct Weights {
        alignas(64) char digits[rows][tile / 4 * step_digits];
        Digits row[rows];
    };

    static int64_t width(int64_t value_dim) { return to_64(value_dim); }
    // Within 64 numbers the bytes of four positions are interleaved by unpacking, within stretches of 16.
    static int64_t lane(int64_t d) { return d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4 + d % 4; }
    static int64_t query_bytes(int64_t dim) { return 64 + to_64(dim) / 4 * step_digits; }

    static void prepare(const float* query, int64_t dim, float factor, void* prepared) {
        auto* row = static_cast<Digits*>(prepared);
        char* out = static_cast<char*>(prepared) + 64;
        float size = 0;
        for (int64_t d = 0; d < dim; ++d) size = std::max(size, query[d] < 0 ? -query[d] : query[d]);
        // In double: queries are given as they are, and rounded once.
        const double inverse = size > 0 ? query_unit / static_cast<double>(size) : 0;
        int64_t sums[3] = {};
        for (int64_t from = 0; from < to_64(dim); from += 16) {
            alignas(64) int32_t signed_digits[16] = {};
            for (int64_t d = from; d < std::min(from + 16, dim); ++d) {
                // Each digit is a signed byte; what it is short of goes into the next.
                const auto whole = static_cast<int32_t>(__builtin_rint(query[d] * inverse));
                const auto low = static_cast<int8_t>(whole);
                const auto middle = static_cast<int8_t>((whole - low) >> 8);
                const auto high = static_cast<int8_t>((((whole - low) >> 8) - middle) >> 8);
                sums[0] += low, sums[1] += middle, sums[2] += high;
                signed_digits[d - from] = static_cast<uint8_t>(low) | static_cast<uint8_t>(middle) << 8 | static_cast<uint8_t>(high) << 16;
            }
            store_digits(_mm512_load_si512(signed_digits), out + from / 4 * step_digits);
        }
        // Bounded, so that a product of zero stays zero.
        row->worth = static_cast<float>(std::min(size / query_unit * factor, 3e38));
        for (int digit = 0; digit < 3; ++digit) row->start[digit] = static_cast<int32_t>(-128 * sums[digit]);
    }

    static float highest(__m512 v) { return _mm512_reduce_max_ps(v); }
    static float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

    Bytes(int64_t dim, int64_t value_dim)
        : dim_(dim), value_dim_(value_dim), room_((to_64(dim) / 4 + to_64(value_dim) / 4) * step_bytes + 64) {
        const auto address = reinterpret_cast<uintptr_t>(room_.data());
        keys_ = room_.data() + (64 - address % 64) % 64;
        values_ = keys_ + to_64(dim) / 4 * step_bytes;
    }

    void load(const int8_t* keys, int64_t key_stride, const int8_t* values, int64_t value_stride, int64_t count,
              Ahead& ahead) {
        for (int64_t j = 0; j < tile; j += 16)
            for (int64_t d = 0; d < dim_; d += 64) {
                ahead.fetch(8);
                load_keys(keys, key_stride, count, j, d);
            }
        for (int64_t d = 0; d < value_dim_; d += 64)
            for (int64_t j = 0; j < tile; j += 4) {
                ahead.fetch(2);
                load_values(values, value_stride, count, j, d);
            }
    }

    template <int R>
    void scores(const char* const (&queries)[R], float (&out)[R][tile], Ahead& ahead) const {
        const char* digits[R];
        const Digits* row[R];
        for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const Digits*>(queries[r]), digits[r] = queries[r] + 64;
        multiply<R, Unsigned::codes>(keys_, (dim_ + 3) / 4, digits, row, out, ahead);
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < 64; i += 16)
                _mm512_store_ps(out[r] + i, _mm512_mul_ps(_mm512_load_ps(out[r] + i), _mm512_set1_ps(row[r]->worth)));
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
        weights.row[r] = {power_of_two(exponent - 24), {}};
    }

    template <int R>
    void add(const Weights& weights, float* const (&sums)[R], Ahead& ahead) const {
        const char* digits[R];
        const Digits* row[R];
        for (int r = 0; r < R; ++r) digits[r] = weights.digits[r], row[r] = &weights.row[r];
        for (int64_t d = 0; d < value_dim_; d += 64) {
            alignas(64) float product[R][tile];
            multiply<R, Unsigned::digits>(values_ + d / 64 * (tile / 4) * step_bytes, tile / 4, digits, row, product, ahead);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < 64; i += 16) {
                    float* s = sums[r] + d + i;
                    const __m512 more = _mm512_load_ps(product[r] + i);
                    _mm512_store_ps(s, _mm512_fmadd_ps(more, _mm512_set1_ps(row[r]->worth), _mm512_load_ps(s)));
                }
        }
    }

  private:
    static constexpr int least_exponent = -100;  // what is smaller is nothing beside any sum

    // x < 2^exponent_of(x)
    static int exponent_of(float x) { return (_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(x))) >> 23 & 0xff) - 126; }

    static float power_of_two(int exponent) {
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((exponent + 127) << 23)));
    }

    // 16 keys from j on, 64 numbers from d on -> 16 steps of 16 lanes.
    void load_keys(const int8_t* keys, int64_t stride, int64_t count, int64_t j, int64_t d) {
        const __m512i flip = _mm512_set1_epi8(-128);
        const __mmask64 mask = mask_of(dim_ - d);
        __m512i v[16];
        for (int64_t i = 0; i < 16; ++i) {
            const int8_t* key = keys + std::min(j + i, count - 1) * stride + d;  // missing ones are hidden later
            v[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, key), flip);
        }
        transpose_16(v);
        char* out = keys_ + d / 4 * step_bytes + j * 4;
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * step_bytes, v[i]);
    }

    // 4 positions from j on, 64 numbers from d on -> one step of 64 lanes.
    void load_values(const int8_t* values, int64_t stride, int64_t count, int64_t j, int64_t d) {
        const __mmask64 mask = mask_of(value_dim_ - d);
        __m512i v[4];
        for (int64_t i = 0; i < 4; ++i) {
            const int8_t* value = values + std::min(j + i, count - 1) * stride + d;  // missing ones weigh nothing
            v[i] = _mm512_maskz_loadu_epi8(mask, value);
        }
        const __m512i a = _mm512_unpacklo_epi8(v[0], v[1]), b = _mm512_unpackhi_epi8(v[0], v[1]);
        const __m512i c = _mm512_unpacklo_epi8(v[2], v[3]), e = _mm512_unpackhi_epi8(v[2], v[3]);
        char* out = values_ + (d / 64 * (tile / 4) + j / 4) * step_bytes;
        _mm512_store_si512(out, _mm512_unpacklo_epi16(a, c));
        _mm512_store_si512(out + 64, _mm512_unpackhi_epi16(a, c));
        _mm512_store_si512(out + 128, _mm512_unpacklo_epi16(b, e));
        _mm512_store_si512(out + 192, _mm512_unpackhi_epi16(b, e));
    }

    static __mmask64 mask_of(int64_t left) { return left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1; }

    // product[r] = sum over `steps` of the digits of row r, put together again, times the codes.
    // On its own, or what is around it would take its registers.
    template <int R, Unsigned U>
    [[gnu::noinline]] static void multiply(const char* packed, int64_t steps, const char* const (&digits)[R],
                                           const Digits* const (&row)[R], float (&product)[R][tile], Ahead& ahead) {
        const char* next = ahead.take(steps);
        static_assert(R == 1 || R == 2);
        RowSums first(*row[0]), second(*row[R - 1]);
        for (int64_t t = 0; t < steps; ++t) {
            const Codes codes(packed + t * step_bytes);
            __builtin_prefetch(next + 64 * t, 0, 2);
            first.add<U>(codes, digits[0] + t * step_digits);
            if constexpr (R == 2) second.add<U>(codes, digits[1] + t * step_digits);
        }
        first.store(product[0]);
        if constexpr (R == 2) second.store(product[1]);
    }

    int64_t dim_, value_dim_;
    std::vector<char> room_;
    char *keys_, *values_;
};

}  // namespace

const AttendKernel attend_avx512 = kernel_of<Bytes>();

}  // namespace kvmmap
