// SAM's image encoder, a ViT with windows and relative positions, in products of bfloat16 (tiles.h) or eight bits: from
// pixels to the embedding that masks are drawn from.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "crew.h"
#include "rooms.h"
#include "tiles.h"

namespace medreasoner {

constexpr int64_t kColours = 3;

struct EncoderShape {
    int64_t patch, grid;  // pixels of a patch's side, patches of the image's
    int64_t hidden, heads, mlp, out;
    float epsilon;

    int64_t places() const { return grid * grid; }
    int64_t head_dim() const { return hidden / heads; }
    int64_t patch_dim() const { return kColours * patch * patch; }
    int64_t side() const { return grid * patch; }
};

struct ScaleAndBias {
    const float *scale, *bias;
};

// Columns that a table of relative positions takes: one for each distance, filled up to whole panels.
constexpr int64_t distances(int64_t window) { return (2 * window - 1 + 15) / 16 * 16; }

// Matrices are (in, out); sizes are multiples of 32, where matrices are packed of 64.
struct EncoderLayer {
    int64_t window;  // its side; that of the grid where each place looks at all
    ScaleAndBias attention_norm;
    TiledMatrix qkv;
    const float* qkv_bias;
    const uint16_t* offsets;  // (head_dim, 2 distances): what a key that is j - window + 1 rows, and columns, behind adds
    TiledMatrix output;
    const float* output_bias;
    ScaleAndBias mlp_norm;
    TiledMatrix up;
    const float* up_bias;
    TiledMatrix down;
    const float* down_bias;
};

struct EncoderWeights {
    EncoderShape shape;
    bool is_packed;  // the layers' matrices
    const uint16_t* patches;  // (patch_dim, hidden)
    const float* patches_bias;
    const float* places;  // (places, hidden), what is added for each
    std::vector<EncoderLayer> layers;
    const uint16_t* narrow;  // (hidden, out)
    ScaleAndBias narrow_norm;
    const uint16_t* neighbours[9];  // (out, out) of each of the 3 x 3 neighbours, row by row
    ScaleAndBias last_norm;
};

// What an image is worked on in; used by one caller at a time.
class EncoderRoom {
   public:
    virtual ~EncoderRoom() = default;
    virtual int n_threads() const = 0;
    // pixels (3, side, side) -> out (out, grid, grid). It depends on threads in no bit. The caller has the crew's turn.
    virtual void run(const float* pixels, Crew& crew, float* out) = 0;
};

// An encoder and its rooms; any number of callers.
class ImageEncoder {
   public:
    // Needs has_tiles(). The weights stay the caller's.
    ImageEncoder(const EncoderWeights& weights, int n_threads) : weights_(weights), crew_(n_threads) {}

    // By all threads, or by this one `alone`.
    void run(const float* pixels, bool alone, float* out);

   private:
    const EncoderWeights& weights_;
    SharedCrew crew_;
    Rooms<EncoderRoom> rooms_{4};
};

}  // namespace medreasoner
