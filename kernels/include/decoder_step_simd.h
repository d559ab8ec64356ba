// One pass of a few tokens through the decoder (see for_each_level.h for MR_LANES and MR_TARGET). All rows end with a
// whole vector: sizes are multiples of kStepAlign.

#include "vectors_simd.h"
#include "packed_simd.h"
#include "nibble_simd.h"

// y (N, out) += x (N, in) @ w (in, out) for C vectors of columns; the sums stay in registers.
template <int N, int C, class T>
MR_TARGET inline void add_columns(const T* w, int64_t in, int64_t out, const float* x, float* y) {
    VecF sums[N][C];
    for (int t = 0; t < N; ++t)
        for (int c = 0; c < C; ++c) sums[t][c] = load_float(y + t * out + c * MR_LANES);
    for (int64_t k = 0; k < in; ++k) {
        const T* row = w + k * out;
        for (int64_t line = 0; line < C * MR_LANES; line += 64 / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(row + kRowsAhead * out + line);
        }
        for (int c = 0; c < C; ++c) {
            const VecF weights = load_float(row + c * MR_LANES);
            for (int t = 0; t < N; ++t) sums[t][c] += weights * x[t * in + k];
        }
    }
    for (int t = 0; t < N; ++t)
        for (int c = 0; c < C; ++c) save(sums[t][c], y + t * out + c * MR_LANES);
}

// The same for any number of tokens, a few at a time: the columns stay in the cache meanwhile.
template <int C, class T>
MR_TARGET inline void add_column(const T* w, int64_t in, int64_t out, int64_t n, const float* x, float* y) {
    for (; n >= kTokens; n -= kTokens, x += kTokens * in, y += kTokens * out) add_columns<kTokens, C>(w, in, out, x, y);
    if (n == 4) add_columns<4, C>(w, in, out, x, y);
    if (n == 3) add_columns<3, C>(w, in, out, x, y);
    if (n == 2) add_columns<2, C>(w, in, out, x, y);
    if (n == 1) add_columns<1, C>(w, in, out, x, y);
}

// y (n, 64) of the rows' `out` numbers += x (n, in) @ a panel of w (in, out); the last panel may be narrower.
template <class T>
MR_TARGET inline void add_panel(const T* w, int64_t panel, int64_t in, int64_t out, int64_t n, const float* x, float* y) {
    const int64_t end = std::min(out, (panel + 1) * kPanel);
    int64_t j = panel * kPanel;
    for (; j + kColumns * MR_LANES <= end; j += kColumns * MR_LANES) add_column<kColumns>(w + j, in, out, n, x, y + j);
    for (; j < end; j += MR_LANES) add_column<1>(w + j, in, out, n, x, y + j);
}

// Calls work(panel) for the panels of `cols` columns, each of them the products of n tokens with `weights` numbers. Few of
// little work are taken at once, since each starts with waiting for its first weights.
template <class Work>
MR_TARGET inline void each_panel(int64_t cols, int64_t weights, int64_t n, Crew& crew, const Work& work) {
    const int64_t panels = (cols + kPanel - 1) / kPanel;
    const int64_t at_once = std::max<int64_t>(1, kShare / (weights * n));
    crew.each((panels + at_once - 1) / at_once, [&](int64_t item, int) MR_TARGET {
        const int64_t end = std::min(panels, (item + 1) * at_once);
        for (int64_t panel = item * at_once; panel < end; ++panel) work(panel);
    });
}

// y (n, out) += x (n, in) @ w (in, out), the panels shared out among the threads.
template <class T, class X>
MR_TARGET void add_product(const void* w, int64_t in, int64_t out, int64_t n, const X& x, float* y, Crew& crew) {
    each_panel(out, in * kPanel, n, crew, [&](int64_t panel) MR_TARGET {
        add_panel(static_cast<const T*>(w), panel, in, out, n, x, y);
    });
}

// The two halves of a head are turned against each other.
MR_TARGET inline void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

// What one head of one token looks for: in the first `length` places, weighted by `scores`, which has room for whole vectors.
struct Query {
    const float* query;  // (dim,)
    int64_t length;
    float* scores;
    float* out;  // (dim,)
};

// (C vectors of) out = the sum of the rows of values, each by its score, for R queries. Two sums each, so that one need
// not wait; those places that only some look at come last, so that what the others have is not even multiplied by 0.
template <int R, int C, class T>
MR_TARGET inline void add_weighted(const Query* own, const T* values, int64_t dim, int64_t column) {
    VecF even[R][C], odd[R][C];
    int64_t shared = own[0].length;
    for (int r = 0; r < R; ++r) {
        shared = std::min(shared, own[r].length);
        for (int c = 0; c < C; ++c) even[r][c] = odd[r][c] = VecF{};
    }
    shared -= shared % 2;
    values += column;
    int64_t j = 0;
    for (; j < shared; j += 2, values += 2 * dim) {
        for (int c = 0; c < C; ++c) {
            const VecF one = load_float(values + c * MR_LANES), other = load_float(values + dim + c * MR_LANES);
            for (int r = 0; r < R; ++r) {
                even[r][c] += one * own[r].scores[j];
                odd[r][c] += other * own[r].scores[j + 1];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        const T* from = values;
        for (j = shared; j + 2 <= own[r].length; j += 2, from += 2 * dim) {
            for (int c = 0; c < C; ++c) even[r][c] += load_float(from + c * MR_LANES) * own[r].scores[j];
            for (int c = 0; c < C; ++c) odd[r][c] += load_float(from + dim + c * MR_LANES) * own[r].scores[j + 1];
        }
        for (int c = 0; c < C && j < own[r].length; ++c) even[r][c] += load_float(from + c * MR_LANES) * own[r].scores[j];
        for (int c = 0; c < C; ++c) save(even[r][c] + odd[r][c], own[r].out + column + c * MR_LANES);
    }
}

// Scores become their softmax over the first `length` places.
MR_TARGET inline void weigh(float* scores, int64_t length) {
    const int64_t whole = (length + MR_LANES - 1) / MR_LANES * MR_LANES;
    std::fill(scores + length, scores + whole, -std::numeric_limits<float>::infinity());
    VecF most = load_float(scores);
    for (int64_t j = MR_LANES; j < whole; j += MR_LANES) most = load_float(scores + j) > most ? load_float(scores + j) : most;
    const float largest = largest_of(most);
    VecF total = VecF{};
    for (int64_t j = 0; j < whole; j += MR_LANES) {
        const VecF weight = exponential(load_float(scores + j) - largest);
        total += weight;
        save(weight, scores + j);
    }
    const VecF share = VecF{} + 1.f / sum(total);
    for (int64_t j = 0; j < whole; j += MR_LANES) save(load_float(scores + j) * share, scores + j);
}

constexpr int64_t kTogether = MR_LANES == 16 ? 4 : 2;  // queries, for whose sums there are registers

// softmax(query . keys) @ values for R queries of one sequence and group of heads, which share what is loaded; the last
// one looks at the most places. None depends on the others.
template <int R, class C>
MR_TARGET void attend(const Query* own, const C* keys, const C* values, int64_t dim) {
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    const int64_t longest = own[R - 1].length;
    int64_t j = 0;
    for (; j + 4 <= longest; j += 4) {
        const C* key = keys + j * dim;
        VecF totals[R][4];
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < 4; ++k) totals[r][k] = VecF{};
        for (int64_t i = 0; i < dim; i += MR_LANES) {
            for (int k = 0; k < 4; ++k) {
                const VecF other = load_float(key + k * dim + i);
                for (int r = 0; r < R; ++r) totals[r][k] += load_float(own[r].query + i) * other;
            }
        }
        for (int r = 0; r < R; ++r) {
            const Quad four = sums(totals[r][0], totals[r][1], totals[r][2], totals[r][3]) * scale;
            std::memcpy(own[r].scores + j, &four, sizeof four);
        }
    }
    for (; j < longest; ++j) {
        for (int r = 0; r < R; ++r) {
            VecF total = VecF{};
            for (int64_t i = 0; i < dim; i += MR_LANES) total += load_float(own[r].query + i) * load_float(keys + j * dim + i);
            own[r].scores[j] = sum(total) * scale;
        }
    }
    for (int r = 0; r < R; ++r) weigh(own[r].scores, own[r].length);
    constexpr int columns = R > 2 ? 2 : 4;
    int64_t i = 0;
    for (; i + columns * MR_LANES <= dim; i += columns * MR_LANES) add_weighted<R, columns>(own, values, dim, i);
    for (; i < dim; i += MR_LANES) add_weighted<R, 1>(own, values, dim, i);
}

// x * sigmoid(x) * up, in place of `gate`.
MR_TARGET inline void gate_with(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += MR_LANES) {
        const VecF x = load_float(gate + i);
        save(x / (1.f + exponential(-x)) * load_float(up + i), gate + i);
    }
}

template <class T>
constexpr bool kRounds = std::is_same_v<T, Packed> || std::is_same_v<T, Nibbles>;

// What a product takes of x (n, in): itself, or the levels that it was rounded to.
template <class T>
MR_TARGET inline auto input_of(const float* x, const StepScratch& scratch) {
    if constexpr (kRounds<T>) {
        return scratch.rounded;
    } else {
        return x;
    }
}

// One token's input of a product, x (n, in), as levels where the matrices are packed.
template <class T>
MR_TARGET inline void round_input(const float* x, int64_t token, int64_t in, const StepScratch& scratch) {
    if constexpr (kRounds<T>) round_row<T>(x + token * in, in, scratch.rounded.from<T>(token, in));
}

// Keys and values of one new token go to its cache; row (q_dim + 2 * kv_dim,) is turned in place. Of some of its heads.
template <class C>
MR_TARGET void keep_token(const DecoderShape& s, const NewToken& token, size_t index, const Range& kv_heads, float* row,
                          const float* cos, const float* sin) {
    const int64_t dim = s.head_dim, kv = s.kv_dim(), group = s.heads / s.kv_heads;
    for (int64_t head = kv_heads.first * group; head < kv_heads.end * group; ++head) rotate(row + head * dim, cos, sin, dim / 2);
    for (int64_t head = kv_heads.first; head < kv_heads.end; ++head) rotate(row + s.q_dim() + head * dim, cos, sin, dim / 2);
    const LayerCache& own = token.cache->layers[index];
    for (int64_t head = kv_heads.first; head < kv_heads.end; ++head) {
        const float* from = row + s.q_dim() + head * dim;
        const int64_t to = (head * token.cache->capacity + token.place) * dim;
        for (int64_t i = 0; i < dim; ++i) {
            narrow(from[i], static_cast<C*>(own.keys) + to + i);
            narrow(from[kv + i], static_cast<C*>(own.values) + to + i);
        }
    }
}

// The queries of one group of heads, of tokens that look together, look at all places up to their own.
template <class C>
MR_TARGET void attend_together(const DecoderShape& s, size_t index, const std::vector<NewToken>& tokens, const Together& some,
                               int64_t head, const StepScratch& scratch, float* scores) {
    const int64_t dim = s.head_dim, width = s.q_dim() + 2 * s.kv_dim(), group = s.heads / s.kv_heads;
    Query own[kTogether];
    for (int64_t r = 0; r < some.count; ++r) {
        const int64_t t = (some.first + r) / group, place = head * group + (some.first + r) % group;
        own[r] = {scratch.wide + t * width + place * dim, tokens[static_cast<size_t>(t)].place + 1, scores + r * scratch.n_scores,
                  scratch.attended + t * s.q_dim() + place * dim};
    }
    const DecoderCache& cache = *tokens[static_cast<size_t>(some.first / group)].cache;
    const C* keys = static_cast<const C*>(cache.layers[index].keys) + head * cache.capacity * dim;
    const C* values = static_cast<const C*>(cache.layers[index].values) + head * cache.capacity * dim;
    switch (some.count) {
        case 1: return attend<1>(own, keys, values, dim);
        case 2: return attend<2>(own, keys, values, dim);
        case 3: return attend<kTogether == 4 ? 3 : 1>(own, keys, values, dim);
        default: return attend<kTogether == 4 ? 4 : 1>(own, keys, values, dim);
    }
}

// Each head of each token looks at all places up to the token's own.
template <class C>
MR_TARGET void attend_all(const DecoderShape& s, size_t index, const std::vector<NewToken>& tokens,
                          const StepScratch& scratch, Crew& crew) {
    const std::vector<Together> together = look_together(tokens, s.heads / s.kv_heads, kTogether);
    crew.each(static_cast<int64_t>(together.size()) * s.kv_heads, [&](int64_t item, int who) MR_TARGET {
        attend_together<C>(s, index, tokens, together[static_cast<size_t>(item / s.kv_heads)], item % s.kv_heads, scratch,
                           scratch.scores + who * kMostQueries * scratch.n_scores);
    });
}

// A panel of gate (n, mlp) = silu(h @ gate) * (h @ up).
template <class T>
MR_TARGET void gated_panel(const DecoderShape& s, const DecoderLayer& layer, int64_t panel, int64_t n,
                           const StepScratch& scratch) {
    const auto input = input_of<T>(scratch.normed, scratch);
    const int64_t first = panel * kPanel, size = std::min(kPanel, s.mlp - first);
    float *gate = scratch.wide, *up = scratch.wide + n * s.mlp;
    for (float* each : {gate, up}) {
        for (int64_t t = 0; t < n; ++t) std::fill_n(each + t * s.mlp + first, size, 0.f);
    }
    add_panel(static_cast<const T*>(layer.gate), panel, s.hidden, s.mlp, n, input, gate);
    add_panel(static_cast<const T*>(layer.up), panel, s.hidden, s.mlp, n, input, up);
    for (int64_t t = 0; t < n; ++t) gate_with(gate + t * s.mlp + first, up + t * s.mlp + first, size);
}

// The first half of a layer: each new token's keys and values go to its cache, and its queries to `wide`.
template <class T, class C>
MR_TARGET void keep_all(const DecoderShape& s, const DecoderLayer& layer, size_t index, const std::vector<NewToken>& tokens,
                        const float* cos, const float* sin, const StepScratch& scratch, Crew& crew) {
    const int64_t n = static_cast<int64_t>(tokens.size()), width = s.q_dim() + 2 * s.kv_dim(), half = s.head_dim / 2;
    float *x = scratch.residual, *h = scratch.normed, *qkv = scratch.wide;
    crew.each(n, [&](int64_t t, int) MR_TARGET {
        normalise(x + t * s.hidden, layer.input_norm, s.hidden, s.epsilon, h + t * s.hidden);
        round_input<T>(h, t, s.hidden, scratch);
        std::copy(layer.qkv_bias, layer.qkv_bias + width, qkv + t * width);
    });
    add_product<T>(layer.qkv, s.hidden, width, n, input_of<T>(h, scratch), qkv, crew);
    crew.each(n, [&](int64_t t, int) MR_TARGET {
        keep_token<C>(s, tokens[t], index, {0, s.kv_heads}, qkv + t * width, cos + t * half, sin + t * half);
    });
}

// The second half: what the tokens make of all that is kept.
template <class T, class C>
MR_TARGET void look_at_all(const DecoderShape& s, const DecoderLayer& layer, size_t index,
                           const std::vector<NewToken>& tokens, const StepScratch& scratch, Crew& crew) {
    const int64_t n = static_cast<int64_t>(tokens.size()), q = s.q_dim();
    float *x = scratch.residual, *h = scratch.normed, *attended = scratch.attended;
    attend_all<C>(s, index, tokens, scratch, crew);
    crew.each(n, [&](int64_t t, int) MR_TARGET { round_input<T>(attended, t, q, scratch); });
    add_product<T>(layer.output, q, s.hidden, n, input_of<T>(attended, scratch), x, crew);
    crew.each(n, [&](int64_t t, int) MR_TARGET {
        normalise(x + t * s.hidden, layer.attention_norm, s.hidden, s.epsilon, h + t * s.hidden);
        round_input<T>(h, t, s.hidden, scratch);
    });
    each_panel(s.mlp, 2 * s.hidden * kPanel, n, crew, [&](int64_t panel) MR_TARGET {
        gated_panel<T>(s, layer, panel, n, scratch);
    });
    crew.each(n, [&](int64_t t, int) MR_TARGET { round_input<T>(scratch.wide, t, s.mlp, scratch); });
    add_product<T>(layer.down, s.mlp, s.hidden, n, input_of<T>(scratch.wide, scratch), x, crew);
}

template <class T, class C>
MR_TARGET void step(const DecoderWeights& weights, std::vector<NewToken> tokens, const float* cos, const float* sin,
                    const StepScratch& scratch, float* out, Crew& crew) {
    const DecoderShape& s = weights.shape;
    for (size_t i = 0; i < weights.layers.size(); ++i) {
        keep_all<T, C>(s, weights.layers[i], i, tokens, cos, sin, scratch, crew);
        if (i + 1 == weights.layers.size()) tokens = asked_for(s, tokens, scratch);
        if (tokens.empty()) return;
        look_at_all<T, C>(s, weights.layers[i], i, tokens, scratch, crew);
    }
    for (size_t t = 0; t < tokens.size(); ++t) {
        normalise(scratch.residual + t * s.hidden, weights.final_norm, s.hidden, s.epsilon, out + t * s.hidden);
    }
}

#include "decoder_halves_simd.h"
