#include "append.h"

namespace kvmmap {

int64_t append_rows(const RowGrid& keys, const EncodedRows& to_keys, const RowGrid& values, const EncodedRows& to_values,
                    const RecentRings* rings, int64_t start) {
    const int64_t bad_key = encode_grid(to_keys.format, keys, to_keys.codes, to_keys.scales, 1);
    if (bad_key >= 0) return bad_key;
    const int64_t bad_value = encode_grid(to_values.format, values, to_values.codes, to_values.scales, 1);
    if (bad_value >= 0) return -2 - bad_value;
    if (rings) keep_recent(*rings, start, keys, values);
    return -1;
}

}  // namespace kvmmap
