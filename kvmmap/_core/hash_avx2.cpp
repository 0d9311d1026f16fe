#include "hash_kernels.h"

namespace kvmmap {

const HashKernels hash_avx2 = {xxh3};

}  // namespace kvmmap
