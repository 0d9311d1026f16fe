// Attention with AVX2 over int8 codes for queries that were given in 16 bits: with words of 16 bits in place of floats.
#include "attend_words_avx2.h"

namespace kvmmap {

const AttendKernel attend_short_avx2 = kernel_of<Words>();

}  // namespace kvmmap
