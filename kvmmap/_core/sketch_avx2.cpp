// Sketches with AVX2 and FMA.
#include "sketch_lanes.h"

namespace kvmmap {

const SketchKernels sketch_avx2 = sketching<8>;

}  // namespace kvmmap
