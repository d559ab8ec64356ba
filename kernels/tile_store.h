// Where the bindings keep the matrices of kernels on tiles: huge pages, one behind the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "bindings.h"
#include "packed_matrix.h"
#include "pages.h"
#include "tiles.h"

constexpr int64_t tiled_bytes(int64_t rows, int64_t cols) { return tiled_numbers(rows, cols) * static_cast<int64_t>(sizeof(uint16_t)); }

// Bytes of a matrix in eight bits, filled up with zeros to whole blocks and panels.
constexpr int64_t filled_bytes(int64_t rows, int64_t cols) { return packed_bytes(up_to(rows, kBlockRows), up_to(cols, kPanel)); }

// Room for matrices that are put into it one by one; those that were asked for at once lie in one piece. Packing runs without
// the interpreter's lock: other parts of a bundle are loaded meanwhile.
class TileStore {
   public:
    void reserve(int64_t n_bytes) {
        pieces_.push_back(allocate_pages(n_bytes));
        free_ = pieces_.back().get();
        left_ = n_bytes;
    }

    // As tiles of bfloat16.
    const uint16_t* tiles(const Matrix& matrix, int64_t stride) {
        auto* const to = reinterpret_cast<uint16_t*>(taken(tiled_bytes(matrix.rows, matrix.cols)));
        const py::gil_scoped_release release;
        tile_matrix(matrix, stride, to);
        return to;
    }

    // In eight bits.
    const uint8_t* packed(const Matrix& matrix) {
        const int64_t rows = up_to(matrix.rows, kBlockRows), cols = up_to(matrix.cols, kPanel);
        uint8_t* const to = taken(packed_bytes(rows, cols));
        const py::gil_scoped_release release;
        if (rows == matrix.rows && cols == matrix.cols) {
            pack_matrix(matrix, to);
            return to;
        }
        const int64_t size = size_of(matrix.dtype);
        const auto whole = std::make_unique<uint8_t[]>(static_cast<size_t>(rows * cols * size));  // zeros
        for (int64_t i = 0; i < matrix.rows; ++i) {
            std::memcpy(whole.get() + i * cols * size, static_cast<const uint8_t*>(matrix.data) + i * matrix.cols * size, static_cast<size_t>(matrix.cols * size));
        }
        pack_matrix({whole.get(), matrix.dtype, rows, cols}, to);
        return to;
    }

    // The one or the other.
    TiledMatrix either(const Matrix& matrix, bool pack) {
        if (pack) return {nullptr, packed(matrix)};
        return {tiles(matrix, 1), nullptr};
    }

    uint8_t* taken(int64_t n_bytes) {
        if (n_bytes > left_) reserve(std::max(n_bytes, kPiece));
        uint8_t* const first = free_;
        free_ += n_bytes;
        left_ -= n_bytes;
        return first;
    }

   private:
    static constexpr int64_t kPiece = int64_t{2} << 20;

    std::vector<Pages> pieces_;
    uint8_t* free_ = nullptr;
    int64_t left_ = 0;
};
