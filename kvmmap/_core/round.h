// Rounding to whole numbers, halves away from zero, as every codec does.
#pragma once

namespace kvmmap {
namespace {

// The largest f32 below one half. For |q| < 2^22, trunc(q + copysign(below_half, q)) rounds halves away from zero: at
// k + 1/2 the sum rounds up to k + 1, and at the number below that it stays below.
[[maybe_unused]] constexpr float below_half = 0x1.fffffep-2f;

}  // namespace
}  // namespace kvmmap
