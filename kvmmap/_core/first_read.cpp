#include "first_read.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "rows_run.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvmmap {
namespace {

// Bytes of rows that are attended over before they are hashed. Second-level caches have 512 KiB and more, and attention
// fetches ahead into them.
constexpr int64_t step_bytes = 128 * 1024;

// Bytes of rows whose pages are mapped at a time.
constexpr int64_t mapped_bytes = int64_t{8} << 20;

// Maps the pages of memory that is about to be read, in two thirds of the time that page faults take. Systems before Linux 5.14
// don't know it, and what the disk can't give stays as it is: the read itself tells.
//
// The system maps what it has in memory of the 64 KiB around a page with it (fault_around_bytes). To ask for every page takes half as
// long again, as it looks for each then.
void populate([[maybe_unused]] const char* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr int populate_read = 22;  // MADV_POPULATE_READ
    constexpr uintptr_t around = 64 * 1024;
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto from = reinterpret_cast<uintptr_t>(start) / page * page;
    const auto to = reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes);
    for (uintptr_t at = from; at < to; at = (at / around + 1) * around)
        if (madvise(reinterpret_cast<void*>(at), page, populate_read)) return;
#endif
}

}  // namespace

FirstRead::FirstRead(const HashedBlocks& blocks, bool hashes)
    : blocks_(blocks), hashes_(hashes), row_bytes_(std::max<int64_t>(1, blocks.row_bytes())), flags_(new Flags[blocks.count]) {}

int64_t FirstRead::step(int64_t tile) const {
    const int64_t rows = hashes_ ? step_bytes / row_bytes_ : mapped_blocks() * blocks_.size;
    return std::max<int64_t>(1, rows / tile) * tile;
}

int64_t FirstRead::mapped_blocks() const { return std::max<int64_t>(1, mapped_bytes / (blocks_.size * row_bytes_)); }

int64_t FirstRead::at(int64_t row) const {
    return std::lower_bound(blocks_.numbers, blocks_.numbers + blocks_.count, row / blocks_.size) - blocks_.numbers;
}

void FirstRead::map(int64_t start, int64_t stop) {
    const int64_t first = at(start);
    if (first == blocks_.count || blocks_.first_row(first) >= stop || flags_[first].mapped.load(std::memory_order_relaxed)) return;
    const int64_t most = mapped_blocks();
    int64_t last = first;  // of consecutive blocks
    for (;; ++last) {
        flags_[last].mapped.store(true, std::memory_order_relaxed);
        const int64_t next = last + 1;
        if (next - first == most || next == blocks_.count || blocks_.numbers[next] != blocks_.numbers[last] + 1 ||
            blocks_.first_row(next) >= stop || flags_[next].mapped.load(std::memory_order_relaxed))
            break;
    }
    const int64_t from = blocks_.first_row(first), to = blocks_.last_row(last);
    for (int a = 0; a < blocks_.array_count; ++a) {
        const HashedArray& array = blocks_.arrays[a];
        populate(array.data + from * array.row_bytes, (to - from) * array.row_bytes);
    }
}

void FirstRead::hash(int64_t start, int64_t stop, bool follows) {
    if (!hashes_) return;
    for (int64_t i = at(start); i < blocks_.count && blocks_.first_row(i) < stop; ++i)
        if ((!follows || blocks_.last_row(i) <= stop) && !flags_[i].hashed.exchange(true, std::memory_order_relaxed)) blocks_.hash(i);
}

void FirstRead::prepare(int threads) {
    if (hashes_) return finish(threads);
    for (int64_t i = 0; i < blocks_.count; ++i) map(blocks_.first_row(i), blocks_.last_row(blocks_.count - 1));
}

void FirstRead::finish(int threads) {
    if (!hashes_) return;
    std::vector<int64_t> left;
    for (int64_t i = 0; i < blocks_.count; ++i)
        if (!flags_[i].hashed.exchange(true, std::memory_order_relaxed)) left.push_back(i);
    const auto count = static_cast<int64_t>(left.size());
    parallel_ranges(count, worth_threads(count * blocks_.size * row_bytes_, threads), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            map(blocks_.first_row(left[i]), blocks_.last_row(left[end - 1]));
            blocks_.hash(left[i]);
        }
    });
}

}  // namespace kvmmap
