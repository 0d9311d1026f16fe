#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(KVMMAP_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(KVMMAP_BYTE_PRODUCTS)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace kvmmap {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::neon: return "neon";
        case Isa::dotprod: return "dotprod";
        case Isa::i8mm: return "i8mm";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::amx: return "amx";
    }
    return "unknown";
}

#if defined(__x86_64__) && defined(__linux__) && defined(KVMMAP_AMX)
// True if the processor multiplies tiles of bytes, and the system lets this process use them: it must be asked once, as
// tiles make what it saves for each thread 8 KiB larger.
static bool tiles_available() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned amx_tile = 1u << 24, amx_int8 = 1u << 25;
    if ((d & (amx_tile | amx_int8)) != (amx_tile | amx_int8)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return permitted;
}
#endif

#if defined(__aarch64__) && defined(KVMMAP_BYTE_PRODUCTS)
// True if the processor has the products of bytes: SDOT, or SMMLA.
static bool byte_products(Isa isa) {
#if defined(__linux__)
    constexpr unsigned long dot_product = 1ul << 20, matrices = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
    return isa == Isa::dotprod ? (getauxval(AT_HWCAP) & dot_product) != 0 : (getauxval(AT_HWCAP2) & matrices) != 0;
#elif defined(__APPLE__)
    int present = 0;
    size_t size = sizeof present;
    const char* name = isa == Isa::dotprod ? "hw.optional.arm.FEAT_DotProd" : "hw.optional.arm.FEAT_I8MM";
    return sysctlbyname(name, &present, &size, nullptr, 0) == 0 && present;
#else
    return (void)isa, false;
#endif
}
#endif

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
#if defined(__linux__) && defined(KVMMAP_AMX)
    // Every processor with tiles has VBMI, which its kernels use besides.
    if (isa == Isa::amx) return isa_available(Isa::avx512) && __builtin_cpu_supports("avx512vbmi") && tiles_available();
#endif
#elif defined(__aarch64__)
    if (isa == Isa::neon) return true;  // Advanced SIMD is part of every AArch64
#if defined(KVMMAP_BYTE_PRODUCTS)
    if (isa == Isa::dotprod || isa == Isa::i8mm) return byte_products(isa);
#endif
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
