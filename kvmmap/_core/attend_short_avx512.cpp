// Attention with AVX-512 over int8 codes for queries that were given in 16 bits: with two digits.
#include "attend_walks_avx512.h"

namespace kvmmap {

const AttendKernel attend_short_avx512 = bytes_kernel<2>();

}  // namespace kvmmap
