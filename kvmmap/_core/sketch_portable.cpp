// Sketches with the compiler's baseline: SSE2, or Advanced SIMD, which every AArch64 has.
#include "sketch_lanes.h"

namespace kvmmap {

const SketchKernels sketch_portable = sketching<4>;

}  // namespace kvmmap
