// XXH3 and XXH64 (Yann Collet's xxHash, in third_party/xxhash), and the checksums of blocks made of them.
//
// Hashing is as wide as the instruction set allows: a first read hashes what it reads, and memory should be all it waits for.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvmmap {

struct HashKernels {
    uint64_t (*xxh3)(const void* data, int64_t size);  // 64 bits, seed 0
};

extern const HashKernels hash_portable;
#if defined(__x86_64__)
extern const HashKernels hash_avx2;
extern const HashKernels hash_avx512;
#endif

const HashKernels& hash_kernels();

uint64_t xxh64(const void* data, int64_t size);  // seed 0

// An array that grows by rows, and its part of a block's checksum.
struct HashedArray {
    const char* data;
    int64_t row_bytes;
};

constexpr int most_hashed_arrays = 16;

// Blocks of a track, and where their checksums go. A block has `size` rows, and none from `stop` on.
struct HashedBlocks {
    HashedArray arrays[most_hashed_arrays];
    int array_count;
    uint32_t track;
    const int64_t* numbers;  // [count]
    int64_t count, size, stop;
    uint64_t* sums;  // [count]

    int64_t row_bytes() const;
    int64_t first_row(int64_t i) const { return numbers[i] * size; }
    int64_t last_row(int64_t i) const { return std::min((numbers[i] + 1) * size, stop); }  // one past it

    // Sets sums[i] as docs/format.md defines it: of the track, the rows, the number, and the digest of the block's part of
    // each array.
    void hash(int64_t i) const;
};

// Sets all sums.
void block_checksums(const HashedBlocks& blocks, int threads);

}  // namespace kvmmap
