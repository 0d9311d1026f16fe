#include "digest.h"

#include "cpu.h"
#include "hash.h"

namespace kvmmap {

void xxh64_of_each(const char* const* ranges, int64_t count, int64_t size, uint64_t* out) {
    int64_t done = 0;
#if defined(__x86_64__)
    const Isa isa = current_isa();
    if (size >= 32 && (isa == Isa::avx512 || isa == Isa::amx))
        for (; done + 16 <= count; done += 16) xxh64_of_16(ranges + done, size, out + done);
#endif
    for (; done < count; ++done) out[done] = xxh64(ranges[done], size);
}

}  // namespace kvmmap
