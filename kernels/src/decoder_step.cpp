#include "decoder_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "floats.h"
#include "simd.h"

namespace medreasoner {

// How the matrices are read; measured on AVX-512 with weights that fit the third cache only.
constexpr int kTokens = 5, kColumns = 4;  // sums that stay in registers: tokens times vectors of columns
constexpr int64_t kRowsAhead = 12;        // asked for in advance: a row's part of the columns is but a line or two

// What a step needs beside its inputs, for n tokens.
struct StepScratch {
    float* residual;  // (n, hidden)
    float* normed;    // (n, hidden)
    float* wide;      // (n, q_dim + 2 * kv_dim), then twice (n, mlp)
    float* attended;  // (n, q_dim)
    float* scores;    // (past + n,), rounded up to whole vectors
};

}  // namespace medreasoner

#define MR_BODY "decoder_step_simd.h"
#include "for_each_level.h"

namespace medreasoner {
namespace {

template <class T>
void step_over(const DecoderWeights& weights, const DecoderCache& cache, int64_t past, int64_t n, const float* cos,
               const float* sin, const StepScratch& scratch, float* out) {
    if (cache.dtype == Dtype::float16) {
        MR_DISPATCH(step<T, Float16>)(weights, cache, past, n, cos, sin, scratch, out);
    } else {
        MR_DISPATCH(step<T, float>)(weights, cache, past, n, cos, sin, scratch, out);
    }
}

}  // namespace

void decoder_step(const DecoderWeights& weights, const DecoderCache& cache, int64_t past, int64_t n, const float* embeds,
                  const float* cos, const float* sin, float* out) {
    const DecoderShape& s = weights.shape;
    const int64_t wide = std::max(s.q_dim() + 2 * s.kv_dim(), 2 * s.mlp), scores = past + n + kStepAlign;
    std::vector<float> room(static_cast<size_t>(n * (2 * s.hidden + wide + s.q_dim()) + scores));
    float* normed = room.data() + n * s.hidden;
    float* attended = normed + n * s.hidden;
    float* wider = attended + n * s.q_dim();
    const StepScratch scratch{room.data(), normed, wider, attended, wider + n * wide};
    std::copy(embeds, embeds + n * s.hidden, scratch.residual);
    switch (weights.dtype) {
        case Dtype::float32: return step_over<float>(weights, cache, past, n, cos, sin, scratch, out);
        case Dtype::float16: return step_over<Float16>(weights, cache, past, n, cos, sin, scratch, out);
        case Dtype::bfloat16: return step_over<Bfloat16>(weights, cache, past, n, cos, sin, scratch, out);
    }
}

}  // namespace medreasoner
