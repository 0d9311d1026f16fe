// Python's view of what appends a layer's rows: encoding them, and keeping them in 16 bits besides.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <vector>

#include "append.h"
#include "bindings.h"
#include "buffers.h"
#include "recent.h"

using namespace nb::literals;

namespace kvmmap {
namespace {

// The rows of a layer, keys and values, of one pair of codecs.
class PairEncoder {
  public:
    PairEncoder(int key_codec, int key_transform, int64_t key_dim, int value_codec, int value_transform, int64_t value_dim)
        : keys_(to_format(key_codec, key_transform, key_dim)), values_(to_format(value_codec, value_transform, value_dim)),
          key_dim_(key_dim), value_dim_(value_dim) {}

    int64_t encode(nb::handle keys_object, int key_dtype, nb::handle values_object, int value_dtype, const nb::tuple& arrays,
                   const Rings* rings, int64_t start) const {
        const Buffer keys(keys_object, reading), values(values_object, reading);
        const RowGrid k = to_positions(keys, to_dtype(key_dtype)), v = to_positions(values, to_dtype(value_dtype));
        if (k.outer != v.outer || k.dim != key_dim_ || v.dim != value_dim_ || start < 0)
            throw nb::value_error("as many keys as values, of the encoder's shape, from a position on");
        const size_t of_keys = RowArrays::count(keys_);
        if (arrays.size() != of_keys + RowArrays::count(values_)) throw nb::value_error("arrays: those of keys, then of values");
        const RowArrays key_arrays(keys_, arrays, 0, key_dim_, writing), value_arrays(values_, arrays, of_keys, value_dim_, writing);
        const EncodedRows to_keys{keys_, key_arrays.codes(), key_arrays.scales()};
        const EncodedRows to_values{values_, value_arrays.codes(), value_arrays.scales()};
        const int64_t key_rows = k.outer * k.inner, value_rows = v.outer * v.inner;
        key_arrays.hold(key_rows);
        value_arrays.hold(value_rows);
        const RecentRings views = rings ? rings->view(k.inner * k.dim, v.inner * v.dim) : RecentRings{};
        const RecentRings* kept = rings ? &views : nullptr;
        if (key_rows * k.dim + value_rows * v.dim < 32768)  // releasing the GIL takes longer than this
            return append_rows(k, to_keys, v, to_values, kept, start);
        nb::gil_scoped_release released;
        return append_rows(k, to_keys, v, to_values, kept, start);
    }

  private:
    RowFormat keys_, values_;
    int64_t key_dim_, value_dim_;
};

// Appends positions to one layer of a file, one a call: what is needed besides their rows is unpacked once.
class PositionAppender {
  public:
    PositionAppender(const std::vector<int>& codecs, int64_t kv_heads, int64_t dim, int64_t value_dim,
                     const std::vector<int64_t>& offsets, nb::object rings, const nb::tuple& encoded)
        : held_(codecs, kv_heads, dim, value_dim, offsets, rings, 0, encoded) {}

    int64_t append(int fd, int64_t position, nb::handle keys_object, int key_dtype, nb::handle values_object, int value_dtype) const {
        const StepLayer& layer = held_.view;
        const Buffer keys(keys_object, reading), values(values_object, reading);
        const RowGrid k = to_positions(keys, to_dtype(key_dtype)), v = to_positions(values, to_dtype(value_dtype));
        if (k.outer != 1 || v.outer != 1 || k.inner != layer.kv_heads || v.inner != layer.kv_heads || k.dim != layer.dim ||
            v.dim != layer.value_dim || position < 0)
            throw nb::value_error("keys and values of one position, of the layer's shape");
        Appended done;
        {
            nb::gil_scoped_release released;  // the disk may let a write wait
            done = append_step(layer, fd, position, k, v);
        }
        if (done.error) raise_os_error(done.error);
        return done.bad;
    }

  private:
    AppendedLayer held_;
};

void keep(const Rings& rings, int64_t start, nb::handle keys_object, int key_dtype, nb::handle values_object, int value_dtype) {
    const Buffer keys(keys_object, reading), values(values_object, reading);
    const RowGrid k = to_positions(keys, to_dtype(key_dtype)), v = to_positions(values, to_dtype(value_dtype));
    if (k.outer != v.outer || start < 0) throw nb::value_error("as many keys as values, from a position on");
    keep_recent(rings.view(k.inner * k.dim, v.inner * v.dim), start, k, v);
}

// Some of a layer's coded arrays, [rows, ...] each.
class Coded {
  public:
    Coded(const nb::tuple& arrays, int64_t first) {
        if (arrays.size() > most) throw nb::value_error("at most four arrays");
        buffers_.reserve(most);
        view.first = first;
        for (nb::handle array : arrays) {
            const Buffer& buffer = *buffers_.emplace_back(std::make_unique<Buffer>(array, contiguous));
            const int64_t rows = buffer.ndim() ? buffer.shape(0) : 0;
            view.arrays.push_back({buffer.data(), rows ? buffer.bytes() / rows : 0, rows});
        }
    }

    CodedArrays view;

  private:
    static constexpr size_t most = 4;
    std::vector<std::unique_ptr<Buffer>> buffers_;
};

void read_recent(nb::tuple ring_parts, bool of_keys, int64_t start, int64_t stop, nb::handle out_object, int dtype) {
    const Ring ring(ring_parts, contiguous);
    const Dtype kind = to_dtype(dtype);
    Buffer out(out_object, writing);
    if (start < 0 || start > stop) throw nb::value_error("no such positions");
    char* rows = out.at_least<char>((stop - start) * (of_keys ? ring.view.key_numbers : ring.view.value_numbers) * dtype_bytes(kind), "out: too small");
    nb::gil_scoped_release released;
    read_rows(ring.view, of_keys, start, stop, kind, rows);
}

// Writes the records of positions [start, stop) of the sinks, or of the ring.
void make_recent_records(const Rings& rings, bool sinks, const nb::tuple& arrays, int64_t first, int64_t start, int64_t stop,
                         nb::handle out_object) {
    const RecentRing ring = sinks ? rings.view().first : rings.view().ring;
    const Coded coded(arrays, first);
    Buffer out(out_object, writing);
    if (start < 0 || start > stop) throw nb::value_error("no such positions");
    make_records(ring, coded.view, start, stop, out.at_least<char>((stop - start) * record_bytes(ring), "out: too small"));
}

// Reads the records of positions [start, stop) from all of a ring's records; what the ring holds already is left alone.
std::vector<int> take_recent_records(nb::handle records_object, nb::tuple ring_parts, nb::tuple arrays, int64_t first, int64_t start,
                                     int64_t stop) {
    const Ring ring(ring_parts, writing);
    const Coded coded(arrays, first);
    Buffer records(records_object, contiguous);
    const int64_t size = record_bytes(ring.view);
    const char* data = records.at_least<char>(ring.view.slots * size, "records: too small");
    if (start < 0 || start > stop || (start < stop && !ring.view.slots)) throw nb::value_error("no such positions");
    std::vector<int> states;
    std::vector<char> copy(size);  // another process may be writing there
    for (int64_t p = start; p < stop; ++p) {
        RecordState state = RecordState::sound;
        if (!ring.view.find(p)) {
            std::memcpy(copy.data(), data + ring.view.slot(p) * size, size);
            state = take_record(ring.view, coded.view, p, copy.data());
        }
        states.push_back(static_cast<int>(state));
    }
    return states;
}

}  // namespace
}  // namespace kvmmap

using namespace kvmmap;

void bind_recent(nb::module_& m) {
    nb::class_<PairEncoder>(m, "PairEncoder")
        .def(nb::init<int, int, int64_t, int, int, int64_t>(), "key_codec"_a, "key_transform"_a, "key_dim"_a, "value_codec"_a,
             "value_transform"_a, "value_dim"_a)
        .def("encode", &PairEncoder::encode, "keys"_a, "key_dtype"_a, "values"_a, "value_dtype"_a, "arrays"_a,
             "rings"_a.none(), "start"_a);
    nb::class_<PositionAppender>(m, "PositionAppender")
        .def(nb::init<const std::vector<int>&, int64_t, int64_t, int64_t, const std::vector<int64_t>&, nb::object, const nb::tuple&>(),
             "codecs"_a, "kv_heads"_a, "dim"_a, "value_dim"_a, "offsets"_a, "rings"_a.none(), "encoded"_a)
        .def("append", &PositionAppender::append, "fd"_a, "position"_a, "keys"_a, "key_dtype"_a, "values"_a, "value_dtype"_a);
    nb::class_<Rings>(m, "RecentRings")
        .def(nb::init<const nb::tuple&, const nb::tuple&>(), "ring"_a, "first"_a)
        .def("keep", &keep, "start"_a, "keys"_a, "key_dtype"_a, "values"_a, "value_dtype"_a)
        .def("records", &make_recent_records, "sinks"_a, "arrays"_a, "first"_a, "start"_a, "stop"_a, "out"_a);
    m.def("read_recent", &read_recent, "ring"_a, "keys"_a, "start"_a, "stop"_a, "out"_a, "dtype"_a);
    m.def("take_recent_records", &take_recent_records, "records"_a, "ring"_a, "arrays"_a, "first"_a, "start"_a, "stop"_a);
}
