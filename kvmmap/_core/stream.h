// Copying to memory that nobody reads soon, past the caches.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace kvmmap {

// From this many bytes of output on, it would push everything else out of the last-level cache and not stay there
// itself either.
constexpr int64_t stream_bytes = int64_t{16} << 20;

// An ordinary store reads a line before it overwrites it; a streaming one does not. `stream_end` after the last one.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    const int64_t head = -reinterpret_cast<uintptr_t>(out) & 15;
    if (head < bytes) {
        std::memcpy(out, in, head);
        int64_t i = head;
        for (; i + 16 <= bytes; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
        std::memcpy(out + i, in + i, bytes - i);
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

// Streaming stores are not ordered with others: no thread may be told of the data before this.
inline void stream_end() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace kvmmap
