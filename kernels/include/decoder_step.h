// Tokens of one or more sequences through a Qwen2 decoder, over the key-value buffers that ONNX Runtime uses too. A session
// of the same graph spends most of a small one's step between its operators, and streams a large one's weights at half
// of the memory's speed.
#pragma once

#include <cstdint>
#include <vector>

#include "crew.h"
#include "rows.h"

namespace medreasoner {

// All sizes are multiples of kStepAlign, so that no row ends within a vector; heads divide by kv_heads.
constexpr int64_t kStepAlign = 16;

struct DecoderShape {
    int64_t hidden, heads, kv_heads, head_dim, mlp;
    float epsilon;  // of the normalisations

    int64_t q_dim() const { return heads * head_dim; }
    int64_t kv_dim() const { return kv_heads * head_dim; }
};

// Matrices are row-major (in, out), as the graph has them, or packed (packed_matrix.h); vectors are float32.
struct DecoderLayer {
    const float* input_norm;      // (hidden,)
    const void* qkv;              // (hidden, q_dim + 2 * kv_dim)
    const float* qkv_bias;        // (q_dim + 2 * kv_dim,)
    const void* output;           // (q_dim, hidden)
    const float* attention_norm;  // (hidden,), behind the attention
    const void* gate;             // (hidden, mlp)
    const void* up;               // (hidden, mlp)
    const void* down;             // (mlp, hidden)
};

enum class MatrixForm { plain, eight_bits, four_bits };

struct DecoderWeights {
    DecoderShape shape;
    MatrixForm form;  // of all matrices
    Dtype dtype;      // of plain ones
    std::vector<DecoderLayer> layers;
    const float* final_norm;  // (hidden,)
};

// Keys and values of one layer, (kv_heads, capacity, head_dim) each.
struct LayerCache {
    void* keys;
    void* values;
};

struct DecoderCache {
    Dtype dtype;  // float32 or float16
    int64_t capacity;
    std::vector<LayerCache> layers;
};

// The new tokens of one sequence: n of them, at the places past .. past + n - 1 of its cache, past + n <= capacity. Hidden
// states are asked for of the last n_out of them only: the last layer does little for the others.
struct StepPart {
    const DecoderCache* cache;
    int64_t past, n, n_out;
};

// embeds (n, hidden) and the tables cos, sin (n, head_dim / 2) of the n tokens of all parts -> out (sum of n_out, hidden)
// after the last normalisation; keys and values of all are appended. The caches are of one type, and no two parts have
// the same.
// What a token gives does not depend on which others go along, nor on the number of threads, to the last bit.
void decoder_step(const DecoderWeights& weights, const std::vector<StepPart>& parts, const float* embeds, const float* cos,
                  const float* sin, float* out, Crew& crew);

}  // namespace medreasoner
