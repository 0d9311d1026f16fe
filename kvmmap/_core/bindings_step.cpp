// Python's view of a decoding step: a layer's constants are unpacked once, and tensors are read through their own attributes,
// so that nothing is wrapped in between. Cold caches make that the larger part of a short step: a model's weights have gone
// through them since the last one.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "buffers.h"
#include "step.h"

using namespace nb::literals;
using namespace kvmmap;

namespace {

// A name that is looked up often. Python finds attributes by the identity of an interned name; one made of characters at each
// look-up it would search for in the dictionaries of all base classes.
struct Name {
    nb::object text;

    explicit Name(const char* characters) : text(nb::steal(PyUnicode_InternFromString(characters))) {}
    nb::object of(nb::handle object) const { return checked(PyObject_GetAttr(object.ptr(), text.ptr())); }
    nb::object call(nb::handle object) const {
        PyObject* arguments[] = {object.ptr()};
        return checked(PyObject_VectorcallMethod(text.ptr(), arguments, 1, nullptr));
    }

  private:
    static nb::object checked(PyObject* found) {
        if (!found) throw nb::python_error();
        return nb::steal(found);
    }
};

// What tells that an object is a tensor that can be read as it lies; given by whoever has the tensors' library.
struct TensorKind {
    nb::object type;
    std::vector<nb::object> dtypes;  // in the order of Dtype
    Name dtype{"dtype"}, is_cpu{"is_cpu"}, requires_grad{"requires_grad"}, is_neg{"is_neg"}, shape{"shape"}, stride{"stride"},
        data_ptr{"data_ptr"}, new_empty{"new_empty"};
};

// Whether an object is a tensor, of no subclass, in the processor's memory.
bool is_plain(nb::handle object, const TensorKind& kind) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == kind.type.ptr() && kind.is_cpu.of(object).is(Py_True);
}

// The number of a tensor's dtype, -1 if it is none of these.
int dtype_of(nb::handle tensor, const TensorKind& kind) {
    const nb::object dtype = kind.dtype.of(tensor);
    for (int i = 0; i < dtype_count; ++i)
        if (kind.dtypes[i].is(dtype)) return i;
    return -1;
}

int64_t whole(nb::handle number) { return nb::cast<int64_t>(number); }

// The rows of a tensor [1, heads, 1, dim]; its data is null for any other and for what can't be read as it lies: another
// device, a lazy negation, a part of a graph of gradients, a subclass.
RowGrid rows_of(nb::handle tensor, const TensorKind& kind, int64_t dim) {
    constexpr RowGrid none{};
    if (!is_plain(tensor, kind)) return none;
    const int dtype = dtype_of(tensor, kind);
    if (dtype < 0 || !kind.requires_grad.of(tensor).is(Py_False) ||
        !kind.is_neg.call(tensor).is(Py_False))
        return none;
    const nb::object shape = kind.shape.of(tensor);
    if (nb::len(shape) != 4 || whole(shape[0]) != 1 || whole(shape[2]) != 1 || whole(shape[3]) != dim) return none;
    const nb::object strides = kind.stride.call(tensor);
    if (dim > 1 && whole(strides[3]) != 1) return none;
    const auto type = static_cast<Dtype>(dtype);
    const int64_t item = dtype_bytes(type), heads = whole(shape[1]), stride = item * whole(strides[1]);
    const auto address = nb::cast<uintptr_t>(kind.data_ptr.call(tensor));
    return {reinterpret_cast<const void*>(address), 1, heads, dim, heads * stride, stride, type};
}

class Step {
  public:
    Step(const std::vector<int>& codecs, int64_t kv_heads, int64_t dim, int64_t value_dim, const std::vector<int64_t>& offsets,
         nb::object rings, int64_t window, const nb::tuple& encoded, nb::object tensor, nb::tuple dtypes)
        : held_(codecs, kv_heads, dim, value_dim, offsets, rings, window, encoded), row_bytes_(layer_.row_bytes()) {
        if (dtypes.size() != dtype_count) throw nb::value_error("as many dtypes as rows may have");
        kind_.type = tensor;
        for (nb::handle dtype : dtypes) kind_.dtypes.push_back(nb::borrow(dtype));
    }

    bool append(int fd, int64_t position, nb::handle keys_object, nb::handle values_object) {
        const RowGrid keys = rows_of(keys_object, kind_, layer_.dim), values = rows_of(values_object, kind_, layer_.value_dim);
        if (!keys.data || !values.data || keys.inner != layer_.kv_heads || values.inner != layer_.kv_heads) return false;
        Appended done;
        {
            nb::gil_scoped_release released;  // the disk may let a write wait
            done = append_step(layer_, fd, position, keys, values);
        }
        if (done.error) raise_os_error(done.error);
        return done.bad == -1;
    }

    // Makes the tensor that the next attention returns, if there was one before: those of all layers one after the other take an
    // eighth of what each takes where it is needed, because torch's code is in the caches then.
    void prepare(nb::handle like) {
        next_ = {};
        if (!heads_ || !is_plain(like, kind_)) return;
        const int dtype = dtype_of(like, kind_);
        if (dtype >= 0) next_ = output(like, static_cast<Dtype>(dtype), heads_);
    }

    nb::object attend(nb::handle query_object, const nb::tuple& slabs, int64_t length, float scale, float softcap, int64_t window,
                      int threads) {
        const RowGrid query = rows_of(query_object, kind_, layer_.dim);
        if (!query.data || query.inner % layer_.kv_heads || slabs.size() != row_bytes_.size()) return nb::none();
        std::optional<Buffer> held[4];  // at most codes and scales of both sides
        for (size_t i = 0; i < row_bytes_.size(); ++i)
            if (held[i].emplace(slabs[i], contiguous).bytes() < length * row_bytes_[i]) throw nb::value_error("slabs: too small");
        const size_t split = scale_bytes(layer_.keys.codec) ? 2 : 1;
        const auto rows = [&](RowFormat form, size_t first) {
            return CodedRows{form, held[first]->data(), scale_bytes(form.codec) ? held[first + 1]->data() : nullptr};
        };
        const AttendExtent extent{0, rows(layer_.keys, 0), rows(layer_.values, split)};
        Output made = std::exchange(next_, {});
        if (!made.tensor.is_valid() || made.dtype != query.dtype || made.heads != query.inner) {
            heads_ = query.inner;
            made = output(query_object, query.dtype, query.inner);
        }
        const StepQuery asked{query, scale, softcap, window, std::max(1, threads), made.data};
        bool finite;
        {
            nb::gil_scoped_release released;
            finite = attend_step(layer_, asked, extent, length);
        }
        return finite ? made.tensor : nb::none();
    }

  private:
    struct Output {
        nb::object tensor;  // [1, 1, heads, value_dim]
        Dtype dtype;
        int64_t heads;
        void* data;
    };

    Output output(nb::handle like, Dtype dtype, int64_t heads) const {
        nb::object tensor = kind_.new_empty.of(like)(nb::make_tuple(1, 1, heads, layer_.value_dim));
        void* data = reinterpret_cast<void*>(nb::cast<uintptr_t>(kind_.data_ptr.call(tensor)));
        return {std::move(tensor), dtype, heads, data};
    }

    AppendedLayer held_;
    const StepLayer& layer_ = held_.view;
    std::vector<int64_t> row_bytes_;
    TensorKind kind_;
    int64_t heads_ = 0;  // of the last queries
    Output next_{};
};

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<Step>(m, "Step")
        .def(nb::init<const std::vector<int>&, int64_t, int64_t, int64_t, const std::vector<int64_t>&, nb::object, int64_t,
                      const nb::tuple&, nb::object, nb::tuple>(),
             "codecs"_a, "kv_heads"_a, "dim"_a, "value_dim"_a, "offsets"_a, "rings"_a.none(), "window"_a, "encoded"_a, "tensor"_a,
             "dtypes"_a)
        .def("prepare", &Step::prepare, "like"_a)
        .def("append", &Step::append, "fd"_a, "position"_a, "keys"_a, "values"_a)
        .def("attend", &Step::attend, "query"_a, "slabs"_a, "length"_a, "scale"_a, "softcap"_a, "window"_a,
             "threads"_a);
}
