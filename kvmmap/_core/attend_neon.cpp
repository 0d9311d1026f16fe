// Attention with Advanced SIMD, which has fused multiply-adds on every AArch64.
#include "attend_floats.h"

namespace kvmmap {

const AttendKernel attend_neon = kernel_of<Floats<4>>();
const AttendKernel attend_floats_neon = kernel_of<Floats<4, float>>();
const AttendKernel attend_f16_neon = kernel_of<Floats<4, F16>>();
const AttendKernel attend_bf16_neon = kernel_of<Floats<4, Bf16>>();

}  // namespace kvmmap
