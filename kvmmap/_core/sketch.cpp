#include "sketch.h"

#include "cpu.h"

namespace kvmmap {

const SketchKernels& sketch_kernels() {
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx2: return sketch_avx2;
        case Isa::avx512:
        case Isa::amx: return sketch_avx512;
#endif
        default: return sketch_portable;  // on AArch64, too
    }
}

}  // namespace kvmmap
