#include "codec.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "codec_run.h"
#include "cpu.h"

namespace kvmmap {

const CodecKernels& codec_kernels() {
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx2: return codec_avx2;
        case Isa::avx512:
        case Isa::amx: return codec_avx512;
#elif defined(__aarch64__)
        case Isa::neon:
        case Isa::dotprod:
        case Isa::i8mm: return codec_neon;
#endif
        default: return codec_portable;
    }
}

bool RowFormat::takes(int64_t dim) const {
    if (has_levels(codec)) return rotated && dim % 8 == 0 && dim <= most_levels;
    return !rotated || (codec == Codec::int8 && dim % 2 == 0);
}

namespace {

// SplitMix64 (Steele, Lea and Flood, 2014), which gives 64 signs at a time.
constexpr uint64_t sign_seed = 0x70616d6d766b;  // "kvmmap", little-endian

uint64_t next_signs(uint64_t& state) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

}  // namespace

void rotation_factors(int64_t dim, float* factors) {
    uint64_t state = sign_seed, signs = 0;
    for (int64_t first = 0, block; first < dim; first += block) {
        float size = 1.0f;  // 2^(-k/2) for a block of 2^k numbers
        int k = 0;
        for (block = 1; 2 * block <= dim - first; block *= 2) ++k;
        if (k % 2) size = 0x1.6a09e6p-1f;  // the f32 nearest to the root of one half
        for (int i = 0; i < k / 2; ++i) size *= 0.5f;
        for (int64_t i = first; i < first + block; ++i) {
            if (i % 64 == 0) signs = next_signs(state);
            factors[i] = signs >> i % 64 & 1 ? -size : size;
        }
    }
}

namespace {

// Rows that are worked on at a time, as f32 in the first-level cache.
constexpr int64_t batch_bytes = 16384;

int64_t batch_of(int64_t dim) { return std::max<int64_t>(1, batch_bytes / (4 * dim + 1)); }

// The factors of a rotation, until the thread's call after the next: they take as long as the rows of a position.
const float* factors_of(RowFormat format, int64_t dim) {
    struct Made {
        int64_t dim = -1;
        std::vector<float> factors;
    };
    thread_local Made kept[2];  // of keys and of values
    thread_local int oldest = 0;
    if (!format.rotated) return nullptr;
    for (const Made& made : kept)
        if (made.dim == dim) return made.factors.data();
    Made& made = kept[oldest];
    oldest = 1 - oldest;
    made.dim = -1;
    made.factors.resize(dim);
    rotation_factors(dim, made.factors.data());
    made.dim = dim;
    return made.factors.data();
}

}  // namespace

namespace {

// The first of some rows of rotated int8 that rotated back is beyond f32, or n. Sums of a block's numbers get there before
// the factors make them small again; only rows of numbers so large that they might are tried.
int64_t first_beyond(RowFormat format, const char* codes, const char* scales, int64_t n, int64_t dim,
                     const Rotation& rotation) {
    if (!format.rotated || format.codec != Codec::int8) return n;
    const CodecKernels& kernels = codec_kernels();
    const float most = 0x1p120f / static_cast<float>(dim);  // codes are below 2^7
    const float* sizes = reinterpret_cast<const float*>(scales);
    for (int64_t row = 0; row < n; ++row) {
        if (sizes[row] < most) continue;
        std::vector<float> numbers(dim + readable_behind);
        kernels.decode(format.codec, codes + row * dim, scales + 4 * row, 1, dim, numbers.data());
        kernels.rotate_back(rotation, 1, numbers.data());
        if (!std::all_of(numbers.begin(), numbers.begin() + dim, [](float x) { return std::isfinite(x); })) return row;
    }
    return n;
}

}  // namespace

int64_t encode_grid(RowFormat format, const RowGrid& x, char* codes, char* scales, int threads) {
    if (format.plain_int8())
        return quantize_grid(x, reinterpret_cast<int8_t*>(codes), reinterpret_cast<float*>(scales), threads);
    const CodecKernels& kernels = codec_kernels();
    const QuantizeRun quantize = row_kernels().quantize[0];
    const int64_t rows = x.outer * x.inner, dim = x.dim;
    const Rotation rotation{dim, factors_of(format, dim)};
    const bool walks = format.rotated && kernels.walks && kernels.walks(dim);
    std::atomic<int64_t> first_bad{rows};
    auto encode = [&](int64_t begin, int64_t end) {
        std::vector<float> room(walks ? 0 : std::min(end - begin, batch_of(dim)) * dim + readable_behind);
        const bool even = x.outer_stride == x.inner * x.inner_stride;
        for (int64_t row = begin; row < end;) {
            const int64_t o = row / x.inner, i = row % x.inner;
            int64_t n = even ? end - row : std::min(end - row, x.inner - i), done;
            const char* in = static_cast<const char*>(x.data) + o * x.outer_stride + i * x.inner_stride;
            char* to = codes + row * code_bytes(format.codec, dim);
            char* scale = scales + row * scale_bytes(format.codec);
            if (walks) {
                done = kernels.encode_rotated(format.codec, x.dtype, in, x.inner_stride, n, rotation, to, scale);
            } else {
                n = std::min(n, batch_of(dim));
                kernels.widen[static_cast<int>(x.dtype)](in, x.inner_stride, n, dim, room.data());
                if (format.rotated) kernels.rotate(rotation, n, room.data());
                done = format.codec == Codec::int8
                           ? quantize(room.data(), 4 * dim, n, dim, reinterpret_cast<int8_t*>(to),
                                      reinterpret_cast<float*>(scale))
                           : kernels.encode(format.codec, room.data(), n, dim, to, scale);
            }
            done = first_beyond(format, to, scale, done, dim, rotation);
            if (done < n) {
                lower_to(first_bad, row + done);
                return;
            }
            row += n;
        }
    };
    parallel_ranges(rows, worth_threads(rows * dim * dtype_bytes(x.dtype), threads), encode);
    return first_bad == rows ? -1 : first_bad.load();
}

void decode_grid(RowFormat format, const char* codes, const char* scales, int64_t rows, int64_t dim, Dtype dtype, char* out,
                 int threads) {
    if (format.plain_int8())
        return dequantize_grid(reinterpret_cast<const int8_t*>(codes), reinterpret_cast<const float*>(scales), rows, dim,
                               dtype, out, threads);
    const CodecKernels& kernels = codec_kernels();
    const Rotation rotation{dim, factors_of(format, dim)};
    const bool walks = format.rotated && kernels.walks && kernels.walks(dim);
    auto decode = [&](int64_t begin, int64_t end) {
        if (walks)
            return kernels.decode_rotated(format.codec, codes + begin * code_bytes(format.codec, dim),
                                          scales + begin * scale_bytes(format.codec), end - begin, rotation, dtype,
                                          out + begin * dim * dtype_bytes(dtype));
        std::vector<float> room(dtype == Dtype::f32 ? 0 : std::min(end - begin, batch_of(dim)) * dim);
        for (int64_t row = begin; row < end;) {
            const int64_t n = std::min(end - row, batch_of(dim));
            char* to = out + row * dim * dtype_bytes(dtype);
            float* numbers = dtype == Dtype::f32 ? reinterpret_cast<float*>(to) : room.data();
            kernels.decode(format.codec, codes + row * code_bytes(format.codec, dim),
                           scales + row * scale_bytes(format.codec), n, dim, numbers);
            if (format.rotated) kernels.rotate_back(rotation, n, numbers);
            if (dtype != Dtype::f32) kernels.narrow[static_cast<int>(dtype)](numbers, n * dim, to);
            row += n;
        }
    };
    parallel_ranges(rows, worth_threads(rows * dim * dtype_bytes(dtype), threads), decode);
}

}  // namespace kvmmap
