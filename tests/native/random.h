// Numbers for checks: the same on every run and every machine.
#pragma once

#include <cstdint>

inline double uniform() {  // in [-1, 1)
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return static_cast<int32_t>(state) / 2147483648.0;
}
