// Two ranges a register: the four sums of each. Four times as fast as range by range, for ranges of 2 KiB.
#include <immintrin.h>

#include "digest.h"

#define XXH_INLINE_ALL
#include "third_party/xxhash/xxhash.h"

namespace kvmmap {

void xxh64_of_16(const char* const* ranges, int64_t size, uint64_t* out) {
    constexpr int registers = 8;
    const __m512i prime1 = _mm512_set1_epi64(static_cast<int64_t>(XXH_PRIME64_1));
    const __m512i prime2 = _mm512_set1_epi64(static_cast<int64_t>(XXH_PRIME64_2));
    alignas(64) xxh_u64 sums[16][4];
    for (auto& four : sums) XXH64_initAccs(four, 0);
    __m512i acc[registers];
    for (int r = 0; r < registers; ++r) acc[r] = _mm512_load_si512(sums[2 * r]);
    int64_t at = 0;
    for (; at + 32 <= size; at += 32)
#pragma GCC unroll 8
        for (int r = 0; r < registers; ++r) {
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ranges[2 * r] + at));
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ranges[2 * r + 1] + at));
            const __m512i lanes = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            acc[r] = _mm512_add_epi64(acc[r], _mm512_mullo_epi64(lanes, prime2));
            acc[r] = _mm512_mullo_epi64(_mm512_rol_epi64(acc[r], 31), prime1);
        }
    for (int r = 0; r < registers; ++r) _mm512_store_si512(sums[2 * r], acc[r]);
    for (int i = 0; i < 16; ++i)
        out[i] = XXH64_finalize(XXH64_mergeAccs(sums[i]) + static_cast<xxh_u64>(size),
                                reinterpret_cast<const xxh_u8*>(ranges[i] + at), static_cast<size_t>(size), XXH_unaligned);
}

}  // namespace kvmmap
