// Attention with AVX2 and FMA.
#include "attend_floats.h"

namespace kvmmap {

const AttendKernel attend_avx2 = kernel_of<Floats<8>>();
const AttendKernel attend_floats_avx2 = kernel_of<Floats<8, float>>();
const AttendKernel attend_f16_avx2 = kernel_of<Floats<8, F16>>();
const AttendKernel attend_bf16_avx2 = kernel_of<Floats<8, Bf16>>();

}  // namespace kvmmap
