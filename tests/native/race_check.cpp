// One thread appends and publishes while others attend, and hash the blocks that they read: under ThreadSanitizer, which must find no race. What lies beyond a
// published length is poison (scales are NaN), and beyond the slabs lies a page that nobody may touch, so that a kernel
// that reads a row too many is seen even where its masked loads are not instrumented.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <thread>
#include <vector>

#include "../../kvmmap/_core/attend.h"
#include "../../kvmmap/_core/cpu.h"
#include "../../kvmmap/_core/first_read.h"
#include "../../kvmmap/_core/io.h"
#include "../../kvmmap/_core/rows_run.h"

using namespace kvmmap;

namespace {

// Memory that ends where a forbidden page begins.
template <class T>
class Slab {
  public:
    explicit Slab(int64_t count) {
        const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * static_cast<int64_t>(sizeof(T));
        size_ = (bytes + page - 1) / page * page + page;
        base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE)) std::perror("mmap"), std::exit(2);
        data_ = reinterpret_cast<T*>(base_ + size_ - page - bytes);
    }
    ~Slab() { munmap(base_, size_); }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;
    T* data() const { return data_; }

  private:
    int64_t size_;
    char* base_;
    T* data_;
};

constexpr int64_t block = 48;  // positions

struct Shape {
    int64_t capacity, heads, dim, value_dim, group;
};

// Value rows are all alike, so attention's result is known whatever the length and the keys.
float value_at(int64_t head, int64_t d) { return static_cast<float>((head * 37 + d * 11) % 120 - 60) / 16; }

int run(const Shape& s) {
    const int64_t rows = s.capacity * s.heads;
    const Slab<int8_t> keys(rows * s.dim), values(rows * s.value_dim);
    const Slab<float> key_scales(rows), value_scales(rows);
    for (int64_t i = 0; i < rows; ++i)
        key_scales.data()[i] = value_scales.data()[i] = std::numeric_limits<float>::quiet_NaN();
    alignas(64) uint64_t word = checked_word(0, 0, 1);
    std::atomic<int> wrong{0};
    std::atomic<int64_t> looks{0};

    std::thread writer([&] {
        std::vector<float> key(s.heads * s.dim), value(s.heads * s.value_dim);
        for (int64_t h = 0; h < s.heads; ++h)
            for (int64_t d = 0; d < s.value_dim; ++d) value[h * s.value_dim + d] = value_at(h, d);
        for (int64_t position = 0; position < s.capacity; ++position) {
            for (size_t i = 0; i < key.size(); ++i)
                key[i] = static_cast<float>((position * 31 + static_cast<int64_t>(i) * 17) % 200 - 100) / 64;
            const RowGrid k{key.data(), 1, s.heads, s.dim, 0, s.dim * 4, Dtype::f32};
            const RowGrid v{value.data(), 1, s.heads, s.value_dim, 0, s.value_dim * 4, Dtype::f32};
            const int64_t row = position * s.heads;
            quantize_grid(k, keys.data() + row * s.dim, key_scales.data() + row, 1);
            quantize_grid(v, values.data() + row * s.value_dim, value_scales.data() + row, 1);
            store_word(&word, checked_word(static_cast<uint64_t>(position + 1), 0, 1));
            // Wait for the readers now and then; relaxed, or it would order what publishing alone must.
            while (4 * looks.load(std::memory_order_relaxed) < position) std::this_thread::yield();
        }
    });

    auto read = [&](int threads) {
        const int64_t q_heads = s.heads * s.group;
        std::vector<float> queries(q_heads * s.dim), out(q_heads * s.value_dim), lse(q_heads);
        for (size_t i = 0; i < queries.size(); ++i) queries[i] = static_cast<float>(i % 7) / 8;
        uint64_t length = 0;
        while (length < static_cast<uint64_t>(s.capacity)) {
            if (!take_checked(load_word(&word), 0, 1, &length)) ++wrong;
            if (!length) continue;
            const AttendRange range{0, s.heads, 0, static_cast<int64_t>(length)};
            AttendJob job{};
            job.queries = queries.data(), job.n = 1, job.q_heads = q_heads, job.kv_heads = s.heads;
            job.dim = s.dim, job.value_dim = s.value_dim;
            const RowFormat int8{Codec::int8, false};
            const CodedRows key_rows{int8, reinterpret_cast<const char*>(keys.data()),
                                     reinterpret_cast<const char*>(key_scales.data())};
            const CodedRows value_rows{int8, reinterpret_cast<const char*>(values.data()),
                                       reinterpret_cast<const char*>(value_scales.data())};
            job.scale = 0.125f, job.query_start = range.stop - 1, job.causal = true;
            job.ranges = &range, job.num_ranges = 1, job.out = out.data(), job.lse = lse.data();
            std::vector<int64_t> numbers;
            for (int64_t first = 0; first < range.stop; first += block) numbers.push_back(first / block);
            std::vector<uint64_t> sums(numbers.size()), expected(numbers.size());
            HashedBlocks blocks{{{key_rows.codes, s.heads * s.dim}, {key_rows.scales, s.heads * 4},
                                 {value_rows.codes, s.heads * s.value_dim}, {value_rows.scales, s.heads * 4}},
                                4, 0, numbers.data(), static_cast<int64_t>(numbers.size()), block, range.stop, sums.data()};
            FirstRead first_read(blocks);
            const AttendExtent rows_read{0, key_rows, value_rows, &first_read};
            attend(job, &rows_read, 1, threads);
            first_read.finish(threads);
            blocks.sums = expected.data();
            block_checksums(blocks, 1);
            if (sums != expected) ++wrong;
            looks.fetch_add(1, std::memory_order_relaxed);
            for (int64_t q = 0; q < q_heads; ++q)
                for (int64_t d = 0; d < s.value_dim; ++d)
                    if (!(std::fabs(out[q * s.value_dim + d] - value_at(q / s.group, d)) < 0.02f)) ++wrong;
        }
    };
    std::thread one(read, 1), two(read, 2);
    writer.join(), one.join(), two.join();
    std::printf("%lld looks over %lld positions, %d wrong\n", static_cast<long long>(looks.load()),
                static_cast<long long>(s.capacity), wrong.load());
    return wrong.load() != 0;
}

}  // namespace

int main() {
    int failures = 0;
    for (int i = 0; i < isa_count; ++i) {
        if (!set_isa(static_cast<Isa>(i))) continue;
        std::printf("%s\n", isa_name(static_cast<Isa>(i)));
        failures += run({700, 2, 64, 64, 1}) + run({700, 1, 128, 128, 4}) + run({600, 3, 17, 5, 2});
    }
    return failures;
}
