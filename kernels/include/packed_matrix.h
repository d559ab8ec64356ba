// Matrices in eight or four bits, laid out for products with integers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace medreasoner {

// Rows (of the input) that share a scale, and columns that lie together.
constexpr int64_t kBlockRows = 64, kPanel = 64;
// A block of a panel: for each four rows the panel's columns, four bytes each (level + 128); then a float scale a column.
constexpr int64_t kBlockBytes = kBlockRows * kPanel + kPanel * 4;

// Bytes of a matrix (rows, cols), both multiples of 64: panel by panel, and in these block by block.
constexpr int64_t packed_bytes(int64_t rows, int64_t cols) { return rows / kBlockRows * (cols / kPanel) * kBlockBytes; }

// In four bits a block has 32 rows: for each eight rows the panel's columns, four bytes each, whose lower halves are the
// first four levels; then a float16 scale a column; then the zero points, in each 16 bits those of the columns
// i, i + 16, i + 32 and i + 48. value = (level - zero point) * scale.
constexpr int64_t kNibbleRows = 32;
constexpr int64_t kNibbleLevels = kNibbleRows * kPanel / 2, kNibbleScales = kPanel * 2, kNibbleZeros = kPanel / 2;
constexpr int64_t kNibbleBytes = kNibbleLevels + kNibbleScales + kNibbleZeros;

// Bytes of a matrix (rows, cols) in four bits; rows a multiple of 32, cols of 64.
constexpr int64_t nibble_bytes(int64_t rows, int64_t cols) { return rows / kNibbleRows * (cols / kPanel) * kNibbleBytes; }

// A matrix (rows, cols) in four bits as MatMulNBits has it: column by column, blocks of 32 rows, two levels a byte, the
// first in the lower half.
struct BlockMatrix {
    const uint8_t* levels;  // (cols, rows / 32, 16)
    const float* scales;    // (cols, rows / 32)
    const uint8_t* zeros;   // (cols, ceil(rows / 64)), two a byte
    int64_t rows, cols;
};

// Packs one panel of a matrix. False if a scale is larger than float16 holds, or not a number.
bool pack_nibbles(const BlockMatrix& matrix, int64_t panel, uint8_t* out);

// Rounds each block's column to 255 levels, to the nearest, ties to even.
void pack_matrix(const Matrix& matrix, uint8_t* out);

}  // namespace medreasoner
