// What Python's own os and mmap can't do for the file: several positioned writes in one call, having the system start on
// them, and aligned 64-bit words in a shared map with the memory ordering that publishing needs.
#pragma once

#include <cstdint>

namespace kvmmap {

struct Write {
    int64_t offset;
    const void* data;
    int64_t size;
};

// Writes all of every piece, in order, going on after short writes and EINTR. Returns 0 or an errno.
int write_all(int fd, const Write* writes, int count);

// Has the system start to put what was written there on the disk, where it knows how to; a sync has less to wait for
// then. It promises nothing, and takes no error away from that sync.
void start_sync(int fd, int64_t offset, int64_t size);

// Returns the disk space of a range, which then reads as zeros, to the file system. False where that can't be done.
bool punch_hole(int fd, int64_t offset, int64_t size);

// A checked word holds a value below 2^40 and, above it, 24 bits that depend on the value, the word's index and the
// file's salt: any other 64 bits are taken for a value once in 2^24. One aligned store publishes both.
constexpr int value_bits = 40;
uint64_t checked_word(uint64_t value, uint64_t index, uint64_t salt);
bool take_checked(uint64_t word, uint64_t index, uint64_t salt, uint64_t* value);

// Everything written before is visible to readers that see the word, and nothing written after is seen before it.
void store_word(void* address, uint64_t word);

// Nothing read before is read after the word, and nothing read after is read before it.
uint64_t load_word(const void* address);

}  // namespace kvmmap
