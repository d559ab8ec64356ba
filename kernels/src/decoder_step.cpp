#include "decoder_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "floats.h"
#include "packed_matrix.h"
#include "rounded_rows.h"
#include "simd.h"

namespace medreasoner {

// How the matrices are read; measured on AVX-512 with weights that fit the third cache only.
constexpr int kTokens = 5, kColumns = 4;  // sums that stay in registers: tokens times vectors of columns
constexpr int64_t kShare = 1 << 18;       // products that a thread takes at once, at least
constexpr int64_t kRowsAhead = 12;        // asked for in advance: a row's part of the columns is but a line or two

// Where a token goes, and whether its hidden state is asked for.
struct NewToken {
    const DecoderCache* cache;
    int64_t place;
    bool is_asked_for;
};

// Queries that share keys and values: of tokens of one sequence, and of the heads of a group. They are numbered token by
// token, the heads of a group one after the other.
struct Together {
    int64_t first, count;
};
constexpr int64_t kMostQueries = 4;

// What a step needs beside its inputs, for n tokens.
struct StepScratch {
    float* residual;      // (n, hidden)
    float* normed;        // (n, hidden)
    float* wide;          // (n, q_dim + 2 * kv_dim), then twice (n, mlp)
    float* attended;      // (n, q_dim)
    float* scores;        // (threads, kMostQueries, n_scores)
    int64_t n_scores;     // as many as there are places, rounded up to whole vectors
    RoundedRows rounded;  // for the widest input of a product
};

// What one half works on: its own copy of the residual, among others.
struct Half {
    StepScratch scratch;
    float* attention;  // (n, hidden), what its heads add to the residual
    float* wider;      // (n, hidden), what its part of the wide layer adds
    Range kv_heads, queries, wide;

    RoundedRows rounded(int64_t at) const { return scratch.rounded.from<Packed>(1, at); }
};

static std::vector<Together> look_together(const std::vector<NewToken>& tokens, int64_t group, int64_t most) {
    std::vector<Together> found;
    const auto n = static_cast<int64_t>(tokens.size());
    for (int64_t t = 0; t < n; ++t) {
        const bool joins = t > 0 && tokens[static_cast<size_t>(t)].cache == tokens[static_cast<size_t>(t - 1)].cache;
        if (!joins) found.push_back({t * group, 0});
        for (int64_t head = 0; head < group; ++head) {
            if (found.back().count == most) found.push_back({t * group + head, 0});
            ++found.back().count;
        }
    }
    return found;
}

// The tokens whose hidden states are asked for; what the scratch holds of them moves to the front.
static std::vector<NewToken> asked_for(const DecoderShape& s, const std::vector<NewToken>& tokens, const StepScratch& scratch) {
    std::vector<NewToken> found;
    const int64_t width = s.q_dim() + 2 * s.kv_dim();
    for (size_t t = 0; t < tokens.size(); ++t) {
        if (!tokens[t].is_asked_for) continue;
        const auto from = static_cast<int64_t>(t), to = static_cast<int64_t>(found.size());
        std::memmove(scratch.residual + to * s.hidden, scratch.residual + from * s.hidden, static_cast<size_t>(s.hidden) * 4);
        std::memmove(scratch.wide + to * width, scratch.wide + from * width, static_cast<size_t>(width) * 4);
        found.push_back(tokens[t]);
    }
    return found;
}

}  // namespace medreasoner

#define MR_BODY "decoder_step_simd.h"
#include "for_each_level.h"

namespace medreasoner {
namespace {

template <class T>
void step_over(const DecoderWeights& weights, const std::vector<NewToken>& tokens, const float* cos, const float* sin,
               const StepScratch& scratch, float* out, Crew& crew) {
    if (tokens[0].cache->dtype == Dtype::float16) {
        MR_DISPATCH(step<T, Float16>)(weights, tokens, cos, sin, scratch, out, crew);
    } else {
        MR_DISPATCH(step<T, float>)(weights, tokens, cos, sin, scratch, out, crew);
    }
}

void step_with(const DecoderWeights& weights, const std::vector<NewToken>& tokens, const float* cos, const float* sin,
               const StepScratch& scratch, float* out, Crew& crew) {
    if (weights.form == MatrixForm::four_bits) return step_over<Nibbles>(weights, tokens, cos, sin, scratch, out, crew);
    if (weights.form == MatrixForm::eight_bits) return step_over<Packed>(weights, tokens, cos, sin, scratch, out, crew);
    switch (weights.dtype) {
        case Dtype::float32: return step_over<float>(weights, tokens, cos, sin, scratch, out, crew);
        case Dtype::float16: return step_over<Float16>(weights, tokens, cos, sin, scratch, out, crew);
        case Dtype::bfloat16: return step_over<Bfloat16>(weights, tokens, cos, sin, scratch, out, crew);
    }
}

// The memory of a step of n tokens. Nothing of it is read before it is written.
struct StepRoom {
    std::unique_ptr<float[]> numbers;
    std::unique_ptr<int8_t[]> levels;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<int32_t[]> offsets;
    StepScratch scratch;

    StepRoom(const DecoderWeights& weights, int64_t n, int64_t n_scores, int64_t n_threads) {
        const DecoderShape& s = weights.shape;
        const int64_t wide = std::max(s.q_dim() + 2 * s.kv_dim(), 2 * s.mlp);
        const auto size = static_cast<size_t>(n * (2 * s.hidden + wide + s.q_dim()) + n_threads * kMostQueries * n_scores);
        const auto widest = static_cast<size_t>(weights.form == MatrixForm::plain ? 0 : n * std::max({s.hidden, s.q_dim(), s.mlp}));
        numbers.reset(new float[size]);
        levels.reset(new int8_t[widest]);
        scales.reset(new float[widest / kNibbleRows]);
        offsets.reset(new int32_t[widest / kNibbleRows]);
        float* normed = numbers.get() + n * s.hidden;
        float* attended = normed + n * s.hidden;
        float* wider = attended + n * s.q_dim();
        scratch = {numbers.get(), normed, wider, attended, wider + n * wide, n_scores, {levels.get(), scales.get(), offsets.get()}};
    }
};

// Whether each half has whole blocks of all matrices.
bool has_halves(const DecoderWeights& weights) {
    const DecoderShape& s = weights.shape;
    const auto divides = [](int64_t size) { return size % (2 * kPanel) == 0; };
    return weights.form == MatrixForm::eight_bits && s.kv_heads % 2 == 0 && divides(s.q_dim()) && divides(s.kv_dim()) &&
           divides(s.mlp);
}

void step_of_halves(const DecoderWeights& weights, const std::vector<NewToken>& tokens, int64_t n_scores, const float* embeds,
                    const float* cos, const float* sin, float* out, Crew& crew) {
    const DecoderShape& s = weights.shape;
    const auto n = static_cast<int64_t>(tokens.size());
    const StepRoom rooms[2]{{weights, n, n_scores, 1}, {weights, n, n_scores, 1}};
    const std::unique_ptr<float[]> sums[2]{std::unique_ptr<float[]>(new float[static_cast<size_t>(2 * n * s.hidden)]),
                                           std::unique_ptr<float[]>(new float[static_cast<size_t>(2 * n * s.hidden)])};
    const auto half = [&](int64_t i) {
        const auto part = [&](int64_t size) { return Range{i * size / 2, (i + 1) * size / 2}; };
        return Half{rooms[i].scratch, sums[i].get(), sums[i].get() + n * s.hidden, part(s.kv_heads), part(s.q_dim()), part(s.mlp)};
    };
    const Half halves[2]{half(0), half(1)};
    if (tokens[0].cache->dtype == Dtype::float16) {
        MR_DISPATCH(step_in_halves<Float16>)(weights, tokens, embeds, cos, sin, halves, out, crew);
    } else {
        MR_DISPATCH(step_in_halves<float>)(weights, tokens, embeds, cos, sin, halves, out, crew);
    }
}

}  // namespace

void decoder_step(const DecoderWeights& weights, const std::vector<StepPart>& parts, const float* embeds, const float* cos,
                  const float* sin, float* out, Crew& crew) {
    std::vector<NewToken> tokens;
    int64_t places = 0;
    for (const StepPart& part : parts) {
        for (int64_t i = 0; i < part.n; ++i) tokens.push_back({part.cache, part.past + i, i >= part.n - part.n_out});
        places = std::max(places, part.past + part.n);
    }
    const auto n = static_cast<int64_t>(tokens.size());
    const int64_t n_scores = (places / kStepAlign + 1) * kStepAlign;
    std::unique_lock<std::mutex> turn(crew.turn(), std::defer_lock);
    if (crew.n_threads() > 1) turn.lock();  // else there is nothing to share
    if (has_halves(weights)) return step_of_halves(weights, tokens, n_scores, embeds, cos, sin, out, crew);
    const StepRoom room(weights, n, n_scores, crew.n_threads());
    std::copy(embeds, embeds + n * weights.shape.hidden, room.scratch.residual);
    step_with(weights, tokens, cos, sin, room.scratch, out, crew);
}

}  // namespace medreasoner
