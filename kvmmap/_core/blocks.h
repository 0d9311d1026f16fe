// Blocks of rows whose checksums are computed, as Python hands them over.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "buffers.h"
#include "first_read.h"
#include "hash.h"

namespace kvmmap {

// Blocks of contiguous arrays [positions, bytes], and where their checksums go.
class Blocks {
  public:
    // With room for the checksums in `sums`; in here where that is none.
    Blocks(const nb::tuple& arrays, uint32_t track, nb::handle numbers, int64_t size, int64_t stop, nb::handle sums)
        : numbers_(numbers, contiguous) {
        if (arrays.size() > most_hashed_arrays) throw nb::value_error("too many arrays");
        if (size <= 0 || stop < 0) throw nb::value_error("size must be positive, and stop not negative");
        const int64_t count = numbers_.bytes() / 8;
        uint64_t* found = nullptr;
        if (sums.is_none()) {
            own_.resize(count);
            found = own_.data();
        } else {
            sums_ = std::make_unique<Buffer>(sums, writing);
            found = sums_->at_least<uint64_t>(count * 8, "out: too small or not aligned");
        }
        view = {{}, static_cast<int>(arrays.size()), track, numbers_.at_least<int64_t>(0, "blocks: not aligned"), count, size, stop, found};
        for (size_t i = 0; i < arrays.size(); ++i) {
            const Buffer& rows = *arrays_.emplace_back(std::make_unique<Buffer>(arrays[i], contiguous));
            if (rows.ndim() < 2 || rows.shape(0) < stop)
                throw nb::value_error("arrays must be [positions, bytes], or have more axes, of `stop` positions or more");
            view.arrays[i] = {rows.data(), rows.bytes() / std::max<int64_t>(1, rows.shape(0))};
        }
        for (int64_t i = 0; i < count; ++i)
            if (view.numbers[i] < 0 || view.numbers[i] > (stop - 1) / size) throw nb::value_error("a block is beyond `stop`");
    }

    HashedBlocks view;

  private:
    Buffer numbers_;
    std::unique_ptr<Buffer> sums_;
    std::vector<uint64_t> own_;
    std::vector<std::unique_ptr<Buffer>> arrays_;
};

// Blocks that attention hashes: with room for their checksums, (track, blocks, size, stop, sums), or with those that they should
// have, that of block n at `first` + n: (track, blocks, size, stop, expected, first). Where `expected` is None, nothing is hashed,
// and pages are mapped ahead all the same. Two more say where to note that they match: a list of a number a track, and what this
// track's is raised to; 0 where the caller notes it.
class UnreadBlocks {
  public:
    UnreadBlocks(const nb::tuple& arrays, const nb::tuple& entry)
        : hashes_(entry.size() == 5 || !entry[4].is_none()), compares_(hashes_ && entry.size() != 5),
          blocks_(arrays, nb::cast<uint32_t>(entry[0]), entry[1], nb::cast<int64_t>(entry[2]), nb::cast<int64_t>(entry[3]),
                  entry.size() == 5 ? nb::handle(entry[4]) : nb::handle(Py_None)),
          first_read(blocks_.view, hashes_) {
        const HashedBlocks& view = blocks_.view;
        if (!std::is_sorted(view.numbers, view.numbers + view.count)) throw nb::value_error("unread: blocks must ascend");
        if (entry.size() == 8) {
            below_ = nb::cast<nb::list>(entry[6]);
            if (below_.size() <= view.track) throw nb::value_error("below: has not all tracks");
            reach_ = nb::cast<int64_t>(entry[7]);
        }
        if (!compares_) return;
        table_ = std::make_unique<Buffer>(entry[4], contiguous);
        expected_ = table_->at_least<uint64_t>(0, "expected: not aligned");
        first_ = nb::cast<int64_t>(entry[5]);
        if (view.count && (first_ + view.numbers[0] < 0 || first_ + view.numbers[view.count - 1] >= table_->bytes() / 8))
            throw nb::value_error("expected: has not all blocks");
    }

    static bool fits(const nb::tuple& entry) { return entry.size() == 5 || entry.size() == 6 || entry.size() == 8; }

    // Once all are hashed: true if they have the checksums that they should have, or nothing is known of those.
    bool match() const {
        if (!compares_) return true;
        const HashedBlocks& view = blocks_.view;
        for (int64_t i = 0; i < view.count; ++i)
            if (view.sums[i] != expected_[first_ + view.numbers[i]]) return false;
        return true;
    }

    // Once they match: notes it; false where the caller has to. The GIL is held.
    bool note() const {
        if (!below_.is_valid()) return true;
        const uint32_t track = blocks_.view.track;
        if (reach_ && nb::cast<int64_t>(below_[track]) < reach_) below_[track] = reach_;
        return reach_ != 0;
    }

  private:
    bool hashes_, compares_;
    Blocks blocks_;
    std::unique_ptr<Buffer> table_;
    const uint64_t* expected_ = nullptr;
    int64_t first_ = 0;
    nb::list below_ = nb::steal<nb::list>(nb::handle());
    int64_t reach_ = 0;

  public:
    FirstRead first_read;
};

}  // namespace kvmmap
