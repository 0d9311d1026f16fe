#include "xxh64.h"

#include <initializer_list>

namespace kvmmap {
namespace {

constexpr uint64_t p1 = 0x9E3779B185EBCA87u, p2 = 0xC2B2AE3D27D4EB4Fu, p3 = 0x165667B19E3779F9u, p4 = 0x85EBCA77C2B2AE63u,
                   p5 = 0x27D4EB2F165667C5u;

uint64_t turn(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

template <class T>
uint64_t load(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);  // every machine that this is built for is little-endian
    return value;
}

uint64_t round(uint64_t lane, uint64_t input) { return turn(lane + input * p2, 31) * p1; }

}  // namespace

uint64_t xxh64(const void* data, int64_t size) {
    const char* at = static_cast<const char*>(data);
    const char* const end = at + size;
    uint64_t h = p5;
    if (size >= 32) {
        uint64_t a = p1 + p2, b = p2, c = 0, d = 0 - p1;
        for (; end - at >= 32; at += 32) {
            a = round(a, load<uint64_t>(at)), b = round(b, load<uint64_t>(at + 8));
            c = round(c, load<uint64_t>(at + 16)), d = round(d, load<uint64_t>(at + 24));
        }
        h = turn(a, 1) + turn(b, 7) + turn(c, 12) + turn(d, 18);
        for (const uint64_t lane : {a, b, c, d}) h = (h ^ round(0, lane)) * p1 + p4;
    }
    h += static_cast<uint64_t>(size);
    for (; end - at >= 8; at += 8) h = turn(h ^ round(0, load<uint64_t>(at)), 27) * p1 + p4;
    for (; end - at >= 4; at += 4) h = turn(h ^ load<uint32_t>(at) * p1, 23) * p2 + p3;
    for (; at < end; ++at) h = turn(h ^ static_cast<uint8_t>(*at) * p5, 11) * p1;
    h = (h ^ h >> 33) * p2;
    h = (h ^ h >> 29) * p3;
    return h ^ h >> 32;
}

}  // namespace kvmmap
