// Every sketch kernel this machine can run against plain loops in double: sketches bit by bit, bounds to f32's rounding,
// shapes off every edge. Rows end where their allocations do, so that the sanitizers see a read beyond them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../../kvmmap/_core/cpu.h"
#include "../../kvmmap/_core/sketch.h"
#include "random.h"

using namespace kvmmap;

namespace {

double widen(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

// True if a bf16 is the nearest one that is not above (sign -1) or not below (sign 1) x.
bool is_nearest(uint16_t bf16, float x, int sign) {
    const double v = widen(bf16);
    if (sign * (v - x) < 0) return false;
    const bool outward = (v < 0) == (sign < 0) && v != 0;  // the next one inward is nearer to zero, or beyond it
    const uint16_t inward = outward ? bf16 - 1 : bf16 + 1;
    return v == x || sign * (widen(inward) - x) < 0;
}

bool check(int64_t blocks, int64_t tokens, int64_t heads, int64_t group, int64_t dim) {
    const int64_t rows = blocks * tokens * heads, q_heads = heads * group;
    const auto codes = std::make_unique<int8_t[]>(rows * dim);
    const auto scales = std::make_unique<float[]>(rows);
    const auto sketches = std::make_unique<uint16_t[]>(blocks * heads * 2 * dim);
    const auto parts = std::make_unique<float[]>(q_heads * 2 * dim);
    const auto bounds = std::make_unique<float[]>(q_heads * blocks);
    for (int64_t i = 0; i < rows * dim; ++i) codes[i] = static_cast<int8_t>(128 * uniform());
    for (int64_t i = 0; i < rows; ++i) scales[i] = static_cast<float>(std::exp2(4 * uniform()));
    if (dim > 1)
        for (int64_t i = 0; i < rows; ++i) codes[i * dim] = static_cast<int8_t>(std::abs(codes[i * dim]) / 2 + 1);
    std::vector<float> room(2 * heads * dim), queries(q_heads * dim);
    for (auto& x : queries) x = static_cast<float>(3 * uniform());
    for (int64_t q = 0; q < q_heads; ++q)
        for (int64_t d = 0; d < dim; ++d) {
            parts[q * 2 * dim + d] = std::fmin(queries[q * dim + d], 0.0f);
            parts[q * 2 * dim + dim + d] = std::fmax(queries[q * dim + d], 0.0f);
        }
    sketch_kernels().sketch(codes.get(), scales.get(), blocks, tokens, heads, dim, room.data(), sketches.get());
    sketch_kernels().bound(parts.get(), group, sketches.get(), blocks, heads, dim, bounds.get());

    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t h = 0; h < heads; ++h) {
            const uint16_t* sketch = sketches.get() + (b * heads + h) * 2 * dim;
            for (int64_t d = 0; d < dim; ++d) {
                float least = INFINITY, greatest = -INFINITY;
                for (int64_t t = b * tokens; t < (b + 1) * tokens; ++t) {
                    const float x = static_cast<float>(codes[(t * heads + h) * dim + d]) * scales[t * heads + h];
                    least = std::fmin(least, x), greatest = std::fmax(greatest, x);
                }
                if (!is_nearest(sketch[d], least, -1) || !is_nearest(sketch[dim + d], greatest, 1)) return false;
            }
            for (int64_t q = h * group; q < (h + 1) * group; ++q) {
                double bound = 0, size = 0;
                for (int64_t d = 0; d < dim; ++d) {
                    const double x = queries[q * dim + d];
                    const double term = std::fmax(x * widen(sketch[d]), x * widen(sketch[dim + d]));
                    bound += term, size += std::fabs(term);
                }
                if (!(std::fabs(bounds[q * blocks + b] - bound) <= 1e-5 * size + 1e-30)) return false;
            }
        }
    return true;
}

}  // namespace

int main() {
    for (int i = 0; i < isa_count; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (!set_isa(isa)) continue;
        for (int64_t dim : {1, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 65, 80, 128, 200})
            for (int64_t heads : {1, 3})
                for (int64_t tokens : {1, 15, 16, 17, 40})
                    for (int64_t group : {1, 4, 5})
                        if (!check(3, tokens, heads, group, dim)) {
                            std::printf("%s: wrong at dim %ld, heads %ld, tokens %ld, group %ld\n", isa_name(isa),
                                        static_cast<long>(dim), static_cast<long>(heads), static_cast<long>(tokens),
                                        static_cast<long>(group));
                            return 1;
                        }
        std::printf("%s: sketches and bounds agree\n", isa_name(isa));
    }
    return 0;
}
