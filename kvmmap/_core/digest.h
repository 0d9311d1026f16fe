// XXH64 of many ranges of bytes at a time, as records of rows in 16 bits need it. One range is a chain of multiplications, in
// which a processor waits for each; those of 16 ranges go side by side.
#pragma once

#include <cstdint>

namespace kvmmap {

// XXH64, seed 0, of `count` ranges of `size` bytes each.
void xxh64_of_each(const char* const* ranges, int64_t count, int64_t size, uint64_t* out);

#if defined(__x86_64__)
// The same where there is AVX-512, of 16 ranges of at least 32 bytes.
void xxh64_of_16(const char* const* ranges, int64_t size, uint64_t* out);
#endif

}  // namespace kvmmap
