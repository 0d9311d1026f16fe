// Sketches with AVX-512.
#include "sketch_lanes.h"

namespace kvmmap {

const SketchKernels sketch_avx512 = sketching<16>;

}  // namespace kvmmap
