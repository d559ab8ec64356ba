// What products take: rows of bfloat16, or of levels where matrices are packed in eight bits. For bodies of for_each_road.h,
// behind tiles_simd.h.

#include "packed_simd.h"

constexpr int64_t blocks(int64_t width) { return up_to(width, kBlockRows); }

// Room for n rows of a product's input, up to `widest` numbers each; levels are put in whole blocks.
class Inputs {
   public:
    Inputs(bool is_packed, int64_t n, int64_t widest)
        : is_packed_(is_packed),
          line_(blocks(widest)),
          halves_(is_packed ? 0 : n * up_to(widest, kTileDepth)),
          levels_(is_packed ? n * blocks(widest) : 0),
          scales_(is_packed ? n * blocks(widest) / kBlockRows : 0),
          offsets_(is_packed ? n * blocks(widest) / kBlockRows : 0),
          panel_(is_packed ? 2 * n * kPanel : 0) {}

    // A row to fill before `put`.
    float* line() const { return line_.get(); }
    Half* halves() const { return halves_.get(); }

    // What is in `line` becomes row i of `width` numbers.
    MR_TARGET void put(int64_t i, int64_t width) const {
        if (is_packed_) return round_row<Packed>(line(), blocks(width), rows().from<Packed>(i, blocks(width)));
        for (int64_t j = 0; j < width; j += MR_LANES) narrow_to(load_float(line() + j), halves() + i * width + j);
    }

    // 64 floats become block b of row i.
    MR_TARGET void put_block(int64_t i, int64_t b, int64_t width, const float* from) const {
        round_row<Packed>(from, kBlockRows, rows().from<Packed>(1, i * blocks(width) + b * kBlockRows));
    }

    // Rows of bfloat16 become those of the input.
    MR_TARGET void take(const Half* from, int64_t n, int64_t width) const {
        for (int64_t i = 0; i < n; ++i, from += width) {
            for (int64_t j = 0; j < width; j += MR_LANES) save((VecF)(widen16(from + j) << 16), line() + j);
            put(i, width);
        }
    }

    // y (n_tiles * 16, out) = the input (n_tiles * 16, in) @ w, or added to y. Packed, `out` is whole panels.
    MR_TARGET void times(const TiledMatrix& w, int64_t n_tiles, int64_t in, int64_t out, float* y, bool goes_on) const {
        if (!is_packed_) return product(halves(), in, n_tiles, w.tiles, in, out, y, out, goes_on);
        if (!goes_on) std::fill(y, y + n_tiles * kTile * out, 0.f);
        for (int64_t j = 0; j * kPanel < out; ++j) add_panel_of(w.packed, j, n_tiles, in, out, y + j * kPanel);
    }

    // The same for rows of bfloat16 that are somewhere else; packed, they are taken for it.
    MR_TARGET void times_of(const Half* from, const TiledMatrix& w, int64_t n_tiles, int64_t in, int64_t out, float* y, bool goes_on) const {
        if (!is_packed_) return product(from, in, n_tiles, w.tiles, in, out, y, out, goes_on);
        take(from, n_tiles * kTile, in);
        times(w, n_tiles, in, out, y, goes_on);
    }

    // y (n_tiles * 16, 64), rows `stride` apart, += the input @ panel j of a packed matrix.
    MR_TARGET void add_panel_of(const uint8_t* packed, int64_t j, int64_t n_tiles, int64_t in, int64_t stride, float* y) const {
        const int64_t depth = blocks(in);
        add_one_panel(packed + j * packed_bytes(depth, kPanel), depth, stride, n_tiles * kTile, rows(), {0, depth / kBlockRows}, y);
    }

    // What another input makes of panel j of a packed matrix, in this one's first or second panel of sums.
    MR_TARGET float* sums_from(const Inputs& input, const uint8_t* packed, int64_t j, int64_t n_tiles, int64_t in, int64_t which) const {
        float* const y = panel_.get() + which * n_tiles * kTile * kPanel;
        std::fill(y, y + n_tiles * kTile * kPanel, 0.f);
        input.add_panel_of(packed, j, n_tiles, in, kPanel, y);
        return y;
    }

   private:
    RoundedRows rows() const { return {levels_.get(), scales_.get(), offsets_.get()}; }

    bool is_packed_;
    Numbers<float> line_;
    Numbers<Half> halves_;
    Numbers<int8_t> levels_;
    Numbers<float> scales_;
    Numbers<int32_t> offsets_;
    Numbers<float> panel_;
};
