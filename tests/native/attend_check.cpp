// Every attention kernel this machine can run against plain loops in double: shapes off every edge, padding, masks, threads.
// Rows end where their allocations do, so that the sanitizers see a read beyond them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "../../kvmmap/_core/attend.h"
#include "../../kvmmap/_core/codec_run.h"
#include "../../kvmmap/_core/cpu.h"
#include "random.h"

using namespace kvmmap;

namespace {

struct Case {
    int64_t rows, n, heads, group, dim, value_dim, query_start, window, sinks;
    bool causal;
    float softcap;
    int threads;
    bool short_queries;
    RowFormat keys, values;
};

// Rows of random numbers, coded, and what they are decoded to; codes and scales end where their allocations do.
struct Coded {
    std::unique_ptr<char[]> codes, scales;
    std::vector<float> numbers;
    CodedRows rows;

    Coded(RowFormat format, int64_t n, int64_t dim)
        : codes(new char[n * code_bytes(format.codec, dim)]), scales(new char[n * scale_bytes(format.codec)]),
          numbers(n * dim), rows{format, codes.get(), scales.get()} {
        for (auto& x : numbers) x = static_cast<float>(2 * uniform());
        const RowGrid grid{numbers.data(), n, 1, dim, dim * 4, dim * 4, Dtype::f32};
        encode_grid(format, grid, codes.get(), scales.get(), 1);
        decode_grid(format, codes.get(), scales.get(), n, dim, Dtype::f32, reinterpret_cast<char*>(numbers.data()), 1);
    }
};

// Returns the largest error over the largest number.
double check(const Case& c) {
    const int64_t q_heads = c.heads * c.group;
    const Coded keys(c.keys, c.rows * c.heads, c.dim), values(c.values, c.rows * c.heads, c.value_dim);
    std::vector<float> queries(c.n * q_heads * c.dim);
    for (auto& x : queries) x = static_cast<float>(3 * uniform());
    std::vector<float> out(c.n * q_heads * c.value_dim), lse(c.n * q_heads);

    const AttendRange range{0, c.heads, 0, c.rows};
    AttendJob job{};
    job.queries = queries.data(), job.n = c.n, job.q_heads = q_heads, job.kv_heads = c.heads;
    job.dim = c.dim, job.value_dim = c.value_dim;
    job.scale = 1 / std::sqrt(static_cast<float>(c.dim)), job.softcap = c.softcap;
    job.query_start = c.query_start, job.causal = c.causal, job.window = c.window, job.sinks = c.sinks;
    job.short_queries = c.short_queries;
    job.ranges = &range, job.num_ranges = 1, job.out = out.data(), job.lse = lse.data();
    attend(job, keys.rows, values.rows, c.threads);

    double worst = 0, most = 0;
    std::vector<double> scores(c.rows), expected(c.value_dim);
    for (int64_t i = 0; i < c.n; ++i)
        for (int64_t q = 0; q < q_heads; ++q) {
            const int64_t head = q / c.group, position = c.query_start + i;
            double top = -std::numeric_limits<double>::infinity(), total = 0;
            for (int64_t j = 0; j < c.rows; ++j) {
                double s = 0;
                for (int64_t d = 0; d < c.dim; ++d)
                    s += static_cast<double>(queries[(i * q_heads + q) * c.dim + d]) * keys.numbers[(j * c.heads + head) * c.dim + d];
                s *= static_cast<double>(job.scale);
                if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
                const bool seen = (!c.causal || j <= position) && (!c.window || j > position - c.window || j < c.sinks);
                scores[j] = seen ? s : -std::numeric_limits<double>::infinity();
                top = std::fmax(top, scores[j]);
            }
            std::fill(expected.begin(), expected.end(), 0.0);
            for (int64_t j = 0; j < c.rows && std::isfinite(top); ++j) {
                const double p = std::exp(scores[j] - top);
                total += p;
                for (int64_t d = 0; d < c.value_dim; ++d)
                    expected[d] += p * values.numbers[(j * c.heads + head) * c.value_dim + d];
            }
            for (int64_t d = 0; d < c.value_dim; ++d) {
                const double wanted = total > 0 ? expected[d] / total : 0;
                worst = std::fmax(worst, std::fabs(out[(i * q_heads + q) * c.value_dim + d] - wanted));
                most = std::fmax(most, std::fabs(wanted));
            }
            const float log = lse[i * q_heads + q];
            if (total > 0 ? !(std::fabs(log - top - std::log(total)) < (c.short_queries ? 1e-3 : 1e-4)) : log != -std::numeric_limits<float>::infinity())
                return 1;
        }
    return most > 0 ? worst / most : worst;
}

int64_t pick(std::initializer_list<int64_t> choices) {
    return choices.begin()[static_cast<int64_t>((uniform() + 1) / 2 * static_cast<double>(choices.size()))];
}

}  // namespace

int main() {
    int failures = 0;
    for (int i = 0; i < isa_count; ++i) {
        if (!set_isa(static_cast<Isa>(i))) continue;
        for (int k = 0; k < 450; ++k) {
            Case c{};
            const bool even = k % 3 == 2;  // what AVX-512 walks as streams of 272 positions
            c.rows = pick({1, 2, 15, 63, 64, 65, 129, 300}), c.n = pick({1, 1, 2, 5}), c.heads = pick({1, 2, 3});
            c.group = pick({1, 2, 3, 4, 5, 7}), c.dim = pick({1, 3, 16, 17, 64, 65, 128, 130});
            c.value_dim = pick({1, 4, 15, 64, 100, 128}), c.query_start = pick({0, 10, 64, c.rows - 1, c.rows, 1000});
            c.window = pick({0, 0, 1, 40, 200}), c.sinks = pick({0, 3, 70}), c.causal = pick({0, 1, 1}) == 1;
            if (even) {
                c.rows = pick({271, 272, 273, 544, 900}), c.n = pick({1, 1, 2, 7}), c.dim = pick({64, 64, 128, 192});
                c.value_dim = pick({64, 128, 192}), c.query_start = pick({300, c.rows - 1, c.rows, 1000});
                c.window = pick({0, 0, 500, 900});
            }
            if (k % 15 == 7) {  // chunks that AMX cuts into spans of 512 positions and blocks of 16 rows
                c.rows = pick({70, 511, 513, 1100, 2300}), c.n = pick({9, 20, 33}), c.heads = pick({1, 2}), c.group = pick({2, 4, 5});
                c.dim = pick({64, 128}), c.value_dim = pick({64, 128}), c.query_start = pick({0, c.rows / 2, c.rows - c.n, 3000});
                c.window = pick({0, 0, 30, 700});
            }
            c.short_queries = k % 4 == 3;
            c.softcap = static_cast<float>(pick({0, 0, 3})), c.threads = static_cast<int>(pick({1, 1, 2, 3}));
            // Half of them int8, the others any pair of codecs that take such rows.
            c.keys = c.values = {Codec::int8, false};
            if (k % 2)
                for (RowFormat* format : {&c.keys, &c.values}) {
                    const int64_t dim = format == &c.keys ? c.dim : c.value_dim;
                    const auto codec = static_cast<Codec>(pick({1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 10, 11}));
                    const RowFormat wanted{codec, has_levels(codec) || pick({0, 1}) == 1};
                    if (wanted.takes(dim)) *format = wanted;
                }
            if (k % 9 == 4) {  // one query over 16 bits, which AVX-512 reads in order
                const auto half = pick({0, 1}) ? Codec::f16 : Codec::bf16;
                c.keys = c.values = {half, false};
                c.rows = pick({1, 2, 15, 17, 64, 130, 256, 257, 300, 600}), c.n = 1, c.query_start = pick({c.rows - 1, c.rows - 1, 1000});
                c.dim = pick({16, 48, 64, 80, 128, 208}), c.value_dim = pick({16, 48, 64, 80, 128, 208});
            }
            const double worst = check(c);
            // Where few values cancel out, what is left is small beside what was summed.
            if (!(worst <= (c.short_queries ? 2e-3 : 2e-5))) {
                std::printf("%s: %g at rows %d n %d heads %d group %d dim %d value_dim %d query_start %d window %d sinks %d codecs %d %d\n",
                            isa_name(static_cast<Isa>(i)), worst, static_cast<int>(c.rows), static_cast<int>(c.n),
                            static_cast<int>(c.heads), static_cast<int>(c.group), static_cast<int>(c.dim),
                            static_cast<int>(c.value_dim), static_cast<int>(c.query_start), static_cast<int>(c.window),
                            static_cast<int>(c.sinks), static_cast<int>(c.keys.codec), static_cast<int>(c.values.codec));
                ++failures;
            }
        }
        std::printf("%s: attention checked\n", isa_name(static_cast<Isa>(i)));
    }
    return failures != 0;
}
