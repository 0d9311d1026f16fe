#include "hash.h"

#include <algorithm>

#include "cpu.h"
#include "parallel.h"
#include "rows_run.h"

#define XXH_INLINE_ALL
#include "third_party/xxhash/xxhash.h"

namespace kvmmap {

const HashKernels& hash_kernels() {
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx2: return hash_avx2;
        case Isa::avx512:
        case Isa::amx: return hash_avx512;
#endif
        default: return hash_portable;  // SSE2 and NEON included: the compiler's own target has them
    }
}

uint64_t xxh64(const void* data, int64_t size) { return XXH64(data, static_cast<size_t>(size), 0); }

namespace {

constexpr int64_t batch = 64;

struct Record {
    uint32_t track, rows;
    uint64_t number, digests[most_hashed_arrays];

    static int64_t size_of(int array_count) { return 16 + 8 * array_count; }
};

}  // namespace

void block_checksums(const HashedArray* arrays, int array_count, uint32_t track, const int64_t* numbers, int64_t count,
                     int64_t size, int64_t stop, uint64_t* out, int threads) {
    const auto hash = hash_kernels().xxh3;
    int64_t row_bytes = 0;
    for (int i = 0; i < array_count; ++i) row_bytes += arrays[i].row_bytes;
    parallel_ranges(count, worth_threads(count * size * row_bytes, threads), [&](int64_t begin, int64_t end) {
        uint64_t digests[most_hashed_arrays][batch];
        for (int64_t first = begin; first < end; first += batch) {
            const int64_t some = std::min(batch, end - first);
            auto rows_of = [&](int64_t i) { return std::min(size, stop - numbers[first + i] * size); };
            // Array by array, so that memory is read in long runs.
            for (int a = 0; a < array_count; ++a)
                for (int64_t i = 0; i < some; ++i)
                    digests[a][i] = hash(arrays[a].data + numbers[first + i] * size * arrays[a].row_bytes,
                                         rows_of(i) * arrays[a].row_bytes);
            for (int64_t i = 0; i < some; ++i) {
                Record record{track, static_cast<uint32_t>(rows_of(i)), static_cast<uint64_t>(numbers[first + i]), {}};
                for (int a = 0; a < array_count; ++a) record.digests[a] = digests[a][i];
                out[first + i] = array_count ? hash(&record, Record::size_of(array_count)) : 0;
            }
        }
    });
}

}  // namespace kvmmap
