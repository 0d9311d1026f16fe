#include "hash_kernels.h"

namespace kvmmap {

const HashKernels hash_avx512 = {xxh3};

}  // namespace kvmmap
