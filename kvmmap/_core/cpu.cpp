#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace kvmmap {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::neon: return "neon";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
    }
    return "unknown";
}

bool isa_available(Isa isa) {
    if (isa == Isa::portable) return true;
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks the system (XGETBV) whether it saves the wide registers.
    __builtin_cpu_init();
    if (isa == Isa::avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
    if (isa == Isa::neon) return true;  // Advanced SIMD is part of every AArch64
#endif
    return false;
}

static Isa best_isa() {
    for (int i = isa_count - 1; i > 0; --i)
        if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
    return Isa::portable;
}

static Isa initial_isa() {
    const char* wanted = std::getenv("KVMMAP_KERNEL");
    if (wanted)
        for (int i = 0; i < isa_count; ++i)
            if (!std::strcmp(wanted, isa_name(static_cast<Isa>(i))) && isa_available(static_cast<Isa>(i)))
                return static_cast<Isa>(i);
    return best_isa();
}

static std::atomic<int>& selected() {
    static std::atomic<int> value{static_cast<int>(initial_isa())};
    return value;
}

Isa current_isa() { return static_cast<Isa>(selected().load(std::memory_order_relaxed)); }

bool set_isa(Isa isa) {
    if (!isa_available(isa)) return false;
    selected().store(static_cast<int>(isa), std::memory_order_relaxed);
    return true;
}

}  // namespace kvmmap
