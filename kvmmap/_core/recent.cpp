#include "recent.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "codec.h"
#include "digest.h"
#include "half.h"
#include "hash.h"
#include "merge.h"

namespace kvmmap {
namespace {

uint64_t load_tag(const uint64_t* tag) { return __atomic_load_n(tag, __ATOMIC_ACQUIRE); }

// A slot while it is written: empty, and full again only after all else. Who has seen what is written, and then looks at the
// tag, finds it empty or new: the fence orders stores among each other, and waits for none.
class Filling {
  public:
    explicit Filling(uint64_t* tag) : tag_(tag) {
        __atomic_store_n(tag_, 0, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_RELEASE);
    }
    void done(uint64_t tag) { __atomic_store_n(tag_, tag, __ATOMIC_RELEASE); }

  private:
    uint64_t* tag_;
};

// Stores a position's rows in 16 bits: as they are, or f32 as f16 and, where a number is beyond that, as bfloat16.
Half narrow(const RowGrid& rows, int64_t position, std::unique_ptr<float[]>& room, uint16_t* out) {
    const char* in = static_cast<const char*>(rows.data) + position * rows.outer_stride;
    const int64_t count = rows.inner * rows.dim;
    if (rows.dtype != Dtype::f32) {
        for (int64_t head = 0; head < rows.inner; ++head)
            std::memcpy(out + head * rows.dim, in + head * rows.inner_stride, 2 * rows.dim);
        return rows.dtype == Dtype::f16 ? Half::f16 : Half::bf16;
    }
    const CodecKernels& kernels = codec_kernels();
    const float* numbers = reinterpret_cast<const float*>(in);
    if (rows.inner_stride != 4 * rows.dim || reinterpret_cast<uintptr_t>(in) % alignof(float)) {
        if (!room) room.reset(new float[count + readable_behind]);
        kernels.widen[static_cast<int>(Dtype::f32)](in, rows.inner_stride, rows.inner, rows.dim, room.get());
        numbers = room.get();
    }
    if (kernels.within_f16(numbers, count, out)) return Half::f16;
    return kernels.within_bf16(numbers, count, out) ? Half::bf16 : Half::none;
}

// A digest of values by their bytes; of arrays it takes those of their digests.
template <size_t N>
uint64_t digest_of(const uint64_t (&words)[N]) {
    return xxh64(words, sizeof words);
}

uint64_t checksum_of(uint64_t tag, uint64_t row, const void* keys, int64_t key_bytes, const void* values, int64_t value_bytes) {
    return digest_of({tag, row, xxh64(keys, key_bytes), xxh64(values, value_bytes)});
}

}  // namespace

uint64_t RecentRing::find(int64_t position) const {
    if (!slots) return 0;
    const uint64_t tag = load_tag(tags + slot(position));
    return tag && position_of(tag) == position ? tag : 0;
}

void keep_rows(const RecentRing& ring, int64_t start, const RowGrid& keys, const RowGrid& values) {
    if (!ring.slots) return;
    std::unique_ptr<float[]> key_room, value_room;
    for (int64_t i = std::max<int64_t>(0, keys.outer - ring.slots); i < keys.outer; ++i) {
        const int64_t slot = ring.slot(start + i);
        Filling filling(ring.tags + slot);
        const Half of_keys = narrow(keys, i, key_room, ring.keys + slot * ring.key_numbers);
        const Half of_values = narrow(values, i, value_room, ring.values + slot * ring.value_numbers);
        if (of_keys != Half::none && of_values != Half::none) filling.done(tag_of(start + i, of_keys, of_values));
    }
}

void keep_recent(const RecentRings& rings, int64_t start, const RowGrid& keys, const RowGrid& values) {
    keep_rows(rings.ring, start, keys, values);
    if (start >= rings.first.slots) return;
    RowGrid first_keys = keys, first_values = values;
    first_keys.outer = first_values.outer = std::min(keys.outer, rings.first.slots - start);
    keep_rows(rings.first, start, first_keys, first_values);
}

void read_rows(const RecentRing& ring, bool keys, int64_t start, int64_t stop, Dtype dtype, char* out) {
    const int64_t count = keys ? ring.key_numbers : ring.value_numbers, size = count * dtype_bytes(dtype);
    const CodecKernels& kernels = codec_kernels();
    std::unique_ptr<uint16_t[]> copy(new uint16_t[count]);  // the slot may be written meanwhile
    std::unique_ptr<float[]> wide(new float[count + readable_behind]);
    for (int64_t p = std::max(start, stop - ring.slots); p < stop; ++p) {
        const uint64_t tag = ring.find(p);
        if (!tag) continue;
        std::memcpy(copy.get(), (keys ? ring.keys : ring.values) + ring.slot(p) * count, 2 * count);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (ring.find(p) != tag) continue;
        const Dtype form = (keys ? keys_of(tag) : values_of(tag)) == Half::f16 ? Dtype::f16 : Dtype::bf16;
        char* row = out + (p - start) * size;
        if (form == dtype) {
            std::memcpy(row, copy.get(), size);
        } else {
            kernels.widen[static_cast<int>(form)](reinterpret_cast<const char*>(copy.get()), 2 * count, 1, count, wide.get());
            kernels.narrow[static_cast<int>(dtype)](wide.get(), count, row);
        }
    }
}

bool CodedArrays::has(int64_t position) const {
    return position >= first && std::all_of(arrays.begin(), arrays.end(), [&](const Array& a) { return position - first < a.rows; });
}

uint64_t CodedArrays::digest(int64_t position) const {
    uint64_t digests[4] = {};
    const size_t count = std::min<size_t>(arrays.size(), 4);
    for (size_t i = 0; i < count; ++i)
        digests[i] = xxh64(arrays[i].data + (position - first) * arrays[i].row_bytes, arrays[i].row_bytes);
    return xxh64(digests, 8 * static_cast<int64_t>(count));
}

void make_records(const RecentRing& ring, const CodedArrays& coded, int64_t start, int64_t stop, char* out) {
    const int64_t size = record_bytes(ring), key_bytes = 2 * ring.key_numbers, value_bytes = 2 * ring.value_numbers;
    const int64_t padding = size - record_head - key_bytes - value_bytes;
    constexpr int64_t most = 16;  // as many as are hashed together
    constexpr int most_arrays = 4;
    const int array_count = static_cast<int>(std::min<size_t>(coded.arrays.size(), most_arrays));
    while (start < stop) {
        int64_t positions[most], count = 0;
        char* records[most];
        uint64_t tags[most];
        for (; start < stop && count < most; ++start, out += size) {
            tags[count] = coded.has(start) ? ring.find(start) : 0;
            if (!tags[count]) {
                std::memset(out, 0, size);
                continue;
            }
            positions[count] = start, records[count] = out;
            ++count;
        }
        const char* ranges[most];
        const auto hash = [&](auto&& address, int64_t bytes, uint64_t* digests) {
            for (int64_t i = 0; i < count; ++i) ranges[i] = address(positions[i]);
            xxh64_of_each(ranges, count, bytes, digests);
        };
        uint64_t keys[most], values[most], parts[most_arrays][most];
        const auto key_row = [&](int64_t p) { return reinterpret_cast<const char*>(ring.keys + ring.slot(p) * ring.key_numbers); };
        const auto value_row = [&](int64_t p) { return reinterpret_cast<const char*>(ring.values + ring.slot(p) * ring.value_numbers); };
        hash(key_row, key_bytes, keys);
        hash(value_row, value_bytes, values);
        for (int a = 0; a < array_count; ++a) {
            const CodedArrays::Array& array = coded.arrays[a];
            hash([&](int64_t p) { return array.data + (p - coded.first) * array.row_bytes; }, array.row_bytes, parts[a]);
        }
        for (int64_t i = 0; i < count; ++i) {
            uint64_t digests[most_arrays];
            for (int a = 0; a < array_count; ++a) digests[a] = parts[a][i];
            const uint64_t row = xxh64(digests, 8 * array_count);
            const uint64_t head[3] = {tags[i], row, digest_of({tags[i], row, keys[i], values[i]})};
            char* to = records[i];
            std::memcpy(to, head, sizeof head);
            std::memcpy(to + record_head, key_row(positions[i]), key_bytes);
            std::memcpy(to + record_head + key_bytes, value_row(positions[i]), value_bytes);
            std::memset(to + size - padding, 0, padding);
        }
    }
}

RecordState take_record(const RecentRing& ring, const CodedArrays& coded, int64_t position, const char* record) {
    const int64_t key_bytes = 2 * ring.key_numbers, value_bytes = 2 * ring.value_numbers, slot = ring.slot(position);
    uint64_t head[3];
    std::memcpy(head, record, sizeof head);
    const uint64_t tag = head[0];
    if (!(head[0] | head[1] | head[2])) return RecordState::empty;
    if (head[2] != checksum_of(tag, head[1], record + record_head, key_bytes, record + record_head + key_bytes, value_bytes))
        return RecordState::damaged;
    const auto known = [](Half form) { return form == Half::f16 || form == Half::bf16; };
    if (tag != tag_of(position, keys_of(tag), values_of(tag)) || !known(keys_of(tag)) || !known(values_of(tag)) ||
        !coded.has(position) || head[1] != coded.digest(position))
        return RecordState::stale;
    Filling filling(ring.tags + slot);
    std::memcpy(ring.keys + slot * ring.key_numbers, record + record_head, key_bytes);
    std::memcpy(ring.values + slot * ring.value_numbers, record + record_head + key_bytes, value_bytes);
    filling.done(tag);
    return RecordState::sound;
}

namespace {

// Consecutive positions, in consecutive slots of one ring and of one form.
struct Run {
    int64_t start, stop;
    const RecentRing* ring;
    int64_t slot;    // of the first position
    uint64_t forms;  // the tag's bits above the position
    bool windowed;   // it stands for the coded rows only within the window

    uint64_t tag(int64_t position) const { return static_cast<uint64_t>(position + 1) | forms; }
    uint64_t stored(int64_t position) const { return load_tag(ring->tags + slot + position - start); }
};

// What was found when the tags were read: slots that were written since must not count.
class Runs {
  public:
    explicit Runs(const RecentView& view) : view_(view) {
        const int64_t length = view.length, sinks = std::min(view.first.slots, length);
        runs_.reserve(4);
        add(view.first, 0, sinks, false);
        // A position of both rings counts once.
        add(view.ring, std::max<int64_t>(0, length - view.ring.slots), length, true);
        const auto before = [](const Run& a, const Run& b) { return a.start < b.start; };
        if (!std::is_sorted(runs_.begin(), runs_.end(), before)) std::sort(runs_.begin(), runs_.end(), before);
    }

    const std::vector<Run>& all() const { return runs_; }

    // Leaves out what has changed; true if anything has.
    bool drop_changed() {
        const auto same = [](const Run& run) {
            for (int64_t p = run.start; p < run.stop; ++p)
                if (run.stored(p) != run.tag(p)) return false;
            return true;
        };
        if (std::all_of(runs_.begin(), runs_.end(), same)) return false;
        std::vector<Run> kept;
        for (const Run& run : runs_)
            for (int64_t p = run.start; p < run.stop; ++p)
                if (run.stored(p) == run.tag(p)) append(kept, {p, p + 1, run.ring, run.slot + p - run.start, run.forms, run.windowed});
        runs_ = std::move(kept);
        return true;
    }

  private:
    // Slots are counted up: a division for each position would be a percent of attention over thousands.
    void add(const RecentRing& ring, int64_t start, int64_t stop, bool windowed) {
        if (start >= stop) return;
        for (int64_t p = start, slot = ring.slot(start); p < stop; ++p, slot = slot + 1 < ring.slots ? slot + 1 : 0) {
            const uint64_t tag = load_tag(ring.tags + slot);
            if (!tag || position_of(tag) != p || (windowed && p < view_.first.slots && view_.first.find(p))) continue;
            append(runs_, {p, p + 1, &ring, slot, tag - static_cast<uint64_t>(p + 1), windowed});
        }
    }

    static void append(std::vector<Run>& runs, const Run& one) {
        if (!runs.empty()) {
            Run& last = runs.back();
            if (last.stop == one.start && last.ring == one.ring && last.forms == one.forms && one.slot != 0) {
                ++last.stop;
                return;
            }
        }
        runs.push_back(one);
    }

    const RecentView& view_;
    std::vector<Run> runs_;
};

// Results of attention over disjoint sets of rows, merged.
class Parts {
  public:
    Parts(const AttendJob& job) : job_(job) {}

    void add(AttendJob part, const std::vector<AttendRange>& ranges, const AttendExtent* extents, int64_t count, int threads) {
        if (ranges.empty()) return;
        part.ranges = ranges.data(), part.num_ranges = static_cast<int64_t>(ranges.size());
        if (count_++ == 0) return attend(part, extents, count, threads);  // into the job's own arrays
        const int64_t rows = job_.rows(), width = job_.value_dim;
        if (state_.empty()) {
            state_.assign(rows * (merge_head + width), 0.0);
            for (int64_t row = 0; row < rows; ++row) state_[row * (merge_head + width)] = -std::numeric_limits<double>::infinity();
            out_.resize(rows * width), lse_.resize(rows);
            limit(job_.out);
            merge_part(state_.data(), job_.out, job_.lse, rows, width);
        }
        part.out = out_.data(), part.lse = lse_.data();
        attend(part, extents, count, threads);
        limit(out_.data());
        merge_part(state_.data(), out_.data(), lse_.data(), rows, width);
    }

    void end() {
        if (!state_.empty()) return merge_end(state_.data(), job_.out, job_.lse, job_.rows(), job_.value_dim);
        if (count_) return;
        std::fill_n(job_.out, job_.rows() * job_.value_dim, 0.0f);
        std::fill_n(job_.lse, job_.rows(), -std::numeric_limits<float>::infinity());
    }

  private:
    // The decoded form of the largest number there is may be beyond it, and would stay so whatever its weight.
    void limit(float* out) const {
        constexpr float largest = std::numeric_limits<float>::max();
        for (int64_t i = 0; i < job_.rows() * job_.value_dim; ++i) out[i] = std::clamp(out[i], -largest, largest);
    }

    const AttendJob& job_;
    int count_ = 0;
    std::vector<double> state_;
    std::vector<float> out_, lse_;
};

CodedRows half_rows(Half form, const uint16_t* rows) {
    return {{form == Half::f16 ? Codec::f16 : Codec::bf16, false}, reinterpret_cast<const char*>(rows), nullptr};
}

void attend_parts(const AttendJob& job, const AttendExtent* extents, int64_t count, const RecentView& view,
                  const std::vector<Run>& runs, int threads) {
    // Coded rows outside of all runs, and those inside that queries may be too far from to see in 16 bits.
    std::vector<AttendRange> outside, inside;
    const int64_t last = job.query_start + job.n - 1;
    for (int64_t i = 0; i < job.num_ranges; ++i) {
        const AttendRange& r = job.ranges[i];
        int64_t from = r.start;
        for (const Run& run : runs) {
            const int64_t start = std::max(run.start - job.first_position, from), stop = std::min(run.stop - job.first_position, r.stop);
            if (start >= stop) continue;
            if (from < start) outside.push_back({r.head, r.head_end, from, start});
            if (run.windowed && job.first_position + start <= last - view.window) inside.push_back({r.head, r.head_end, start, stop});
            from = stop;
        }
        if (from < r.stop) outside.push_back({r.head, r.head_end, from, r.stop});
    }
    Parts parts(job);
    parts.add(job, outside, extents, count, threads);
    AttendJob behind = job;
    behind.behind = view.window;
    parts.add(behind, inside, extents, count, threads);
    // Those of one form go together, as extents. Where queries are many, those of the ring by themselves: a query may be
    // too far from them.
    const bool all_near = std::none_of(runs.begin(), runs.end(), [&](const Run& r) { return r.windowed && r.start <= last - view.window; });
    std::vector<bool> done(runs.size());
    for (size_t i = 0; i < runs.size(); ++i) {
        if (done[i]) continue;
        std::vector<AttendExtent> kept;
        std::vector<AttendRange> ranges;
        const int64_t origin = runs[i].start;
        for (size_t k = i; k < runs.size(); ++k) {
            const Run& run = runs[k];
            if (done[k] || run.forms != runs[i].forms || (!all_near && run.windowed != runs[i].windowed)) continue;
            done[k] = true;
            const RecentRing& ring = *run.ring;
            kept.push_back({run.start - origin, half_rows(keys_of(run.forms), ring.keys + run.slot * ring.key_numbers),
                            half_rows(values_of(run.forms), ring.values + run.slot * ring.value_numbers)});
            for (int64_t r = 0; r < job.num_ranges; ++r) {
                const AttendRange& range = job.ranges[r];
                const int64_t start = std::max(range.start + job.first_position, run.start);
                const int64_t stop = std::min(range.stop + job.first_position, run.stop);
                if (start < stop) ranges.push_back({range.head, range.head_end, start - origin, stop - origin});
            }
        }
        AttendJob part = job;
        part.first_position = origin;
        if (!all_near && runs[i].windowed) part.within = view.window;
        parts.add(part, ranges, kept.data(), static_cast<int64_t>(kept.size()), threads);
    }
    parts.end();
}

}  // namespace

void attend_recent(const AttendJob& job, const AttendExtent* extents, int64_t count, const RecentView& recent, int threads) {
    Runs runs(recent);
    do {
        attend_parts(job, extents, count, recent, runs.all(), threads);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
    } while (runs.drop_changed());
}

}  // namespace kvmmap
