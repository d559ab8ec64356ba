// Products of bfloat16 on processors with AVX-512, best with its instructions for them or with tiles (Intel AMX), and
// matrices laid out for them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rows.h"

// GCC has what it takes from version 11 on, clang from 12.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MR_HAS_TILES
#endif

namespace medreasoner {

// Rows of a tile, columns of one of weights, and how many numbers of a row are multiplied at once.
constexpr int64_t kTile = 16, kTileDepth = 32;
constexpr int64_t kTileNumbers = kTile * kTileDepth;

constexpr int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// How products of bfloat16 go: nowhere fast, through floats, by vectors of bfloat16, by tiles.
enum class TileRoad { none, avx512, avx512_bf16, amx };

// The best that this processor and this system have, found at the first call (which asks the system to let the process use
// tiles), or what was chosen.
TileRoad tile_road();
std::string tile_road_name();
std::vector<std::string> tile_road_names();  // those that this machine can take, slowest first
void set_tile_road(const std::string& name);  // for tests; throws std::invalid_argument

inline bool has_tiles() { return tile_road() != TileRoad::none; }

// Numbers of a matrix (rows, cols) as tiles; rows are filled up to 32, columns to 16, with zeros.
constexpr int64_t tiled_numbers(int64_t rows, int64_t cols) {
    return up_to(rows, kTileDepth) / kTileDepth * (up_to(cols, kTile) / kTile) * kTileNumbers;
}

// A matrix (in, out) as tiles, or packed in eight bits (packed_matrix.h) with `in` and `out` filled up to multiples of 64.
struct TiledMatrix {
    const uint16_t* tiles;
    const uint8_t* packed;
};

// Rounds to bfloat16; needs has_tiles(). 16 columns are a panel, whose tiles follow each other: in a tile the rows 2 i and 2 i + 1 of each
// column are neighbours. `stride` panels lie between two of them, so that matrices can take turns.
void tile_matrix(const Matrix& matrix, int64_t stride, uint16_t* out);

}  // namespace medreasoner
