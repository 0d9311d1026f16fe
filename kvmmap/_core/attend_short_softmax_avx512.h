// The softmax of queries that were given in 16 bits, for a row at a time: what attend_spans_amx.h does for 16 rows.
#pragma once

#include <cmath>

#include "attend_powers_avx512.h"
#include "attend_softmax.h"

namespace kvmmap {
namespace {

// Of `count` positions: scales of keys, and of values what take_logarithms makes of them.
struct ShortScales {
    const float *keys, *logarithms, *inverses;
    float largest;
    const __mmask16* seen;  // of 16 positions each, those that are seen; none where all are
};

template <class Full>
class ShortSoftmax {
  public:
    ShortSoftmax(Full& full, AttendState state, float softcap) : full_(full), state_(state), softcap_(softcap) {}

    // Products of codes become digits of weights, in their place, in steps of four; returns what one unit is worth. `count` is a multiple of 16.
    float weigh(int64_t row, float* scores, int64_t count, const ShortScales& scales) {
        const float top = score(scores, count, scales);
        if (top > state_.top[row]) full_.rescale(row, top);
        const float unit = std::exp2(top - state_.top[row]) / most_weight;
        const __m512 above = _mm512_set1_ps(top);
        char* out = reinterpret_cast<char*>(scores);
        __m512 total = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; j += 16, out += 4 * step_bytes<2>) {
            // Less the highest first, which is exact near it: the largest weight must round to no more than two digits hold.
            const __m512 weight = power(_mm512_sub_ps(_mm512_load_ps(scores + j), above), most_weight);
            total = _mm512_fmadd_ps(weight, _mm512_load_ps(scales.inverses + j), total);
            store_digits<2>(_mm512_cvtps_epi32(weight), out);
        }
        state_.total[row] += _mm512_reduce_add_ps(total) * unit;
        return unit * scales.largest * sums_scale;
    }

  private:
    // Products of codes -> exponents of weights, less what is common; returns the largest.
    float score(float* scores, int64_t count, const ShortScales& scales) {
        const bool capped = softcap_ > 0;
        if (capped) full_.scale(scores, scales.keys, count);
        const __m512 most = _mm512_set1_ps(most_score), least = _mm512_set1_ps(-most_score), one = _mm512_set1_ps(1);
        __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t j = 0; j < count; j += 16) {
            const __m512 scale = capped ? one : _mm512_load_ps(scales.keys + j);
            const __m512 score = _mm512_fmadd_ps(within_floats(_mm512_load_ps(scores + j)), scale, _mm512_load_ps(scales.logarithms + j));
            top = _mm512_max_ps(top, score);
            _mm512_store_ps(scores + j, score);
        }
        if (scales.seen) top = hide(scores, count, scales.seen);
        const float highest_score = highest(top);
        if (std::abs(highest_score) < most_score) return highest_score;
        for (int64_t j = 0; j < count; j += 16)  // and a NaN stays one
            _mm512_store_ps(scores + j, _mm512_max_ps(least, _mm512_min_ps(most, _mm512_load_ps(scores + j))));
        if (scales.seen) hide(scores, count, scales.seen);
        return std::min(std::max(highest_score, -most_score), most_score);
    }

    // Positions that are not seen get no weight; returns the largest of the others.
    static __m512 hide(float* scores, int64_t count, const __mmask16* seen) {
        const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 top = nothing;
        for (int64_t j = 0; j < count; j += 16, ++seen) {
            const __m512 score = _mm512_mask_mov_ps(nothing, *seen, _mm512_load_ps(scores + j));
            top = _mm512_max_ps(top, score);
            _mm512_store_ps(scores + j, score);
        }
        return top;
    }

    Full& full_;
    AttendState state_;
    float softcap_;
};

}  // namespace
}  // namespace kvmmap
