// avx2 kernels of the row codec.
#include "rows.h"
namespace kvmmap { const RowKernels rows_avx2 = rows_portable; }
