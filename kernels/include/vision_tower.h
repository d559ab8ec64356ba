// The vision tower of Qwen2.5-VL in products of bfloat16 (tiles.h) or eight bits: from patches to the tokens of an image.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "crew.h"
#include "rooms.h"
#include "tiles.h"

namespace medreasoner {

struct TowerShape {
    int64_t patch_dim, hidden, heads, mlp, out;
    int64_t merged;  // patches that become a token
    float epsilon;

    int64_t head_dim() const { return hidden / heads; }
    int64_t wide() const { return merged * hidden; }
};

// Matrices are (in, out); gate and up as tiles take turns, panel by panel, and packed follow each other. Biases and norms are
// floats, those of gate and up filled up to multiples of 64 with zeros.
struct TowerLayer {
    const float* attention_norm;
    TiledMatrix qkv;
    const float* qkv_bias;
    TiledMatrix output;
    const float* output_bias;
    const float* mlp_norm;
    TiledMatrix gate_and_up;
    const float* gate_bias;
    const float* up_bias;
    TiledMatrix down;
    const float* down_bias;
    bool is_full;  // each patch looks at all of them, not at those of its window alone
};

struct TowerWeights {
    TowerShape shape;
    bool is_packed;  // all matrices but that of the patches
    const uint16_t* patches;
    std::vector<TowerLayer> layers;
    const float* last_norm;
    TiledMatrix first;  // of the two products that make a token of its patches
    const float* first_bias;
    TiledMatrix second;
    const float* second_bias;
};

// An image: its patches, in any order in which those of a token follow each other, and which of them make a window.
struct TowerImage {
    int64_t n_patches;
    const float* patches;               // (n_patches, patch_dim)
    const float* cos;                   // (n_patches, head_dim), of which the first half is read
    const float* sin;
    std::vector<int64_t> order;         // the patches window by window, those of a token together
    std::vector<int64_t> window_starts;  // in `order`, and its end
};

// What images of one size are worked on in; made once, used by one caller at a time.
class TowerRoom {
   public:
    virtual ~TowerRoom() = default;
    virtual bool fits(int64_t n_patches, int n_threads) const = 0;
    // out (n_patches / merged, out). What a token gets depends on threads in no bit. The caller has the crew's turn.
    virtual void run(const TowerImage& image, Crew& crew, float* out) = 0;
};

// A tower and its rooms; any number of callers.
class Tower {
   public:
    // Needs has_tiles(). The weights stay the caller's.
    Tower(const TowerWeights& weights, int n_threads) : weights_(weights), crew_(n_threads) {}

    // By all threads, or by this one `alone`.
    void run(const TowerImage& image, bool alone, float* out);

   private:
    const TowerWeights& weights_;
    SharedCrew crew_;
    Rooms<TowerRoom> rooms_{4};  // of the sizes of image that were asked for last
};

}  // namespace medreasoner
