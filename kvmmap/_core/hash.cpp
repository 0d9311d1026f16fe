#include "hash.h"

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

struct Record {
    uint32_t track, rows;
    uint64_t number, digests[most_hashed_arrays];

    static int64_t size_of(int array_count) { return 16 + 8 * array_count; }
};

}  // namespace

int64_t HashedBlocks::row_bytes() const {
    int64_t bytes = 0;
    for (int a = 0; a < array_count; ++a) bytes += arrays[a].row_bytes;
    return bytes;
}

void HashedBlocks::hash(int64_t i) const {
    const auto hash = hash_kernels().xxh3;
    const int64_t first = first_row(i), rows = last_row(i) - first;
    Record record{track, static_cast<uint32_t>(rows), static_cast<uint64_t>(numbers[i]), {}};
    for (int a = 0; a < array_count; ++a) {
        const HashedArray& array = arrays[a];
        record.digests[a] = hash(array.data + first * array.row_bytes, rows * array.row_bytes);
    }
    sums[i] = array_count ? hash(&record, Record::size_of(array_count)) : 0;
}

void block_checksums(const HashedBlocks& blocks, int threads) {
    const int64_t bytes = blocks.count * blocks.size * blocks.row_bytes();
    parallel_ranges(blocks.count, worth_threads(bytes, threads), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) blocks.hash(i);
    });
}

}  // namespace kvmmap
