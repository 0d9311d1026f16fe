// Rows of any codec as the attention kernels take them: int8 codes with f32 scales, or f32 numbers.
//
// Codes of levels become the int8 values of their table, piece by piece, in memory that stays in the second-level cache: fewer
// bytes are read, and the kernels are those of int8. Rows of floats, and pairs of such rows with others, become f32.
#pragma once

#include <memory>
#include <vector>

#include "attend.h"

namespace kvmmap {

// What the rows of a pair are made of when they reach the kernel.
enum class Numbers { codes, floats, f16, bf16 };

Numbers numbers_of(const CodedRows& keys, const CodedRows& values);

// How one side of a pair reaches the kernel.
enum class Form { as_stored, levels, floats };

struct AttendForms {
    Form keys, values;

    bool any() const { return keys != Form::as_stored || values != Form::as_stored; }
    bool floats() const { return keys == Form::floats; }
};

AttendForms forms_of(const CodedRows& keys, const CodedRows& values);

class DecodedRows {
  public:
    // `tile`: positions that the kernel works on at a time. Room for `most` positions at the most, from the first take() on:
    // kernels that read rows as they are stored often leave nothing to decode.
    DecodedRows(const AttendJob& job, const CodedRows& keys, const CodedRows& values, int64_t tile, int64_t most);

    // Positions that are decoded at a time.
    int64_t span() const { return span_; }

    // Takes rows of another extent from now on, of the same codecs; `job` is valid as long as they are taken.
    void use(const AttendJob& job, const CodedRows& keys, const CodedRows& values) {
        job_ = &job, keys_.rows = keys, values_.rows = values;
    }

    // The job over rows [range.start, range.stop) alone, which become rows 0 and up; at most `span` of them. Valid until the
    // next call.
    AttendJob take(const AttendRange& range);

  private:
    struct Side {
        CodedRows rows;
        int64_t dim;
        Form form;
        std::unique_ptr<char[]> memory;
        std::vector<float> scales;

        void reserve(int64_t count);
        void decode(int64_t first, int64_t count, char* out) const;
    };
    void take(Side& side, const AttendRange& range, const void*& rows, const float*& scales);

    const AttendJob* job_;
    Side keys_, values_;
    int64_t span_, most_;
};

}  // namespace kvmmap
