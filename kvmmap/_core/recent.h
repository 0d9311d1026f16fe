// Rows in 16 bits beside the coded ones: those of the last positions, in a ring, and of the first. docs/format.md specifies
// their record in a file.
//
//   position p of a ring of n slots is in slot p mod n; slot i of a tag array says which position it holds, if any
//   tag = p + 1 in bits 0-39, the form of keys in bits 40-47 and of values in bits 48-55; 0 is an empty slot
//
// A slot is written by one thread while others may read it: its tag is 0 meanwhile. Who reads compares tags before and after.
#pragma once

#include <cstdint>
#include <vector>

#include "attend.h"
#include "rows_run.h"

namespace kvmmap {

// How a side of a slot is stored.
enum class Half : int { none = 0, f16 = 1, bf16 = 2 };

struct RecentRing {
    uint64_t* tags;    // [slots]
    uint16_t* keys;    // [slots, key_numbers]
    uint16_t* values;  // [slots, value_numbers]
    int64_t slots, key_numbers, value_numbers;

    int64_t slot(int64_t position) const { return position % slots; }
    // The tag of a position, 0 if the ring does not hold it.
    uint64_t find(int64_t position) const;
};

constexpr uint64_t tag_of(int64_t position, Half keys, Half values) {
    return static_cast<uint64_t>(position + 1) | static_cast<uint64_t>(keys) << 40 | static_cast<uint64_t>(values) << 48;
}
constexpr int64_t position_of(uint64_t tag) { return static_cast<int64_t>(tag & ((uint64_t{1} << 40) - 1)) - 1; }
constexpr Half keys_of(uint64_t tag) { return static_cast<Half>(tag >> 40 & 0xff); }
constexpr Half values_of(uint64_t tag) { return static_cast<Half>(tag >> 48 & 0xff); }

// Stores positions from `start` on, the last of which stay: bf16 as it is, f16 as it is, f32 as f16 or, where a number is
// beyond f16, bf16. A position with a number beyond both leaves its slot empty.
void keep_rows(const RecentRing& ring, int64_t start, const RowGrid& keys, const RowGrid& values);

// Those of a layer: of its last positions, and of its first ones.
struct RecentRings {
    RecentRing ring, first;
};

// Stores positions from `start` on in the slots that either has for them.
void keep_recent(const RecentRings& rings, int64_t start, const RowGrid& keys, const RowGrid& values);

// Writes keys or values of those of positions [start, stop) that a ring holds into the rows of `out`, [stop - start, numbers]
// of a dtype, that are theirs, and leaves other rows alone. What is beyond f16 becomes infinite in it.
void read_rows(const RecentRing& ring, bool keys, int64_t start, int64_t stop, Dtype dtype, char* out);

// A layer's coded rows: arrays of rows, of which row 0 is that of position `first`.
struct CodedArrays {
    struct Array {
        const char* data;
        int64_t row_bytes, rows;
    };
    std::vector<Array> arrays;
    int64_t first;

    bool has(int64_t position) const;
    // A digest of a position's row.
    uint64_t digest(int64_t position) const;
};

// The record of a slot in a file: tag, digest of the coded row, checksum, keys, values, zeros up to a multiple of 8 bytes.
constexpr int64_t record_head = 24;
inline int64_t record_bytes(const RecentRing& ring) {
    return record_head + (2 * (ring.key_numbers + ring.value_numbers) + 7) / 8 * 8;
}

// Writes the records of positions [start, stop) side by side; zeros for one that the ring does not hold.
void make_records(const RecentRing& ring, const CodedArrays& coded, int64_t start, int64_t stop, char* out);

// What a record says, whatever the ring holds.
enum class RecordState : int { empty = 0, sound = 1, damaged = 2, stale = 3 };

// Reads a copy of a record into the slot of `position`, which is then empty unless the record is sound: it is that of the
// position, its checksum matches, and so does the coded row. Damaged: its checksum does not match.
RecordState take_record(const RecentRing& ring, const CodedArrays& coded, int64_t position, const char* record);

// Attention in which the newest positions of each query, and the first ones, take part with 16 bits.
struct RecentView {
    RecentRing ring, first;
    int64_t window;  // positions up to and including a query's own that the ring's rows stand for
    int64_t length;  // positions stored
};

void attend_recent(const AttendJob& job, const AttendExtent* extents, int64_t count, const RecentView& recent, int threads);

}  // namespace kvmmap
