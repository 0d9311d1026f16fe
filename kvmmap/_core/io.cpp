#include "io.h"

#include <cerrno>
#include <fcntl.h>
#include <unistd.h>

namespace kvmmap {

int write_all(int fd, const Write* writes, int count) {
    for (int i = 0; i < count; ++i) {
        const char* data = static_cast<const char*>(writes[i].data);
        int64_t left = writes[i].size, offset = writes[i].offset;
        while (left > 0) {
            ssize_t written = ::pwrite(fd, data, static_cast<size_t>(left), static_cast<off_t>(offset));
            if (written < 0) {
                if (errno == EINTR) continue;
                return errno;
            }
            if (written == 0) return EIO;  // no progress and no error: never loop on it
            data += written;
            offset += written;
            left -= written;
        }
    }
    return 0;
}

void start_sync(int fd, int64_t offset, int64_t size) {
#ifdef __linux__
    // Only SYNC_FILE_RANGE_WRITE: waiting would collect an error that the next fdatasync is to report.
    ::sync_file_range(fd, static_cast<off64_t>(offset), static_cast<off64_t>(size), SYNC_FILE_RANGE_WRITE);
#else
    (void)fd, (void)offset, (void)size;
#endif
}

bool punch_hole(int fd, int64_t offset, int64_t size) {
#ifdef __linux__
    return ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                       static_cast<off_t>(size)) == 0;
#else
    (void)fd, (void)offset, (void)size;
    return false;
#endif
}

static uint64_t mix(uint64_t h) {  // the finaliser of splitmix64
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
    return h ^ (h >> 31);
}

uint64_t checked_word(uint64_t value, uint64_t index, uint64_t salt) {
    const uint64_t check = mix(mix(salt + index) + value) >> value_bits;
    return value | check << value_bits;
}

bool take_checked(uint64_t word, uint64_t index, uint64_t salt, uint64_t* value) {
    *value = word & ((uint64_t{1} << value_bits) - 1);
    return checked_word(*value, index, salt) == word;
}

void store_word(void* address, uint64_t word) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n(static_cast<uint64_t*>(address), word, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

uint64_t load_word(const void* address) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(static_cast<const uint64_t*>(address), __ATOMIC_ACQUIRE);
}

}  // namespace kvmmap
