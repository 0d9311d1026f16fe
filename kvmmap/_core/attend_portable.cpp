// Attention on any processor: four floats at a time, which is what the compiler's baseline has.
#include "attend_floats.h"

namespace kvmmap {

const AttendKernel attend_portable = kernel_of<Floats<4>>();
const AttendKernel attend_floats_portable = kernel_of<Floats<4, float>>();

}  // namespace kvmmap
