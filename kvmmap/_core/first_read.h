// Blocks that are read for the first time: their pages mapped ahead, and hashed in the pass that attends over them.
//
// Attention reads a few hundred kilobytes of rows, and hashing finds them in the second-level cache: memory is read once. The
// checksums are compared after the call, before anything that came of the rows is passed on.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "hash.h"

namespace kvmmap {

class FirstRead {
  public:
    // `blocks` have ascending numbers. They are mapped alone if not `hashes`.
    explicit FirstRead(const HashedBlocks& blocks, bool hashes = true);

    // Rows to attend over before map() and hash() are called for others: so few that they are in cache when they are hashed, or as
    // many as are mapped at a time. A multiple of `tile`.
    int64_t step(int64_t tile) const;

    // Maps the pages of blocks that rows [start, stop) touch, of some of them at least, in few calls: a page fault for every
    // few pages would take twice as long. Any thread may call it.
    void map(int64_t start, int64_t stop);

    // Hashes the blocks that rows [start, stop) touch and that end there; all that they touch if nothing `follows`. Each block
    // is hashed once, whichever thread comes first.
    void hash(int64_t start, int64_t stop, bool follows);

    // Hashes what is left, once all threads are done.
    void finish(int threads);

    // Does all there is to do before anything is read.
    void prepare(int threads);

  private:
    struct Flags {
        std::atomic<bool> mapped{false}, hashed{false};
    };

    // The first block that ends after a row.
    int64_t at(int64_t row) const;

    // Consecutive blocks whose pages are mapped at a time.
    int64_t mapped_blocks() const;

    const HashedBlocks blocks_;
    const bool hashes_;
    const int64_t row_bytes_;
    std::unique_ptr<Flags[]> flags_;
};

}  // namespace kvmmap
