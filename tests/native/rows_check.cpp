// Holds every kernel of the row codec that this machine can run to the portable one, byte for byte, on random rows
// and on rows made to be hard. Exits with the number of failures. No framework: it also runs under qemu.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../kvmmap/_core/cpu.h"
#include "../../kvmmap/_core/half.h"
#include "../../kvmmap/_core/rows.h"
#include "../../kvmmap/_core/rows_run.h"

using namespace kvmmap;

namespace {

int failures = 0;
std::mt19937_64 generator(20240607);

uint64_t random_bits() { return generator(); }
float uniform() { return static_cast<float>(random_bits() >> 40) * 0x1p-24f; }

template <class... Args>
void fail(const char* format, Args... args) {
    if (++failures <= 20) std::printf(format, args...);
}

enum Kind { gaussian, any_bits, halves, near_halves, tiny, huge, zeros, small_integers, kinds };

// Row `kind` with a dominant number of its own, so that the scale is known where the kind needs it.
void fill(std::vector<float>& row, int kind) {
    const float scale = f32_from_bits(static_cast<uint32_t>(0x34000000u + random_bits() % 0x40000000u));
    for (auto& v : row) {
        const float sign = random_bits() & 1 ? -1.0f : 1.0f;
        const float half = static_cast<float>(random_bits() % 127) + 0.5f;
        switch (kind) {
            case gaussian: v = sign * (uniform() + uniform() + uniform() - 1.5f); break;
            case any_bits: v = f32_from_bits(static_cast<uint32_t>(random_bits()) & 0xbfffffffu); break;
            case halves: v = sign * half; break;
            case near_halves: v = sign * f32_from_bits(f32_bits(half * scale) + random_bits() % 7 - 3); break;
            case tiny: v = sign * f32_from_bits(random_bits() % 0x01000000u); break;
            case huge: v = sign * f32_from_bits(0x7f7fffffu - random_bits() % 4); break;
            case zeros: v = sign * 0.0f; break;
            default: v = sign * static_cast<float>(random_bits() % 9); break;
        }
    }
    if (kind == halves) row[random_bits() % row.size()] = 127.0f;
    if (kind == near_halves) row[random_bits() % row.size()] = 127.0f * scale;
}

void put(char* out, Dtype dtype, float v) {
    if (dtype == Dtype::f32) {
        std::memcpy(out, &v, 4);
        return;
    }
    const uint16_t bits = dtype == Dtype::f16 ? f32_to_f16(v) : f32_to_bf16(v);
    std::memcpy(out, &bits, 2);
}

// Rows of `dim` in an allocation that ends where they do (the address sanitizer sees what is read beyond), at an
// address and a stride that are no multiples of anything.
struct Rows {
    int64_t n, dim, stride, offset;
    Dtype dtype;
    std::unique_ptr<char[]> memory;

    Rows(int64_t count, int64_t d, Dtype type) : n(count), dim(d), dtype(type) {
        const int64_t bytes = dim * dtype_bytes(type);
        offset = random_bits() % 3;
        stride = bytes + random_bits() % 4;
        memory.reset(new char[offset + (n - 1) * stride + bytes]());
        std::vector<float> row(dim);
        for (int64_t r = 0; r < n; ++r) {
            fill(row, random_bits() % kinds);
            for (int64_t i = 0; i < dim; ++i) {
                // Wide values overflow f16: keep what is finite there.
                float v = row[i];
                if (type == Dtype::f16 && !(std::max(v, -v) <= 65504.0f)) v = v < 0 ? -65504.0f : 65504.0f;
                if (type == Dtype::bf16 && std::max(v, -v) > 3.38e38f) v = v < 0 ? -3.38e38f : 3.38e38f;
                put(at(r, i), type, v);
            }
        }
    }
    char* at(int64_t row, int64_t i) { return memory.get() + offset + row * stride + i * dtype_bytes(dtype); }
};

// Output buffers are heap blocks of just the size, for the same reason.
void check_quantize(Rows& x, const RowKernels& kernels, const char* name) {
    const int t = static_cast<int>(x.dtype);
    std::unique_ptr<int8_t[]> codes(new int8_t[x.n * x.dim]), want_codes(new int8_t[x.n * x.dim]);
    std::unique_ptr<float[]> scales(new float[x.n]), want_scales(new float[x.n]);
    const int64_t want = rows_portable.quantize[t](x.at(0, 0), x.stride, x.n, x.dim, want_codes.get(), want_scales.get());
    const int64_t got = kernels.quantize[t](x.at(0, 0), x.stride, x.n, x.dim, codes.get(), scales.get());
    if (want != got) {
        fail("%s: quantize dtype %d, dim %ld: first bad row %ld, not %ld\n", name, t, long(x.dim), long(got), long(want));
    } else if (want == x.n && (std::memcmp(codes.get(), want_codes.get(), x.n * x.dim) ||
                               std::memcmp(scales.get(), want_scales.get(), x.n * 4))) {
        fail("%s: quantize dtype %d, dim %ld: other bytes\n", name, t, long(x.dim));
    }
}

void check_dequantize(int64_t n, int64_t dim, const RowKernels& kernels, const char* name) {
    std::unique_ptr<int8_t[]> codes(new int8_t[n * dim]);
    std::unique_ptr<float[]> scales(new float[n]);
    for (int64_t i = 0; i < n * dim; ++i) codes[i] = static_cast<int8_t>(random_bits());
    for (int64_t i = 0; i < n; ++i)  // any bits, among them NaN, infinity and denormals; or what f16 can hold
        scales[i] = f32_from_bits(i % 2 ? static_cast<uint32_t>(random_bits()) : 0x33000000u + random_bits() % 0x12000000u);
    for (int t = 0; t < dtype_count; ++t) {
        const int64_t bytes = n * dim * dtype_bytes(static_cast<Dtype>(t));
        std::unique_ptr<char[]> out(new char[bytes]), want(new char[bytes]);
        rows_portable.dequantize[t](codes.get(), scales.get(), n, dim, want.get());
        kernels.dequantize[t](codes.get(), scales.get(), n, dim, out.get());
        if (std::memcmp(out.get(), want.get(), bytes))
            fail("%s: dequantize dtype %d, dim %ld: other bytes\n", name, t, long(dim));
    }
}

void check(const RowKernels& kernels, const char* name) {
    std::vector<int64_t> dims;
    for (int64_t dim = 1; dim <= 300; ++dim) dims.push_back(dim);
    for (int64_t dim : {384, 511, 512, 513, 576, 1000, 4096, 5001}) dims.push_back(dim);
    for (int64_t dim : dims) {
        const int rounds = dim <= 300 ? 3 : 2;
        for (int round = 0; round < rounds; ++round) {
            for (int t = 0; t < dtype_count; ++t) {
                Rows x(1 + random_bits() % 40, dim, static_cast<Dtype>(t));
                check_quantize(x, kernels, name);
                for (int bad = 0; bad < 3; ++bad) {  // one, two, three rows that are not finite
                    const float v = f32_from_bits((random_bits() & 1 ? 0x7f800000u : 0x7fc00000u) |
                                                  (random_bits() & 1 ? 0x80000000u : 0));
                    put(x.at(random_bits() % x.n, random_bits() % dim), x.dtype, v);
                    check_quantize(x, kernels, name);
                }
            }
            check_dequantize(1 + random_bits() % 20, dim, kernels, name);
        }
    }
}

// Every f16 and bf16 there is, one number a row and 16 a row.
void check_all_halves(const RowKernels& kernels, const char* name) {
    for (Dtype dtype : {Dtype::f16, Dtype::bf16})
        for (int64_t dim : {1, 16, 33})
            for (uint32_t bits = 0; bits < 0x10000; ++bits) {
                std::vector<uint16_t> row(dim, static_cast<uint16_t>(bits * 3 % 0x7c00));
                row[dim - 1] = static_cast<uint16_t>(bits);
                std::vector<int8_t> codes(dim), want_codes(dim);
                float scale, want_scale;
                const int t = static_cast<int>(dtype);
                const int64_t want = rows_portable.quantize[t](row.data(), 0, 1, dim, want_codes.data(), &want_scale);
                const int64_t got = kernels.quantize[t](row.data(), 0, 1, dim, codes.data(), &scale);
                if (want != got || (want && (codes != want_codes || f32_bits(scale) != f32_bits(want_scale))))
                    fail("%s: dtype %d, bits %x, dim %ld\n", name, t, bits, long(dim));
            }
}

// The grid over threads: one answer whatever their number, the first bad row among several.
void check_grid(const char* name) {
    const int64_t outer = 700, inner = 5, dim = 257;
    std::vector<float> x(outer * inner * dim);
    for (auto& v : x) v = uniform() - 0.5f;
    const RowGrid even{x.data(), outer, inner, dim, inner * dim * 4, dim * 4, Dtype::f32};
    const RowGrid swapped{x.data(), inner, outer, dim, dim * 4, inner * dim * 4, Dtype::f32};
    for (const RowGrid& grid : {even, swapped}) {
        std::vector<int8_t> codes(x.size()), want_codes(x.size());
        std::vector<float> scales(outer * inner), want_scales(outer * inner);
        quantize_grid(grid, want_codes.data(), want_scales.data(), 1);
        for (int threads : {2, 3, 7}) {
            if (quantize_grid(grid, codes.data(), scales.data(), threads) != -1 || codes != want_codes || scales != want_scales)
                fail("%s: grid with %d threads differs\n", name, threads);
            std::vector<float> out(x.size()), want_out(x.size());
            dequantize_grid(codes.data(), scales.data(), outer * inner, dim, Dtype::f32, want_out.data(), 1);
            dequantize_grid(codes.data(), scales.data(), outer * inner, dim, Dtype::f32, out.data(), threads);
            if (out != want_out) fail("%s: dequantize with %d threads differs\n", name, threads);
        }
    }
    x[(3 * inner + 2) * dim + 1] = x[(600 * inner + 1) * dim] = f32_from_bits(0x7fc00000u);
    std::vector<int8_t> codes(x.size());
    std::vector<float> scales(outer * inner);
    for (int threads : {1, 2, 3, 7}) {
        if (quantize_grid(even, codes.data(), scales.data(), threads) != 3 * inner + 2)
            fail("%s: wrong first bad row with %d threads\n", name, threads);
        if (quantize_grid(swapped, codes.data(), scales.data(), threads) != 1 * outer + 600)
            fail("%s: wrong first bad row, swapped, with %d threads\n", name, threads);
    }
}

}  // namespace

int main() {
    for (int i = 0; i < isa_count; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (!set_isa(isa)) continue;
        std::printf("%s\n", isa_name(isa));
        check(row_kernels(), isa_name(isa));
        check_all_halves(row_kernels(), isa_name(isa));
        check_grid(isa_name(isa));
    }
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures ? 1 : 0;
}
