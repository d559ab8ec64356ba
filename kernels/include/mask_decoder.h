// SAM's prompt encoder and mask decoder on tiles of bfloat16 (tiles.h): from an image's embedding and prompts to masks.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "rooms.h"

namespace medreasoner {

struct MaskShape {
    int64_t channels, inner, heads, mlp;  // inner: depth of all heads together, between tokens and places
    int64_t grid;                         // places of the embedding in a row
    float image_size;                     // pixels
    int64_t first_mask, n_masks;          // of the learned tokens' masks, those that are asked for
    float epsilon, prompt_epsilon;
    bool draws_box;  // into the mask prompt too

    int64_t places() const { return grid * grid; }
    int64_t size() const { return inner / heads; }
    int64_t mask_size() const { return 4 * grid; }
};

// A matrix (in, out) as tiles, and its bias, filled up to a multiple of 32 with zeros; null: none.
struct Linear {
    const uint16_t* matrix;
    const float* bias;
    int64_t in, out;
};

struct Norm {
    const float *scale, *bias;
};

// Heads' matrices follow each other, those to `size` numbers filled up to 32 columns.
struct FromTokens {
    Linear q;
    const uint16_t* k;  // (size, channels)
    const uint16_t* v;  // (channels, size)
    Linear out;
};

struct FromPlaces {
    Linear k;
    const uint16_t* q;      // (size, channels)
    const float* q_scores;  // (inner,), what a query's bias makes of keys
    Linear v;
    const uint16_t* out;      // (size, channels)
    const float* out_biases;  // (heads, channels)
};

struct MaskLayer {
    Linear q, k, v, out;
    const float* qkv_bias;
    FromTokens from_tokens;
    Linear up, down;
    FromPlaces from_places;
    Norm norms[4];
};

// The mask prompt's own small network, in float.
struct BoxPrompt {
    int64_t channels;
    const float *first, *first_bias;    // (16, channels), of a place's 4 x 4 pixels
    Norm first_norm;                    // (channels / 4,)
    const float *second, *second_bias;  // (channels, channels)
    Norm second_norm;
    const float *last, *last_bias;  // (channels, C)
};

struct MaskWeights {
    MaskShape shape;
    const float* frequencies;  // (2, C / 2)
    const float* kinds;        // (5, C), for the labels -1 to 3
    int64_t n_learned;
    const float* learned;  // (n_learned, C)
    const float* no_mask;  // (C,)
    BoxPrompt box;
    std::vector<float> image_places;  // (places, C)
    std::vector<MaskLayer> layers;
    FromTokens last;
    Norm last_norm;
    Linear first_doubling, second_doubling;
    Norm doubling_norm;
    std::vector<std::vector<Linear>> hyper;  // of each mask that is asked for
    std::vector<Linear> scores;
};

constexpr int64_t kMostTokens = 16;  // learned ones and points

struct MaskPrompt {
    const float* embedding;  // (C, places)
    const float* points;     // (n_points, 2) x, y in pixels
    const int64_t* labels;   // (n_points,) from -1 to 3
    int64_t n_points;
    float* logits;  // (n_masks, mask_size, mask_size)
    float* scores;  // (n_masks,)
};

// What a prompt is worked on in.
class MaskRoom {
   public:
    virtual ~MaskRoom() = default;
    virtual void run(const MaskPrompt& prompt) = 0;
};

// A decoder and its rooms; any number of callers, each in its own thread.
class MaskDecoder {
   public:
    // Needs has_tiles(). The weights stay the caller's.
    explicit MaskDecoder(const MaskWeights& weights) : weights_(weights) {}

    void run(const MaskPrompt* prompts, int64_t n);

   private:
    const MaskWeights& weights_;
    Rooms<MaskRoom> rooms_{std::numeric_limits<size_t>::max()};
};

}  // namespace medreasoner
