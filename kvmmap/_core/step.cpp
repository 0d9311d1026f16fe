#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "half.h"
#include "io.h"

namespace kvmmap {
namespace {

constexpr int most_arrays = 4;

float number_at(const char* row, int64_t d, Dtype dtype) {
    if (dtype == Dtype::f32) {
        float value;
        std::memcpy(&value, row + 4 * d, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, row + 2 * d, 2);
    return dtype == Dtype::f16 ? f16_to_f32(half) : bf16_to_f32(half);
}

void narrow(const float* from, int64_t count, Dtype dtype, void* to) {
    auto* halves = static_cast<uint16_t*>(to);
    if (dtype == Dtype::f32) std::memcpy(to, from, 4 * count);
    else if (dtype == Dtype::f16) for (int64_t i = 0; i < count; ++i) halves[i] = f32_to_f16(from[i]);
    else for (int64_t i = 0; i < count; ++i) halves[i] = f32_to_bf16(from[i]);
}

}  // namespace

std::vector<int64_t> StepLayer::row_bytes() const {
    std::vector<int64_t> sizes;
    for (const auto& [format, numbers] : {std::pair(keys, dim), std::pair(values, value_dim)}) {
        sizes.push_back(kv_heads * code_bytes(format.codec, numbers));
        if (const int64_t scale = scale_bytes(format.codec)) sizes.push_back(kv_heads * scale);
    }
    return sizes;
}

Appended append_step(const StepLayer& layer, int fd, int64_t position, const RowGrid& keys, const RowGrid& values) {
    Write writes[most_arrays];
    int count = 0;
    const int64_t row = position % layer.encoded_rows;
    const auto place = [&](int64_t bytes) {
        char* to = layer.encoded[count] + row * bytes;
        writes[count] = {layer.offsets[count] + position * bytes, to, bytes};
        ++count;
        return to;
    };
    const auto encode = [&](RowFormat format, const RowGrid& rows) {
        char* codes = place(layer.kv_heads * code_bytes(format.codec, rows.dim));
        const int64_t scale = scale_bytes(format.codec);
        return encode_grid(format, rows, codes, scale ? place(layer.kv_heads * scale) : nullptr, 1);
    };
    const int64_t bad_key = encode(layer.keys, keys);
    if (bad_key >= 0) return {bad_key, 0};
    const int64_t bad_value = encode(layer.values, values);
    if (bad_value >= 0) return {-2 - bad_value, 0};
    if (const int error = write_all(fd, writes, count)) return {-1, error};
    if (layer.keeps_recent) {
        keep_rows(layer.ring, position, keys, values);
        if (position < layer.sinks) keep_rows(layer.first, position, keys, values);
    }
    return {-1, 0};
}

bool attend_step(const StepLayer& layer, const StepQuery& query, const AttendExtent& extent, int64_t length) {
    const RowGrid& rows = query.rows;
    const int64_t heads = rows.inner;
    std::vector<float> numbers(heads * (layer.dim + layer.value_dim + 1));
    float *wide = numbers.data(), *out = wide + heads * layer.dim, *lse = out + heads * layer.value_dim;
    for (int64_t head = 0; head < heads; ++head) {
        const char* row = static_cast<const char*>(rows.data) + head * rows.inner_stride;
        for (int64_t d = 0; d < layer.dim; ++d)
            if (!std::isfinite(wide[head * layer.dim + d] = number_at(row, d, rows.dtype))) return false;
    }
    const AttendRange range{0, layer.kv_heads, query.window ? std::max<int64_t>(0, length - query.window) : 0, length};
    AttendJob job{};
    job.n = 1, job.q_heads = heads, job.kv_heads = layer.kv_heads, job.dim = layer.dim, job.value_dim = layer.value_dim;
    job.queries = wide, job.out = out, job.lse = lse;
    job.short_queries = rows.dtype != Dtype::f32;
    job.scale = query.scale, job.softcap = query.softcap, job.query_start = length - 1;
    job.causal = true, job.window = query.window;
    job.ranges = &range, job.num_ranges = 1;
    if (layer.keeps_recent) attend_recent(job, &extent, 1, {layer.ring, layer.first, layer.window, length}, query.threads);
    else attend(job, &extent, 1, query.threads);
    narrow(out, heads * layer.value_dim, rows.dtype, query.out);
    return true;
}

}  // namespace kvmmap
