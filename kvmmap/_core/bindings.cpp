// Python's view of the core. Bindings only bind: buffers are unpacked and their sizes checked here, and all the
// work is elsewhere. What users see, with its errors in words, is kvmmap/quantize.py and kvmmap/layer.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "attend.h"
#include "bindings.h"
#include "blocks.h"
#include "buffers.h"
#include "codec_run.h"
#include "cpu.h"
#include "ggml.h"
#include "half.h"
#include "hash.h"
#include "io.h"
#include "merge.h"
#include "parallel.h"
#include "recent.h"
#include "room.h"
#include "rows_run.h"
#include "sketch.h"

using namespace nb::literals;
using namespace kvmmap;

namespace {

int64_t quantize_rows(nb::handle x_object, int dtype, nb::handle codes_object, nb::handle scales_object,
                      int threads) {
    Buffer x(x_object, reading), codes(codes_object, writing), scales(scales_object, writing);
    const RowGrid grid = to_grid(x, to_dtype(dtype));
    const int64_t rows = grid.outer * grid.inner;
    auto* c = codes.at_least<int8_t>(rows * grid.dim, "codes: too small");
    auto* s = scales.at_least<float>(rows * 4, "scales: too small or not aligned");
    if (rows == 0) return -1;
    if (rows * grid.dim < 16384) return quantize_grid(grid, c, s, 1);  // releasing the GIL takes longer than this
    nb::gil_scoped_release released;
    return quantize_grid(grid, c, s, threads);
}

void dequantize_rows(nb::handle codes_object, nb::handle scales_object, int64_t dim, nb::handle out_object, int dtype,
                     int threads) {
    Buffer codes(codes_object, contiguous), scales(scales_object, contiguous), out(out_object, writing);
    const int64_t rows = scales.bytes() / 4;
    const Dtype type = to_dtype(dtype);
    auto* s = scales.at_least<float>(rows * 4, "scales: not aligned");
    auto* c = codes.at_least<int8_t>(rows * dim, "codes: too small");
    if (out.bytes() < rows * dim * dtype_bytes(type)) throw nb::value_error("out: too small");
    if (rows * dim < 16384) return dequantize_grid(c, s, rows, dim, type, out.data(), 1);
    nb::gil_scoped_release released;
    dequantize_grid(c, s, rows, dim, type, out.data(), threads);
}

RowArrays to_arrays(RowFormat format, const nb::tuple& arrays, int64_t dim, int flags) {
    if (arrays.size() != RowArrays::count(format)) throw nb::value_error("arrays: codes, and scales if the codec has some");
    return RowArrays(format, arrays, 0, dim, flags);
}

int64_t encode_rows(int codec, int transform, nb::handle x_object, int dtype, nb::tuple arrays_object, int threads) {
    Buffer x(x_object, reading);
    const RowGrid grid = to_grid(x, to_dtype(dtype));
    const RowFormat format = to_format(codec, transform, grid.dim);
    const RowArrays arrays = to_arrays(format, arrays_object, grid.dim, writing);
    const int64_t rows = grid.outer * grid.inner;
    arrays.hold(rows);
    if (rows == 0) return -1;
    if (rows * grid.dim < 16384) return encode_grid(format, grid, arrays.codes(), arrays.scales(), 1);
    nb::gil_scoped_release released;
    return encode_grid(format, grid, arrays.codes(), arrays.scales(), threads);
}

void decode_rows(int codec, int transform, nb::tuple arrays_object, int64_t dim, nb::handle out_object, int dtype, int threads) {
    const Dtype type = to_dtype(dtype);
    const RowFormat format = to_format(codec, transform, dim);
    const RowArrays arrays = to_arrays(format, arrays_object, dim, contiguous);
    Buffer out(out_object, writing);
    const int64_t rows = dim ? out.bytes() / (dim * dtype_bytes(type)) : 0;
    if (out.bytes() != rows * dim * dtype_bytes(type)) throw nb::value_error("out: not a multiple of a row");
    arrays.hold(rows);
    if (rows * dim < 16384) return decode_grid(format, arrays.codes(), arrays.scales(), rows, dim, type, out.data(), 1);
    nb::gil_scoped_release released;
    decode_grid(format, arrays.codes(), arrays.scales(), rows, dim, type, out.data(), threads);
}

GgmlFormat to_ggml(int type, int64_t group, bool interleaved, int64_t dim) {
    if (!ggml_known(type)) throw nb::value_error("unknown ggml type");
    const GgmlFormat format{static_cast<Ggml>(type), group, interleaved};
    if (group < 0 || (group & (group - 1)) || !ggml_takes(format, dim)) throw nb::value_error("this type does not take such rows");
    return format;
}

int64_t encode_ggml_rows(int type, int64_t group, bool interleaved, nb::handle x_object, int dtype, nb::handle out_object,
                         int threads) {
    Buffer x(x_object, reading), out(out_object, writing);
    const RowGrid grid = to_grid(x, to_dtype(dtype));
    const GgmlFormat format = to_ggml(type, group, interleaved, grid.dim);
    const int64_t rows = grid.outer * grid.inner;
    char* to = out.at_least<char>(rows * ggml_row_bytes(format.type, grid.dim), "out: too small");
    if (rows == 0) return -1;
    nb::gil_scoped_release released;
    return encode_ggml(format, grid, to, threads);
}

void decode_ggml_rows(int type, int64_t group, bool interleaved, nb::handle in_object, int64_t dim, nb::handle out_object,
                      int dtype, int threads) {
    Buffer in(in_object, contiguous), out(out_object, writing);
    const Dtype kind = to_dtype(dtype);
    const GgmlFormat format = to_ggml(type, group, interleaved, dim);
    const int64_t rows = out.bytes() / (dim * dtype_bytes(kind));
    const char* from = in.at_least<char>(rows * ggml_row_bytes(format.type, dim), "rows: too small");
    nb::gil_scoped_release released;
    decode_ggml(format, from, rows, dim, kind, out.data(), threads);
}

int64_t special_ggml(int type, nb::handle in_object) {
    Buffer in(in_object, contiguous);
    if (!ggml_known(type)) throw nb::value_error("unknown ggml type");
    return special_numbers(static_cast<Ggml>(type), in.data(), in.bytes());
}

// A row of numbers -> f32; false if some are not finite. By dtype outside of the loop, which compilers turn into vectors then.
template <class Number, class Widen>
bool widen_row(const char* in, int64_t dim, float* out, Widen&& widen) {
    uint32_t top = 0;
    for (int64_t d = 0; d < dim; ++d) {
        Number x;
        std::memcpy(&x, in + d * static_cast<int64_t>(sizeof x), sizeof x);
        out[d] = widen(x);
        const uint32_t size = f32_bits(out[d]) & 0x7fffffffu;
        top = size > top ? size : top;
    }
    return top < 0x7f800000u;
}

// Queries of any dtype and strides -> f32 side by side, or the first row that is not finite.
int64_t widen_queries(const RowGrid& x, float* out) {
    for (int64_t row = 0; row < x.outer * x.inner; ++row, out += x.dim) {
        const char* in = static_cast<const char*>(x.data) + row / x.inner * x.outer_stride + row % x.inner * x.inner_stride;
        const bool finite = x.dtype == Dtype::f32   ? widen_row<float>(in, x.dim, out, [](float value) { return value; })
                            : x.dtype == Dtype::f16 ? widen_row<uint16_t>(in, x.dim, out, f16_to_f32)
                                                    : widen_row<uint16_t>(in, x.dim, out, bf16_to_f32);
        if (!finite) return row;
    }
    return -1;
}

// What attend returns where a block does not have the checksum that it should have.
constexpr int64_t block_differs = -2;

// What attend returns where all blocks match, and the caller has to note that.
constexpr int64_t blocks_match = -3;

// Returns the number of the first row of queries that holds a NaN or an infinity; -1 if there is none.
int64_t attend_rows(nb::handle queries_object, int dtype, nb::tuple slabs, int64_t kv_heads, int64_t value_dim,
                    int64_t first_position, nb::handle ranges_object, float scale, float softcap, int64_t query_start,
                    bool causal, int64_t window, int64_t sinks, nb::handle out_object, nb::handle lse_object,
                    int threads, const std::vector<int>& codecs, nb::object recent, bool exact, nb::object unread) {
    if (kv_heads < 1 || codecs.size() != 4) throw nb::value_error("at least one head; codec and transform of keys and of values");
    Buffer queries(queries_object, reading), ranges(ranges_object, contiguous);
    Buffer out(out_object, writing), lse(lse_object, writing);
    const RowGrid grid = to_grid(queries, to_dtype(dtype));
    if (grid.inner % kv_heads) throw nb::value_error("query heads must be a multiple of KV heads");

    AttendJob job{};
    job.n = grid.outer, job.q_heads = grid.inner, job.kv_heads = kv_heads, job.dim = grid.dim, job.value_dim = value_dim;
    const RowFormat key_format = to_format(codecs[0], codecs[1], job.dim), value_format = to_format(codecs[2], codecs[3], value_dim);
    const size_t of_keys = RowArrays::count(key_format);
    const size_t arrays = of_keys + RowArrays::count(value_format);
    // Rows in one place; or pairs of a first row and such rows, in the order of their first rows.
    const bool apart = slabs.size() && nb::isinstance<nb::tuple>(slabs[0]);
    const size_t count = apart ? slabs.size() : 1;
    std::vector<std::unique_ptr<RowArrays>> held;
    std::vector<AttendExtent> extents;
    int64_t rows = 0;
    for (size_t i = 0; i < count; ++i) {
        const nb::tuple pair = apart ? nb::cast<nb::tuple>(slabs[i]) : nb::tuple();
        if (apart && pair.size() != 2) throw nb::value_error("slabs: first row and arrays");
        const int64_t start = apart ? nb::cast<int64_t>(pair[0]) : 0;
        const nb::tuple parts = apart ? nb::cast<nb::tuple>(pair[1]) : slabs;
        if (parts.size() != arrays) throw nb::value_error("slabs: the arrays of keys, then of values");
        if (i ? start <= extents.back().start || start > rows : start != 0) throw nb::value_error("slabs: rows are missing between");
        const RowArrays& keys = *held.emplace_back(std::make_unique<RowArrays>(key_format, parts, 0, job.dim, contiguous));
        const RowArrays& values = *held.emplace_back(std::make_unique<RowArrays>(value_format, parts, of_keys, value_dim, contiguous));
        const int64_t here = keys.rows() / kv_heads;
        keys.hold(here * kv_heads);
        values.hold(here * kv_heads);
        rows = start + here;
        extents.push_back({start, {key_format, keys.codes(), keys.scales()}, {value_format, values.codes(), values.scales()}});
    }
    job.first_position = first_position;
    job.short_queries = grid.dtype != Dtype::f32 && !exact;
    job.scale = scale, job.softcap = softcap, job.query_start = query_start;
    job.causal = causal, job.window = window, job.sinks = sinks;
    job.num_ranges = ranges.bytes() / static_cast<int64_t>(sizeof(AttendRange));
    job.ranges = ranges.at_least<AttendRange>(0, "ranges: not aligned");
    for (int64_t i = 0; i < job.num_ranges; ++i) {
        const AttendRange& r = job.ranges[i];
        if (r.head < 0 || r.head > r.head_end || r.head_end > kv_heads || r.start < 0 || r.start > r.stop || r.stop > rows)
            throw nb::value_error("a range outside of the rows");
    }
    job.out = out.at_least<float>(job.rows() * value_dim * 4, "out: too small");
    job.lse = lse.at_least<float>(job.rows() * 4, "lse: too small");

    const nb::tuple parts = recent.is_none() ? nb::tuple() : nb::cast<nb::tuple>(recent);
    RecentView view{};
    if (parts.size()) {
        if (parts.size() != 3) throw nb::value_error("recent: window, length, and the rings");
        const RecentRings rings = nb::cast<const Rings&>(parts[2]).view(kv_heads * job.dim, kv_heads * value_dim);
        view = {rings.ring, rings.first, nb::cast<int64_t>(parts[0]), nb::cast<int64_t>(parts[1])};
    }

    // An entry an extent: None, or its blocks that were not read before.
    std::vector<std::unique_ptr<UnreadBlocks>> first;
    if (!unread.is_none()) {
        const nb::tuple entries = nb::cast<nb::tuple>(unread);
        if (entries.size() != count) throw nb::value_error("unread: an entry an extent");
        for (size_t i = 0; i < count; ++i) {
            if (entries[i].is_none()) continue;
            const nb::tuple arrays_here = apart ? nb::cast<nb::tuple>(nb::cast<nb::tuple>(slabs[i])[1]) : slabs;
            const nb::tuple entry = nb::cast<nb::tuple>(entries[i]);
            if (!UnreadBlocks::fits(entry)) throw nb::value_error("unread: track, blocks, size, stop, sums; or checksums and their first; and a list and a number");
            extents[i].first_read = &first.emplace_back(std::make_unique<UnreadBlocks>(arrays_here, entry))->first_read;
        }
    }

    {
        nb::gil_scoped_release released;
        const Room wide(job.rows() * job.dim * 4);
        const int64_t bad = widen_queries(grid, wide.floats());
        if (bad >= 0) return bad;
        job.queries = wide.floats();
        const auto count_of_extents = static_cast<int64_t>(extents.size());
        if (parts.size()) attend_recent(job, extents.data(), count_of_extents, view, threads);
        else attend(job, extents.data(), count_of_extents, threads);
        for (const auto& blocks : first) blocks->first_read.finish(threads);
        if (!std::all_of(first.begin(), first.end(), [](const auto& blocks) { return blocks->match(); })) return block_differs;
    }
    bool noted = true;
    for (const auto& blocks : first) noted &= blocks->note();
    return noted ? -1 : blocks_match;
}

// The arrays of merged attention: its state, and a part, or what comes of all parts.
class Merged {
  public:
    Merged(nb::handle state_object, int state_flags, nb::handle out_object, nb::handle lse_object, int part_flags)
        : state_(state_object, state_flags), out_(out_object, part_flags), lse_(lse_object, part_flags),
          rows(lse_.bytes() / 4), width(rows ? out_.bytes() / 4 / rows : 0),
          state(state_.at_least<double>(rows * (merge_head + width) * 8, "state: too small or not aligned")),
          out(out_.at_least<float>(0, "out: not aligned")), lse(lse_.at_least<float>(0, "lse: not aligned")) {
        if (out_.bytes() != rows * width * 4) throw nb::value_error("out: not of the lse's shape");
    }

  private:
    Buffer state_, out_, lse_;

  public:
    const int64_t rows, width;
    double* const state;
    float* const out;
    float* const lse;
};

void merge_part_into(nb::handle state_object, nb::handle out_object, nb::handle lse_object) {
    const Merged merged(state_object, writing, out_object, lse_object, contiguous);
    nb::gil_scoped_release released;
    merge_part(merged.state, merged.out, merged.lse, merged.rows, merged.width);
}

void merge_end_of(nb::handle state_object, nb::handle out_object, nb::handle lse_object) {
    const Merged merged(state_object, contiguous, out_object, lse_object, writing);
    nb::gil_scoped_release released;
    merge_end(merged.state, merged.out, merged.lse, merged.rows, merged.width);
}

// Blocks of `tokens` positions each, as many as `sketches` has room for.
void sketch_blocks(nb::handle codes_object, nb::handle scales_object, int64_t heads, int64_t dim, int64_t tokens,
                   nb::handle sketches_object) {
    Buffer codes(codes_object, contiguous), scales(scales_object, contiguous), sketches(sketches_object, writing);
    if (heads < 1 || dim < 1 || tokens < 1) throw nb::value_error("heads, dim and tokens must be positive");
    const int64_t blocks = sketches.bytes() / (4 * heads * dim), rows = blocks * tokens * heads;
    auto* c = codes.at_least<int8_t>(rows * dim, "codes: too small");
    auto* s = scales.at_least<float>(rows * 4, "scales: too small or not aligned");
    auto* out = sketches.at_least<uint16_t>(blocks * 4 * heads * dim, "sketches: not aligned");
    std::vector<float> room(2 * heads * dim);
    nb::gil_scoped_release released;
    sketch_kernels().sketch(c, s, blocks, tokens, heads, dim, room.data(), out);
}

// [q_heads, 2, dim] f32 parts of queries, negative and positive, against sketches [blocks, heads, 2, dim] -> bounds f32
// [q_heads, blocks].
void bound_blocks(nb::handle parts_object, nb::handle sketches_object, int64_t heads, int64_t dim,
                  nb::handle bounds_object) {
    Buffer parts(parts_object, contiguous), sketches(sketches_object, contiguous), bounds(bounds_object, writing);
    if (heads < 1 || dim < 1) throw nb::value_error("heads and dim must be positive");
    const int64_t q_heads = parts.bytes() / (8 * dim), blocks = sketches.bytes() / (4 * heads * dim);
    if (q_heads % heads) throw nb::value_error("parts: not a multiple of the heads");
    auto* q = parts.at_least<float>(q_heads * dim * 8, "parts: not aligned");
    auto* s = sketches.at_least<uint16_t>(blocks * 4 * heads * dim, "sketches: not aligned");
    auto* out = bounds.at_least<float>(q_heads * blocks * 4, "bounds: too small or not aligned");
    nb::gil_scoped_release released;
    sketch_kernels().bound(q, q_heads / heads, s, blocks, heads, dim, out);
}

void write_all_at(int fd, nb::tuple offsets, nb::tuple buffers) {
    constexpr size_t most = 8;
    const size_t count = offsets.size();
    if (count != buffers.size() || count > most) throw nb::value_error("at most 8 offsets, and as many buffers");
    alignas(Buffer) char space[most * sizeof(Buffer)];
    Write writes[most];
    size_t held = 0;
    struct Release {
        char* space;
        size_t& held;
        ~Release() {
            while (held) reinterpret_cast<Buffer*>(space)[--held].~Buffer();
        }
    } release{space, held};
    for (; held < count; ++held) {
        auto* buffer = new (space + held * sizeof(Buffer)) Buffer(buffers[held], contiguous);
        writes[held] = {0, buffer->data(), buffer->bytes()};
    }
    for (size_t i = 0; i < count; ++i) writes[i].offset = nb::cast<int64_t>(offsets[i]);
    int error;
    {
        nb::gil_scoped_release released;
        error = write_all(fd, writes, static_cast<int>(count));
    }
    if (error) raise_os_error(error);
}

char* word_address(const Buffer& map, int64_t offset) {
    if (offset < 0 || offset % 8 || offset > map.bytes() - 8) throw nb::value_error("word outside of the map");
    return map.data() + offset;
}

void store_at(nb::handle map_object, int64_t offset, uint64_t word) {
    Buffer map(map_object, writing);
    store_word(word_address(map, offset), word);
}

uint64_t load_at(nb::handle map_object, int64_t offset) {
    Buffer map(map_object, contiguous);
    return load_word(word_address(map, offset));
}

void publish_at(nb::handle map_object, int64_t offset, uint64_t value, uint64_t index, uint64_t salt) {
    Buffer map(map_object, writing);
    store_word(word_address(map, offset), checked_word(value, index, salt));
}

// `count` checked words from `offset` on, the first of which has `index`; -1 for one whose check fails.
std::vector<int64_t> checked_at(nb::handle map_object, int64_t offset, int64_t count, uint64_t index, uint64_t salt) {
    Buffer map(map_object, contiguous);
    std::vector<int64_t> values;
    if (count < 1) return values;
    word_address(map, offset + 8 * (count - 1));
    const char* address = word_address(map, offset);
    values.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
        uint64_t value;
        const bool whole = take_checked(load_word(address + 8 * i), index + i, salt, &value);
        values.push_back(whole ? static_cast<int64_t>(value) : -1);
    }
    return values;
}

void block_checksums_of(const nb::tuple& arrays, uint32_t track, nb::handle numbers, int64_t size, int64_t stop, nb::handle out,
                        int threads) {
    const Blocks blocks(arrays, track, numbers, size, stop, out);
    nb::gil_scoped_release released;
    block_checksums(blocks.view, threads);
}

// Any DLPack exporter on the CPU -> (array of its raw bits, dtype number). numpy has no bf16 of its own.
nb::tuple import_dlpack(nb::handle object) {
    auto array = nb::cast<nb::ndarray<nb::ro>>(object);
    if (array.device_type() != nb::device::cpu::value) throw nb::type_error("not in the CPU's memory");
    const auto type = array.dtype();
    int dtype = -1;
    if (type == nb::dtype<float>()) dtype = static_cast<int>(Dtype::f32);
    if (type.bits == 16 && type.lanes == 1) {
        if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) dtype = static_cast<int>(Dtype::f16);
        if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) dtype = static_cast<int>(Dtype::bf16);
    }
    if (dtype < 0) throw nb::type_error("not float32, float16 or bfloat16");
    std::vector<size_t> shape(array.ndim());
    std::vector<int64_t> strides(array.ndim());
    for (size_t i = 0; i < array.ndim(); ++i) {
        shape[i] = array.shape(i);
        strides[i] = array.stride(i);
    }
    const auto raw = dtype == 0 ? nb::dtype<uint32_t>() : nb::dtype<uint16_t>();
    nb::ndarray<nb::numpy, nb::ro> bits(array.data(), array.ndim(), shape.data(), nb::cast(array, nb::rv_policy::reference), strides.data(), raw);
    return nb::make_tuple(bits, dtype);
}

std::vector<std::string> available_kernels() {
    std::vector<std::string> names;
    for (int i = 0; i < isa_count; ++i)
        if (isa_available(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    return names;
}

void use_kernel(const std::string& name) {
    for (int i = 0; i < isa_count; ++i)
        if (name == isa_name(static_cast<Isa>(i)) && set_isa(static_cast<Isa>(i))) return;
    throw nb::value_error("no such kernel on this machine; see available_kernels()");
}

}  // namespace

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false);  // caches that a program still has when it exits are not worth a message
    m.def("quantize_rows", &quantize_rows, "x"_a, "dtype"_a, "codes"_a, "scales"_a, "threads"_a);
    m.def("dequantize_rows", &dequantize_rows, "codes"_a, "scales"_a, "dim"_a, "out"_a, "dtype"_a, "threads"_a);
    m.def("encode_rows", &encode_rows, "codec"_a, "transform"_a, "x"_a, "dtype"_a, "arrays"_a, "threads"_a);
    m.def("decode_rows", &decode_rows, "codec"_a, "transform"_a, "arrays"_a, "dim"_a, "out"_a, "dtype"_a, "threads"_a);
    m.def("encode_ggml", &encode_ggml_rows, "type"_a, "group"_a, "interleaved"_a, "x"_a, "dtype"_a, "out"_a, "threads"_a);
    m.def("decode_ggml", &decode_ggml_rows, "type"_a, "group"_a, "interleaved"_a, "rows"_a, "dim"_a, "out"_a, "dtype"_a,
          "threads"_a);
    m.def("special_ggml", &special_ggml, "type"_a, "rows"_a);
    m.def("attend", &attend_rows, "queries"_a, "dtype"_a, "slabs"_a, "kv_heads"_a, "value_dim"_a, "first_position"_a,
          "ranges"_a, "scale"_a, "softcap"_a, "query_start"_a, "causal"_a, "window"_a, "sinks"_a, "out"_a, "lse"_a,
          "threads"_a, "codecs"_a = std::vector<int>{1, 0, 1, 0}, "recent"_a = nb::none(), "exact"_a = false, "unread"_a = nb::none());
    bind_recent(m);
    m.def("merge_part", &merge_part_into, "state"_a, "out"_a, "lse"_a);
    m.def("merge_end", &merge_end_of, "state"_a, "out"_a, "lse"_a);
    m.def("block_checksums", &block_checksums_of, "arrays"_a, "track"_a, "blocks"_a, "size"_a, "stop"_a, "out"_a, "threads"_a);
    m.def("import_dlpack", &import_dlpack, "object"_a);
    m.def("sketch_blocks", &sketch_blocks, "codes"_a, "scales"_a, "heads"_a, "dim"_a, "tokens"_a, "sketches"_a);
    m.def("bound_blocks", &bound_blocks, "parts"_a, "sketches"_a, "heads"_a, "dim"_a, "bounds"_a);
    m.def("write_all", &write_all_at, "fd"_a, "offsets"_a, "buffers"_a);
    m.def("start_sync", &start_sync, "fd"_a, "offset"_a, "size"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def("punch_hole", &punch_hole, "fd"_a, "offset"_a, "size"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def("store_word", &store_at, "map"_a, "offset"_a, "word"_a);
    m.def("load_word", &load_at, "map"_a, "offset"_a);
    m.def("publish", &publish_at, "map"_a, "offset"_a, "value"_a, "index"_a, "salt"_a);
    m.def("load_checked", &checked_at, "map"_a, "offset"_a, "count"_a, "index"_a, "salt"_a);
    m.def("checked_word", &checked_word, "value"_a, "index"_a, "salt"_a);
    m.def("use_team", &use_team, "fork"_a, "threads"_a);
    m.def("available_kernels", &available_kernels);
    m.def("current_kernel", [] { return std::string(isa_name(current_isa())); });
    m.def("use_kernel", &use_kernel, "name"_a);
    bind_step(m);
}
