// avx512 kernels of the row codec.
#include "rows.h"
namespace kvmmap { const RowKernels rows_avx512 = rows_portable; }
