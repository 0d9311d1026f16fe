// Memory for the length of a call. Chunks of a prompt want tens of megabytes, which the C library maps anew for each call: page by
// page, that took a fifth of the time of attention over 4,096 positions. Pages of 2 MiB are asked for there.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvmmap {

// Bytes that are not set to anything, aligned to 64.
class Room {
    static constexpr size_t huge_page = size_t{2} << 20, many = 2 * huge_page;

  public:
    explicit Room(int64_t bytes) {
        const bool large = static_cast<size_t>(bytes) >= many;
        const size_t unit = large ? huge_page : 64, size = (static_cast<size_t>(bytes) / unit + 1) * unit;
        memory_.reset(static_cast<char*>(std::aligned_alloc(unit, size)));
        if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
        if (large) madvise(memory_.get(), size, MADV_HUGEPAGE);  // where it fails, pages are small
#endif
    }

    char* data() const { return memory_.get(); }
    float* floats() const { return reinterpret_cast<float*>(memory_.get()); }

  private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    std::unique_ptr<char, Free> memory_;
};

}  // namespace kvmmap
