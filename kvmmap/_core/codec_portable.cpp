// The row codecs on any processor.
#include "codec_rows.h"

namespace kvmmap {

const CodecKernels codec_portable = codec_kernels_of<Plain>();

}  // namespace kvmmap
