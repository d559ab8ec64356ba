// Activations as levels of a few bits, for products with matrices in eight or four bits (packed_matrix.h).
#pragma once

#include <cstdint>

#include "packed_matrix.h"

namespace medreasoner {

// In the place of an element type: how many rows share a scale, and what a weight of zero is in the levels.
struct Packed {
    static constexpr int64_t kRows = kBlockRows;
    static constexpr int32_t kZero = 128;
};
struct Nibbles {
    static constexpr int64_t kRows = kNibbleRows;
    static constexpr int32_t kZero = 1;  // times the zero point of each block and column
};

// Activations as levels, and of each block a scale and an offset.
struct RoundedRows {
    int8_t* levels;
    float* scales;
    int32_t* offsets;

    template <class T>
    RoundedRows from(int64_t row, int64_t width) const {
        return {levels + row * width, scales + row * width / T::kRows, offsets + row * width / T::kRows};
    }
};

// Some of a row's columns, heads or blocks.
struct Range {
    int64_t first, end;
};

}  // namespace medreasoner
