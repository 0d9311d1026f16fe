#include "attend_decode.h"

#include <algorithm>

namespace kvmmap {
namespace {

constexpr int64_t decoded_bytes = 512 * 1024;  // that stay in the second-level cache

int64_t number_bytes(Form form) { return form == Form::floats ? 4 : form == Form::levels ? 1 : 0; }

}  // namespace

Numbers numbers_of(const CodedRows& keys, const CodedRows& values) {
    if (is_integer(keys.format.codec) && is_integer(values.format.codec)) return Numbers::codes;
    if (keys.format.codec != values.format.codec) return Numbers::floats;
    return keys.format.codec == Codec::f16 ? Numbers::f16 : keys.format.codec == Codec::bf16 ? Numbers::bf16 : Numbers::floats;
}

AttendForms forms_of(const CodedRows& keys, const CodedRows& values) {
    const Numbers numbers = numbers_of(keys, values);
    if (numbers == Numbers::f16 || numbers == Numbers::bf16) return {Form::as_stored, Form::as_stored};
    if (!is_integer(keys.format.codec) || !is_integer(values.format.codec)) return {Form::floats, Form::floats};
    const auto form = [](const CodedRows& rows) { return has_levels(rows.format.codec) ? Form::levels : Form::as_stored; };
    return {form(keys), form(values)};
}

DecodedRows::DecodedRows(const AttendJob& job, const CodedRows& keys, const CodedRows& values, int64_t tile, int64_t most)
    : job_(&job) {
    const AttendForms forms = forms_of(keys, values);
    keys_.rows = keys, keys_.dim = job.dim, keys_.form = forms.keys;
    values_.rows = values, values_.dim = job.value_dim, values_.form = forms.values;
    const int64_t position = job.kv_heads * (job.dim * number_bytes(forms.keys) + job.value_dim * number_bytes(forms.values));
    span_ = std::max<int64_t>(1, decoded_bytes / (tile * position + 1)) * tile;
    most_ = std::min(span_, most);
}

void DecodedRows::Side::reserve(int64_t count) {
    if (form == Form::as_stored || memory) return;
    memory.reset(new char[count * dim * number_bytes(form) + 64]);
    // A row of f32 numbers has no scale.
    scales.assign(count, 1.0f);
}

void DecodedRows::Side::decode(int64_t first, int64_t count, char* out) const {
    const CodecKernels& kernels = codec_kernels();
    const Codec codec = rows.format.codec;
    const char* codes = rows.codes + first * code_bytes(codec, dim);
    if (form == Form::levels) return kernels.levels(codec, codes, count, dim, reinterpret_cast<int8_t*>(out));
    kernels.decode(codec, codes, rows.scales + first * scale_bytes(codec), count, dim, reinterpret_cast<float*>(out));
}

void DecodedRows::take(Side& side, const AttendRange& range, const void*& rows, const float*& scales) {
    const int64_t heads = job_->kv_heads, first = range.start * heads, count = range.stop - range.start;
    if (side.form == Form::as_stored) {
        rows = side.rows.codes + first * side.dim;
        scales = reinterpret_cast<const float*>(side.rows.scales) + first;
        return;
    }
    side.reserve(most_ * heads);
    char* out = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(side.memory.get()) + 63) / 64 * 64);
    const int64_t row_bytes = side.dim * number_bytes(side.form);
    if (range.head_end - range.head == heads) {
        side.decode(first, count * heads, out);
    } else {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = i * heads + range.head;
            side.decode(first + row, range.head_end - range.head, out + row * row_bytes);
        }
    }
    if (side.form == Form::levels) codec_kernels().level_scales(side.rows.scales + 2 * first, count * heads, side.scales.data());
    rows = out;
    scales = side.scales.data();
}

AttendJob DecodedRows::take(const AttendRange& range) {
    AttendJob part = *job_;
    part.first_position += range.start;
    take(keys_, range, part.key_rows, part.key_scales);
    take(values_, range, part.value_rows, part.value_scales);
    return part;
}

}  // namespace kvmmap
