#include "merge.h"

#include <cmath>
#include <limits>

namespace kvmmap {
namespace {

constexpr double nothing = -std::numeric_limits<double>::infinity();

}  // namespace

void merge_part(double* state, const float* out, const float* lse, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, state += merge_head + width, out += width) {
        const double log = lse[row];
        if (log == nothing) continue;
        const double top = log < state[0] ? state[0] : log;  // a NaN stays one
        const double keep = std::exp(state[0] - top), add = std::exp(log - top);
        state[0] = top;
        state[1] = state[1] * keep + add;
        double* sums = state + merge_head;
        for (int64_t i = 0; i < width; ++i) sums[i] = sums[i] * keep + add * out[i];
    }
}

void merge_end(const double* state, float* out, float* lse, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, state += merge_head + width, out += width) {
        const bool seen = state[0] != nothing;
        for (int64_t i = 0; i < width; ++i)
            out[i] = seen ? static_cast<float>(state[merge_head + i] / state[1]) : 0.0f;
        lse[row] = static_cast<float>(seen ? state[0] + std::log(state[1]) : nothing);
    }
}

}  // namespace kvmmap
