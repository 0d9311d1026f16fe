// Online softmax over a range of positions: scores of one query row become the weights of its values, and its running
// sums count for less where a higher score than any before turns up.
#pragma once

#include <algorithm>
#include <limits>

#include "attend.h"
#include "lanes.h"

namespace kvmmap {
namespace {

template <class Engine>
class Softmax {
    static constexpr int W = Engine::lanes;
    using L = Lanes<W>;
    using F = typename L::F;

  public:
    Softmax(float softcap, AttendState state, int64_t width) : softcap_(softcap), state_(state), width_(width) {}

    // Products of codes -> scores, in units of log 2. `count` is a multiple of the lanes, here and below.
    void scale(float* scores, const float* key_scales, int64_t count) const {
        // What is beyond f32 stays below infinity: its difference to the highest must be a number.
        const F high = L::all(0x1p126f), low = L::all(-0x1p126f), most = L::all(std::numeric_limits<float>::max());
        for (int64_t j = 0; j < count; j += W) {
            // A product that is infinite is none with a scale of zero.
            const F product = L::load(scores + j), finite = product > most ? most : product < -most ? -most : product;
            const F s = finite * L::load(key_scales + j);
            L::store(scores + j, s > high ? high : s < low ? low : s);  // and a NaN stays one
        }
        if (softcap_ > 0) cap(scores, count);
    }

    // Scores -> weights of the values' codes, in place; false if they are all zero.
    bool weigh(int64_t row, float* scores, const float* value_scales, int64_t count) {
        F highest = L::load(scores);
        for (int64_t j = W; j < count; j += W) highest = L::max(highest, L::load(scores + j));
        const float best = Engine::highest(highest);
        if (best == -std::numeric_limits<float>::infinity()) {
            std::fill_n(scores, count, 0.0f);
            return false;
        }
        if (best > state_.top[row]) rescale(row, best);
        const F top = L::all(state_.top[row]);
        F total{};
        for (int64_t j = 0; j < count; j += W) {
            const F p = L::exp2(L::load(scores + j) - top);
            total += p;
            L::store(scores + j, p * L::load(value_scales + j));
        }
        state_.total[row] += Engine::sum(total);
        return true;
    }

    // A higher score than any before: what was summed counts for less.
    void rescale(int64_t row, float best) {
        const float before = state_.top[row];
        state_.top[row] = best;
        if (before == -std::numeric_limits<float>::infinity()) return;
        const F factor = L::exp2(L::all(before - best));
        state_.total[row] *= factor[0];
        float* sums = state_.sums + row * width_;
        for (int64_t i = 0; i < width_; i += W) L::store(sums + i, L::load(sums + i) * factor);
    }

  private:
    void cap(float* scores, int64_t count) const {
        constexpr float log2_e = 1.44269504088896341f;
        const F scale = L::all(1.0f / softcap_), back = L::all(softcap_ * log2_e);
        for (int64_t j = 0; j < count; j += W) L::store(scores + j, L::tanh(L::load(scores + j) * scale) * back);
    }

    float softcap_;
    AttendState state_;
    int64_t width_;
};

}  // namespace
}  // namespace kvmmap
