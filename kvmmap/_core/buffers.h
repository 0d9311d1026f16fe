// Python's buffers and numbers as the core's types, for the files that bind it.
#pragma once

#include <nanobind/nanobind.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec.h"
#include "recent.h"
#include "rows_run.h"
#include "step.h"

namespace nb = nanobind;

namespace kvmmap {

// A Python buffer, until this goes. Py_buffer costs a tenth of what a DLPack capsule does, and a push of one position hands
// over six of them.
class Buffer {
  public:
    Buffer(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    char* data() const { return static_cast<char*>(view_.buf); }
    int64_t bytes() const { return view_.len; }
    int ndim() const { return view_.ndim; }
    int64_t shape(int axis) const { return view_.shape[axis]; }
    int64_t stride(int axis) const { return view_.strides[axis]; }
    int64_t itemsize() const { return view_.itemsize; }

    // The data, if it is `bytes` long and `alignment`-aligned.
    template <class T>
    T* at_least(int64_t bytes, const char* what) const {
        if (view_.len < bytes) throw nb::value_error(what);
        if (reinterpret_cast<uintptr_t>(view_.buf) % alignof(T)) throw nb::value_error(what);
        return reinterpret_cast<T*>(view_.buf);
    }

  private:
    Py_buffer view_{};
};

constexpr int reading = PyBUF_STRIDED_RO;
constexpr int contiguous = PyBUF_C_CONTIGUOUS;
constexpr int writing = PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE;

inline Dtype to_dtype(int value) {
    if (value < 0 || value >= dtype_count) throw nb::value_error("unknown dtype number");
    return static_cast<Dtype>(value);
}

inline RowGrid to_grid(const Buffer& x, Dtype dtype) {
    const int64_t item = dtype_bytes(dtype);
    if (x.ndim() != 3 || x.itemsize() != item || (x.shape(2) > 1 && x.stride(2) != item))
        throw nb::value_error("input must be [n, heads, dim] with its last axis contiguous");
    return {x.data(), x.shape(0), x.shape(1), x.shape(2), x.stride(0), x.stride(1), dtype};
}

// The same, or one position of it: [heads, dim].
inline RowGrid to_positions(const Buffer& x, Dtype dtype) {
    if (x.ndim() != 2) return to_grid(x, dtype);
    const int64_t item = dtype_bytes(dtype);
    if (x.itemsize() != item || (x.shape(1) > 1 && x.stride(1) != item))
        throw nb::value_error("input must be [heads, dim] with its last axis contiguous");
    return {x.data(), 1, x.shape(0), x.shape(1), x.shape(0) * x.stride(0), x.stride(0), dtype};
}

// A codec and its transform, by the numbers of the superblock, for rows of `dim` numbers.
inline RowFormat to_format(int codec, int transform, int64_t dim) {
    if (codec < 1 || codec > static_cast<int>(Codec::int6) || transform < 0 || transform > 1)
        throw nb::value_error("unknown codec or transform");
    const RowFormat format{static_cast<Codec>(codec), transform == 1};
    if (dim < 0 || !format.takes(dim)) throw nb::value_error("this codec does not take rows of so many numbers");
    return format;
}

// The codes and scales of rows; a codec without scales has one array.
class RowArrays {
  public:
    // From array `first` of some on.
    RowArrays(RowFormat format, const nb::tuple& arrays, size_t first, int64_t dim, int flags)
        : codes_(arrays[first], flags), scales_(arrays[first + count(format) - 1], flags),
          row_bytes_(code_bytes(format.codec, dim)), scale_bytes_(scale_bytes(format.codec)) {}

    static size_t count(RowFormat format) { return scale_bytes(format.codec) ? 2 : 1; }

    char* codes() const { return codes_.data(); }
    char* scales() const { return scale_bytes_ ? scales_.data() : nullptr; }
    int64_t rows() const { return scale_bytes_ ? scales_.bytes() / scale_bytes_ : row_bytes_ ? codes_.bytes() / row_bytes_ : 0; }

    void hold(int64_t rows) const {
        codes_.at_least<char>(rows * row_bytes_, "codes: too small");
        if (scale_bytes_ == 4) scales_.at_least<float>(rows * 4, "scales: too small or not aligned");
        if (scale_bytes_ == 2) scales_.at_least<uint16_t>(rows * 2, "scales: too small or not aligned");
    }

  private:
    Buffer codes_, scales_;
    int64_t row_bytes_, scale_bytes_;
};

// The arrays of a ring of 16-bit rows: tags, keys and values, by their slots.
class Ring {
  public:
    Ring(const nb::tuple& parts, int flags)
        : tags_(part(parts, 0), flags), keys_(part(parts, 1), flags), values_(part(parts, 2), flags) {
        const int64_t slots = tags_.bytes() / 8, keys = numbers(keys_), values = numbers(values_);
        view = {tags_.at_least<uint64_t>(0, "tags: not aligned"), keys_.at_least<uint16_t>(2 * slots * keys, "keys: too small"),
                values_.at_least<uint16_t>(2 * slots * values, "values: too small"), slots, keys, values};
    }

    RecentRing view;

  private:
    static nb::handle part(const nb::tuple& parts, size_t number) {
        if (parts.size() != 3) throw nb::value_error("ring: tags, keys and values");
        return parts[number];
    }
    static int64_t numbers(const Buffer& slots) {
        int64_t count = 1;
        for (int axis = 1; axis < slots.ndim(); ++axis) count *= slots.shape(axis);
        return count;
    }

    Buffer tags_, keys_, values_;
};

// Both rings of a layer. Python makes one for as long as it has their arrays: six buffers need not be asked for in each call.
class Rings {
  public:
    Rings(const nb::tuple& ring, const nb::tuple& first) : ring_(ring, writing), first_(first, writing) {
        if (ring_.view.key_numbers != first_.view.key_numbers || ring_.view.value_numbers != first_.view.value_numbers)
            throw nb::value_error("rings: of rows of one shape");
    }

    RecentRings view() const { return {ring_.view, first_.view}; }

    // The same, for rows of one shape.
    RecentRings view(int64_t key_numbers, int64_t value_numbers) const {
        if (ring_.view.key_numbers != key_numbers || ring_.view.value_numbers != value_numbers)
            throw nb::value_error("rings: of rows of another shape");
        return view();
    }

  private:
    Ring ring_, first_;
};

inline void raise_os_error(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

// One layer of a file that positions are appended to, and what its rows are encoded to: arrays as long as the file's, of some
// rows each.
class AppendedLayer {
  public:
    AppendedLayer(const std::vector<int>& codecs, int64_t kv_heads, int64_t dim, int64_t value_dim, const std::vector<int64_t>& offsets,
                  nb::object rings, int64_t window, const nb::tuple& encoded)
        : rings_(rings) {
        if (codecs.size() != 4 || kv_heads < 1) throw nb::value_error("not a layer");
        view.keys = to_format(codecs[0], codecs[1], dim), view.values = to_format(codecs[2], codecs[3], value_dim);
        view.kv_heads = kv_heads, view.dim = dim, view.value_dim = value_dim;
        view.offsets = offsets;
        const std::vector<int64_t> row_bytes = view.row_bytes();
        if (offsets.size() != row_bytes.size() || encoded.size() != row_bytes.size())
            throw nb::value_error("an offset and an array of rows for each array");
        for (size_t i = 0; i < row_bytes.size(); ++i) {
            const Buffer& array = *encoded_.emplace_back(std::make_unique<Buffer>(encoded[i], writing));
            const int64_t rows = array.ndim() ? array.shape(0) : 0;
            if (rows < 1 || array.bytes() != rows * row_bytes[i] || (i && rows != view.encoded_rows))
                throw nb::value_error("encoded: as many rows in each array");
            view.encoded_rows = rows;
            view.encoded.push_back(array.data());
        }
        view.keeps_recent = !rings.is_none();
        if (view.keeps_recent) {
            const RecentRings both = nb::cast<const Rings&>(rings).view(kv_heads * dim, kv_heads * value_dim);
            view.ring = both.ring, view.first = both.first;
            view.window = window, view.sinks = both.first.slots;
        }
    }

    AppendedLayer(const AppendedLayer&) = delete;
    AppendedLayer& operator=(const AppendedLayer&) = delete;

    StepLayer view{};

  private:
    nb::object rings_;
    std::vector<std::unique_ptr<Buffer>> encoded_;
};

}  // namespace kvmmap
