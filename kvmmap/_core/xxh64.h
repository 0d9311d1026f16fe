// XXH64 with seed 0 (Yann Collet's xxHash, specification 0.1.1), of bytes that lie side by side.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvmmap {

uint64_t xxh64(const void* data, int64_t size);

}  // namespace kvmmap
