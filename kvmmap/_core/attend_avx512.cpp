// Attention with AVX-512: over int8 codes with three digits, and over floats.
#include "attend_halves_avx512.h"
#include "attend_walks_avx512.h"

namespace kvmmap {

const AttendKernel attend_avx512 = bytes_kernel<3>();
const AttendKernel attend_floats_avx512 = kernel_of<Floats<16, float>>();
const AttendKernel attend_f16_avx512 = halves_kernel<F16>();
const AttendKernel attend_bf16_avx512 = halves_kernel<Bf16>();

}  // namespace kvmmap
