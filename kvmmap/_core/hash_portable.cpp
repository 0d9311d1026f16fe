#include "hash_kernels.h"

namespace kvmmap {

const HashKernels hash_portable = {xxh3};

}  // namespace kvmmap
