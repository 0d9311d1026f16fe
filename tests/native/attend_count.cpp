// One attention over int8 codes: what count.sh counts the instructions of. Usage: attend_count KERNEL GROUP BITS POSITIONS
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kvmmap/_core/attend.h"
#include "../../kvmmap/_core/cpu.h"

using namespace kvmmap;

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    bool found = false;
    for (int i = 0; i < isa_count; ++i)
        if (!std::strcmp(argv[1], isa_name(static_cast<Isa>(i)))) found = set_isa(static_cast<Isa>(i));
    if (!found) return 3;
    constexpr int64_t dim = 128, most = 1024;
    const int64_t group = std::atoi(argv[2]), rows = std::atoi(argv[4]);
    if (rows > most) return 4;
    std::vector<int8_t> codes(most * dim);  // as many for any number of positions, so that a difference counts attention alone
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i * 37 % 255 - 127);
    std::vector<float> scales(most, 0.01f), queries(group * dim, 0.1f), out(group * dim), lse(group);
    const CodedRows coded{{Codec::int8, false}, reinterpret_cast<const char*>(codes.data()), reinterpret_cast<const char*>(scales.data())};
    const AttendRange range{0, 1, 0, rows};
    AttendJob job{};
    job.queries = queries.data(), job.n = 1, job.q_heads = group, job.kv_heads = 1, job.dim = job.value_dim = dim;
    job.scale = 0.1f, job.short_queries = !std::strcmp(argv[3], "16");
    job.ranges = &range, job.num_ranges = 1, job.out = out.data(), job.lse = lse.data();
    attend(job, coded, coded, 1);
    return 0;
}
