// Matrices in eight bits, laid out for products with integers.
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

// Rounds each block's column to 255 levels, to the nearest, ties to even.
void pack_matrix(const Matrix& matrix, uint8_t* out);

}  // namespace medreasoner
