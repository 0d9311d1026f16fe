// The hash functions as the including file's compiler flags have them: included by hash_*.cpp alone, which differ in those.
#pragma once

#include "hash.h"

#define XXH_INLINE_ALL
#include "third_party/xxhash/xxhash.h"

namespace kvmmap {
namespace {

uint64_t xxh3(const void* data, int64_t size) { return XXH3_64bits(data, static_cast<size_t>(size)); }

}  // namespace
}  // namespace kvmmap
