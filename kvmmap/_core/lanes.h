// Vectors of W floats in the compiler's own extension (GCC, Clang), and the two functions that attention needs of them:
// one source for SSE, AVX2, NEON and AVX-512, which differ in W and in the flags of the file that includes this.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace kvmmap {
// Every kernel file gets its own copies: one shared by the linker could hold instructions that this machine lacks.
namespace {

template <int W>
struct Lanes {
    typedef float F __attribute__((vector_size(4 * W)));
    typedef int32_t I __attribute__((vector_size(4 * W)));

    static F load(const float* p) {
        F v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
    static F all(float x) { return F{} + x; }
    static F max(F a, F b) { return a > b ? a : b; }

    static float highest(F v) {
        float x[W];
        store(x, v);
        for (int step = W / 2; step; step /= 2)
            for (int i = 0; i < step; ++i) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
        return x[0];
    }
    static float sum(F v) {
        float x[W];
        store(x, v);
        for (int step = W / 2; step; step /= 2)
            for (int i = 0; i < step; ++i) x[i] += x[i + step];
        return x[0];
    }

    // 2^x for x <= 0; 0 below -126. The polynomial is that of Cephes' exp2f (Moshier), on [-1/2, 1/2]: 2e-7 of the result.
    static F exp2(F x) {
        const F low = all(-126.0f);
        const F kept = max(x, low);
        const F magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
        const F shifted = kept + magic;
        const F f = kept - (shifted - magic);
        F p = all(1.535336188319500e-4f);
        p = p * f + 1.339887440266574e-3f;
        p = p * f + 9.618437357674640e-3f;
        p = p * f + 5.550332471162809e-2f;
        p = p * f + 2.402264791363012e-1f;
        p = p * f + 6.931472028550421e-1f;
        p = p * f + 1.0f;
        I bits, exponent;
        std::memcpy(&bits, &p, sizeof bits);
        std::memcpy(&exponent, &shifted, sizeof exponent);
        bits += exponent << 23;
        F result;
        std::memcpy(&result, &bits, sizeof result);
        return x < low ? F{} : result;
    }

    // tanh, as Cephes' tanhf: near zero by polynomial (1 - 2 / (e^2x + 1) would lose its digits there).
    static F tanh(F x) {
        const F size = x < 0 ? -x : x;
        const F bounded = size > 10 ? all(10) : size;
        const F e = exp2(bounded * -2.88539008177792681f);  // e^(-2|x|)
        const F far = (1.0f - e) / (1.0f + e);
        const F z = x * x;
        F p = all(-5.70498872745e-3f);
        p = p * z + 2.06390887954e-2f;
        p = p * z - 5.37397155531e-2f;
        p = p * z + 1.33314422036e-1f;
        p = p * z - 3.33332819422e-1f;
        return size < 0.625f ? x + x * z * p : (x < 0 ? -far : far);
    }
};

}  // namespace
}  // namespace kvmmap
