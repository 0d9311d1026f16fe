// Attention on any processor: four floats at a time, which is what the compiler's baseline has.
#include "attend_floats.h"

namespace kvmmap {

const AttendKernel attend_portable = kernel_of<Floats<4>>();
const AttendKernel attend_floats_portable = kernel_of<Floats<4, float>>();
const AttendKernel attend_f16_portable = kernel_of<Floats<4, F16>>();
const AttendKernel attend_bf16_portable = kernel_of<Floats<4, Bf16>>();

}  // namespace kvmmap
