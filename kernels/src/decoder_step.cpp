#include "decoder_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "floats.h"
#include "packed_matrix.h"
#include "simd.h"

namespace medreasoner {

// How the matrices are read; measured on AVX-512 with weights that fit the third cache only.
constexpr int kTokens = 5, kColumns = 4;  // sums that stay in registers: tokens times vectors of columns
constexpr int64_t kRowsAhead = 12;        // asked for in advance: a row's part of the columns is but a line or two

struct Packed {};  // in the place of an element type

// Activations as levels, a scale and an offset for each block of 64.
struct RoundedRows {
    int8_t* levels;
    float* scales;
    int32_t* offsets;

    RoundedRows from(int64_t row, int64_t width) const {
        return {levels + row * width, scales + row * width / kBlockRows, offsets + row * width / kBlockRows};
    }
};

// What a step needs beside its inputs, for n tokens.
struct StepScratch {
    float* residual;      // (n, hidden)
    float* normed;        // (n, hidden)
    float* wide;          // (n, q_dim + 2 * kv_dim), then twice (n, mlp)
    float* attended;      // (n, q_dim)
    float* scores;        // as many as there are places, rounded up to whole vectors
    RoundedRows rounded;  // for the widest input of a product
};

}  // namespace medreasoner

#define MR_BODY "decoder_step_simd.h"
#include "for_each_level.h"

namespace medreasoner {
namespace {

template <class T>
void step_over(const DecoderWeights& weights, const std::vector<StepPart>& parts, int64_t n, const float* cos,
               const float* sin, const StepScratch& scratch, float* out) {
    if (parts[0].cache->dtype == Dtype::float16) {
        MR_DISPATCH(step<T, Float16>)(weights, parts, n, cos, sin, scratch, out);
    } else {
        MR_DISPATCH(step<T, float>)(weights, parts, n, cos, sin, scratch, out);
    }
}

}  // namespace

void decoder_step(const DecoderWeights& weights, const std::vector<StepPart>& parts, const float* embeds, const float* cos,
                  const float* sin, float* out) {
    const DecoderShape& s = weights.shape;
    int64_t n = 0, places = 0;
    for (const StepPart& part : parts) {
        n += part.n;
        places = std::max(places, part.past + part.n);
    }
    const int64_t wide = std::max(s.q_dim() + 2 * s.kv_dim(), 2 * s.mlp), scores = places + kStepAlign;
    std::vector<float> room(static_cast<size_t>(n * (2 * s.hidden + wide + s.q_dim()) + scores));
    float* normed = room.data() + n * s.hidden;
    float* attended = normed + n * s.hidden;
    float* wider = attended + n * s.q_dim();
    const auto widest = static_cast<size_t>(weights.packed ? n * std::max({s.hidden, s.q_dim(), s.mlp}) : 0);
    std::vector<int8_t> levels(widest);
    std::vector<float> scales(widest / kBlockRows);
    std::vector<int32_t> offsets(widest / kBlockRows);
    const RoundedRows rounded{levels.data(), scales.data(), offsets.data()};
    const StepScratch scratch{room.data(), normed, wider, attended, wider + n * wide, rounded};
    std::copy(embeds, embeds + n * s.hidden, scratch.residual);
    if (weights.packed) return step_over<Packed>(weights, parts, n, cos, sin, scratch, out);
    switch (weights.dtype) {
        case Dtype::float32: return step_over<float>(weights, parts, n, cos, sin, scratch, out);
        case Dtype::float16: return step_over<Float16>(weights, parts, n, cos, sin, scratch, out);
        case Dtype::bfloat16: return step_over<Bfloat16>(weights, parts, n, cos, sin, scratch, out);
    }
}

}  // namespace medreasoner
