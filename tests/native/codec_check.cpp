// Compares every kernel of the row codecs that this machine can run with the portable one, byte for byte, over rows of all
// lengths that a codec takes. Buffers end where their rows do, so that the sanitizers see a read or a write beyond them.
// Exits with the number of failures.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../kvmmap/_core/codec.h"
#include "../../kvmmap/_core/codec_run.h"
#include "../../kvmmap/_core/cpu.h"
#include "../../kvmmap/_core/half.h"

using namespace kvmmap;

namespace {

int failures = 0;
std::mt19937_64 generator(20250301);

template <class... Args>
void fail(const char* format, Args... args) {
    if (++failures <= 20) std::printf(format, args...);
}

float gaussian() {
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(generator() >> 40) * 0x1p-24f - 0.5f;
    return sum;
}

// Rows of n times dim numbers: gaussian ones of many magnitudes, zeros, single numbers, and ones out of range.
std::vector<float> rows(int64_t n, int64_t dim, Codec codec) {
    std::vector<float> x(n * dim);
    for (int64_t row = 0; row < n; ++row) {
        const int kind = static_cast<int>(generator() % 8);
        const float size = std::ldexp(1.0f, static_cast<int>(generator() % (codec == Codec::e4m3 ? 12 : 20)) - 12);
        for (int64_t i = 0; i < dim; ++i) x[row * dim + i] = kind ? gaussian() * size : 0.0f;
        if (kind == 1) std::fill_n(x.data() + row * dim, dim, size);
        if (kind == 2) std::fill_n(x.data() + row * dim, dim, 0.0f), x[row * dim + generator() % dim] = size;
        if (kind == 3) for (int64_t i = 0; i < dim; ++i) x[row * dim + i] *= 0x1p-30f;
    }
    return x;
}

struct Coded {
    std::unique_ptr<char[]> codes, scales;
    int64_t code_size, scale_size;

    Coded(RowFormat format, int64_t n, int64_t dim)
        : code_size(n * code_bytes(format.codec, dim)), scale_size(n * scale_bytes(format.codec)) {
        codes.reset(new char[code_size]());
        scales.reset(new char[scale_size]());
    }
    bool operator==(const Coded& other) const {
        return !std::memcmp(codes.get(), other.codes.get(), code_size) &&
               !std::memcmp(scales.get(), other.scales.get(), scale_size);
    }
};

std::vector<char> as_dtype(const std::vector<float>& x, Dtype dtype) {
    std::vector<char> bytes(x.size() * dtype_bytes(dtype));
    for (size_t i = 0; i < x.size(); ++i) {
        if (dtype == Dtype::f32) {
            std::memcpy(bytes.data() + 4 * i, &x[i], 4);
        } else {
            const uint16_t half = dtype == Dtype::f16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
            std::memcpy(bytes.data() + 2 * i, &half, 2);
        }
    }
    return bytes;
}

void check(Isa isa, RowFormat format, int64_t dim) {
    const int64_t n = 1 + static_cast<int64_t>(generator() % 40);
    std::vector<float> x = rows(n, dim, format.codec);
    const int number = static_cast<int>(format.codec), length = static_cast<int>(dim);
    for (int t = 0; t < dtype_count; ++t) {
        const Dtype dtype = static_cast<Dtype>(t);
        for (int bad = 0; bad < 2; ++bad) {
            const std::vector<char> bytes = as_dtype(x, dtype);
            const RowGrid grid{bytes.data(), n, 1, dim, dim * dtype_bytes(dtype), dim * dtype_bytes(dtype), dtype};
            Coded got(format, n, dim), want(format, n, dim);
            set_isa(Isa::portable);
            const int64_t expected = encode_grid(format, grid, want.codes.get(), want.scales.get(), 1);
            set_isa(isa);
            const int64_t found = encode_grid(format, grid, got.codes.get(), got.scales.get(), 1 + bad);
            if (found != expected) fail("%s: codec %d, dim %d: first bad row %ld, not %ld\n", isa_name(isa), number, length, long(found), long(expected));
            if (bad) {
                if (expected < 0) fail("codec %d, dim %d: a number beyond all was taken\n", number, length);
                break;
            }
            if (expected < 0 && !(got == want)) fail("%s: codec %d, dim %d, dtype %d: other bytes\n", isa_name(isa), number, length, t);
            for (int o = 0; o < dtype_count; ++o) {
                const Dtype to = static_cast<Dtype>(o);
                const int64_t size = n * dim * dtype_bytes(to);
                std::unique_ptr<char[]> out(new char[size]), plain(new char[size]);
                set_isa(Isa::portable);
                decode_grid(format, want.codes.get(), want.scales.get(), n, dim, to, plain.get(), 1);
                set_isa(isa);
                decode_grid(format, want.codes.get(), want.scales.get(), n, dim, to, out.get(), 2);
                if (std::memcmp(out.get(), plain.get(), size))
                    fail("%s: codec %d, dim %d: decodes otherwise to dtype %d\n", isa_name(isa), number, length, o);
            }
            x[generator() % x.size()] = generator() & 1 ? f32_from_bits(0x7f800000u) : f32_from_bits(0xffc00000u);
        }
        x = rows(n, dim, format.codec);
    }
}

}  // namespace

int main() {
    std::vector<RowFormat> formats{{Codec::int8, true}};
    for (int c = static_cast<int>(Codec::bf16); c <= static_cast<int>(Codec::int6); ++c)
        formats.push_back({static_cast<Codec>(c), has_levels(static_cast<Codec>(c))});
    std::vector<int64_t> dims;
    for (int64_t dim = 1; dim <= 264; ++dim) dims.push_back(dim);
    for (int64_t dim : {320, 512, 576, 1000, 1024, 2040, 4088, 4096, 4098, 5000}) dims.push_back(dim);
    for (int i = 0; i < isa_count; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (!set_isa(isa)) continue;
        for (const RowFormat& format : formats)
            for (int64_t dim : dims)
                if (format.takes(dim)) check(isa, format, dim);
        // Other cuts into blocks, which only a rotation knows.
        for (const RowFormat& format : formats)
            for (int64_t dim = 266; dim <= 512; dim += 2)
                if (format.rotated && format.takes(dim)) check(isa, format, dim);
        std::printf("%s: codecs checked\n", isa_name(isa));
    }
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures ? 1 : 0;
}
