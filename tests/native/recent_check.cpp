// A process stores positions in a ring in shared memory, and others read it: none may see a row that is half of one position and
// half of another, or that of another position. The order of its stores is all that holds it together, so the processes have no
// other way to wait for each other.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kvmmap/_core/cpu.h"
#include "../../kvmmap/_core/recent.h"

using namespace kvmmap;

namespace {

struct Shared {
    int64_t written;  // the newest position
    int done;
};

template <class T>
T* share(int64_t count) {
    void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::perror("mmap"), std::exit(2);
    return static_cast<T*>(memory);
}

// All numbers of a position's row are this one: an f16 or bf16, and finite.
uint16_t number_of(int64_t position, bool keys) { return static_cast<uint16_t>((position * 7 + (keys ? 0 : 3)) % 0x3bff); }

int64_t read_all(const RecentRing& ring, const Shared& shared, Dtype dtype) {
    int64_t rows = 0, wrong = 0;
    std::vector<uint16_t> out(ring.slots * std::max(ring.key_numbers, ring.value_numbers));
    while (!__atomic_load_n(&shared.done, __ATOMIC_RELAXED)) {
        const int64_t stop = __atomic_load_n(&shared.written, __ATOMIC_RELAXED) + 1, start = std::max<int64_t>(0, stop - ring.slots);
        for (const bool keys : {true, false}) {
            const int64_t count = keys ? ring.key_numbers : ring.value_numbers;
            std::fill(out.begin(), out.end(), 0xffff);
            read_rows(ring, keys, start, stop, dtype, reinterpret_cast<char*>(out.data()));
            for (int64_t p = start; p < stop; ++p) {
                const uint16_t* row = out.data() + (p - start) * count;
                if (row[0] == 0xffff) continue;  // not there any more, or being written
                ++rows;
                for (int64_t i = 0; i < count; ++i) wrong += row[i] != number_of(p, keys);
            }
        }
    }
    std::printf("%lld rows read, %lld numbers wrong\n", static_cast<long long>(rows), static_cast<long long>(wrong));
    std::fflush(stdout);
    return rows ? wrong : 1;
}

int run(int64_t slots, int64_t heads, int64_t dim, int64_t value_dim, int64_t positions, Dtype dtype) {
    auto* shared = share<Shared>(1);
    const RecentRing ring{share<uint64_t>(slots), share<uint16_t>(slots * heads * dim), share<uint16_t>(slots * heads * value_dim),
                          slots, heads * dim, heads * value_dim};
    std::vector<pid_t> readers;
    for (int i = 0; i < 2; ++i) {
        const pid_t reader = fork();
        if (reader < 0) std::perror("fork"), std::exit(2);
        if (reader == 0) _exit(read_all(ring, *shared, dtype) != 0);
        readers.push_back(reader);
    }
    std::vector<uint16_t> keys(ring.key_numbers), values(ring.value_numbers);
    for (int64_t p = 0; p < positions; ++p) {
        std::fill(keys.begin(), keys.end(), number_of(p, true));
        std::fill(values.begin(), values.end(), number_of(p, false));
        const RowGrid k{keys.data(), 1, heads, dim, 0, dim * 2, dtype}, v{values.data(), 1, heads, value_dim, 0, value_dim * 2, dtype};
        keep_rows(ring, p, k, v);
        __atomic_store_n(&shared->written, p, __ATOMIC_RELAXED);
        if (p % 4096 == 0) usleep(100);  // where there are fewer processors than processes
    }
    __atomic_store_n(&shared->done, 1, __ATOMIC_RELAXED);
    int failures = 0;
    for (const pid_t reader : readers) {
        int status = 0;
        waitpid(reader, &status, 0);
        failures += status != 0;
    }
    return failures;
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t positions = argc > 1 ? std::atoll(argv[1]) : 20'000;
    return run(2, 1, 64, 64, positions, Dtype::bf16) + run(3, 8, 128, 128, positions, Dtype::f16) +
           run(5, 3, 17, 5, positions, Dtype::bf16);
}
