// One pass of a few tokens through the decoder (see for_each_level.h for MR_LANES and MR_TARGET). All rows end with a
// whole vector: sizes are multiples of kStepAlign.

#include "vectors_simd.h"
#include "packed_simd.h"

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

template <class T>
MR_TARGET void add_product(const T* w, int64_t in, int64_t out, int64_t n, const float* x, float* y) {
    int64_t j = 0;
    for (; j + kColumns * MR_LANES <= out; j += kColumns * MR_LANES) add_column<kColumns>(w + j, in, out, n, x, y + j);
    for (; j < out; j += MR_LANES) add_column<1>(w + j, in, out, n, x, y + j);
}

// e^x to about 1e-7 of it; below -87 and above 88 as there.
MR_TARGET inline VecF exponential(VecF x) {
    const VecF low = VecF{} - 87.f, high = VecF{} + 88.f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const VecF shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the last bits
    const VecF whole = shifted - 12582912.f;
    const VecF r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    const VecF poly = ((((1.f / 720 * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6) * r + 0.5f) * r * r + r + 1.f;
    return poly * (VecF)(((VecU)shifted + 127) << 23);
}

MR_TARGET inline void normalise(const float* x, const float* scale, int64_t n, float epsilon, float* out) {
    VecF squares = VecF{};
    for (int64_t i = 0; i < n; i += MR_LANES) {
        const VecF v = load_float(x + i);
        squares += v * v;
    }
    const float factor = 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + epsilon);
    for (int64_t i = 0; i < n; i += MR_LANES) save(load_float(x + i) * factor * load_float(scale + i), out + i);
}

// The two halves of a head are turned against each other.
MR_TARGET inline void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

// out (C vectors) = the sum of `length` rows of values, each by its weight. Two sums, so that one need not wait.
template <int C, class T>
MR_TARGET inline void add_weighted(const T* values, int64_t length, int64_t dim, const float* weights, float* out) {
    VecF even[C], odd[C];
    for (int c = 0; c < C; ++c) even[c] = odd[c] = VecF{};
    int64_t j = 0;
    for (; j + 2 <= length; j += 2, values += 2 * dim) {
        for (int c = 0; c < C; ++c) even[c] += load_float(values + c * MR_LANES) * weights[j];
        for (int c = 0; c < C; ++c) odd[c] += load_float(values + dim + c * MR_LANES) * weights[j + 1];
    }
    for (int c = 0; c < C && j < length; ++c) even[c] += load_float(values + c * MR_LANES) * weights[j];
    for (int c = 0; c < C; ++c) save(even[c] + odd[c], out + c * MR_LANES);
}

// out (dim,) = softmax(query . keys) @ values over the first `length` places; scores has room for whole vectors.
template <class C>
MR_TARGET void attend(const float* query, const C* keys, const C* values, int64_t length, int64_t dim, float* scores,
                      float* out) {
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) {
        const C* key = keys + j * dim;
        VecF totals[4] = {VecF{}, VecF{}, VecF{}, VecF{}};
        for (int64_t i = 0; i < dim; i += MR_LANES) {
            const VecF own = load_float(query + i);
            for (int k = 0; k < 4; ++k) totals[k] += own * load_float(key + k * dim + i);
        }
        const Quad four = sums(totals[0], totals[1], totals[2], totals[3]) * scale;
        std::memcpy(scores + j, &four, sizeof four);
    }
    for (; j < length; ++j) {
        VecF total = VecF{};
        for (int64_t i = 0; i < dim; i += MR_LANES) total += load_float(query + i) * load_float(keys + j * dim + i);
        scores[j] = sum(total) * scale;
    }
    const int64_t whole = (length + MR_LANES - 1) / MR_LANES * MR_LANES;
    std::fill(scores + length, scores + whole, -std::numeric_limits<float>::infinity());
    VecF most = load_float(scores);
    for (j = MR_LANES; j < whole; j += MR_LANES) most = load_float(scores + j) > most ? load_float(scores + j) : most;
    float largest = most[0];
    for (int k = 1; k < MR_LANES; ++k) largest = std::max(largest, most[k]);
    VecF total = VecF{};
    for (j = 0; j < whole; j += MR_LANES) {
        const VecF weight = exponential(load_float(scores + j) - largest);
        total += weight;
        save(weight, scores + j);
    }
    const VecF share = VecF{} + 1.f / sum(total);
    for (j = 0; j < whole; j += MR_LANES) save(load_float(scores + j) * share, scores + j);
    int64_t i = 0;
    for (; i + 4 * MR_LANES <= dim; i += 4 * MR_LANES) add_weighted<4>(values + i, length, dim, scores, out + i);
    for (; i < dim; i += MR_LANES) add_weighted<1>(values + i, length, dim, scores, out + i);
}

// x * sigmoid(x) * up, in place of `gate`.
MR_TARGET inline void gate_with(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += MR_LANES) {
        const VecF x = load_float(gate + i);
        save(x / (1.f + exponential(-x)) * load_float(up + i), gate + i);
    }
}

// What a product takes of x (n, in): itself, or its levels where the matrices are packed.
template <class T>
MR_TARGET inline auto input_of(const float* x, int64_t n, int64_t in, const StepScratch& scratch) {
    if constexpr (std::is_same_v<T, Packed>) {
        round_rows(x, n, in, scratch.rounded);
        return scratch.rounded;
    } else {
        return x;
    }
}

// The new tokens of a sequence: their keys and values go to the cache, and each looks at all up to itself.
template <class C>
MR_TARGET void attend_part(const DecoderShape& s, const StepPart& part, size_t index, float* qkv, const float* cos,
                           const float* sin, const StepScratch& scratch, float* attended) {
    const int64_t q = s.q_dim(), kv = s.kv_dim(), width = q + 2 * kv, dim = s.head_dim;
    const LayerCache& own = part.cache->layers[index];
    for (int64_t t = 0; t < part.n; ++t) {
        for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
            rotate(qkv + t * width + head * dim, cos + t * dim / 2, sin + t * dim / 2, dim / 2);
        }
    }
    for (int64_t kv_head = 0; kv_head < s.kv_heads; ++kv_head) {
        C* keys = static_cast<C*>(own.keys) + kv_head * part.cache->capacity * dim;
        C* values = static_cast<C*>(own.values) + kv_head * part.cache->capacity * dim;
        for (int64_t t = 0; t < part.n; ++t) {
            const float* row = qkv + t * width + q + kv_head * dim;
            for (int64_t i = 0; i < dim; ++i) {
                narrow(row[i], keys + (part.past + t) * dim + i);
                narrow(row[kv + i], values + (part.past + t) * dim + i);
            }
        }
        const int64_t group = s.heads / s.kv_heads;
        for (int64_t t = 0; t < part.n; ++t) {
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                attend(qkv + t * width + head * dim, keys, values, part.past + t + 1, dim, scratch.scores,
                       attended + t * q + head * dim);
            }
        }
    }
}

template <class T, class C>
MR_TARGET void step_layer(const DecoderShape& s, const DecoderLayer& layer, size_t index, const std::vector<StepPart>& parts,
                          int64_t n, const float* cos, const float* sin, const StepScratch& scratch) {
    const int64_t q = s.q_dim(), width = q + 2 * s.kv_dim();
    float *x = scratch.residual, *h = scratch.normed, *qkv = scratch.wide, *attended = scratch.attended;
    for (int64_t t = 0; t < n; ++t) {
        normalise(x + t * s.hidden, layer.input_norm, s.hidden, s.epsilon, h + t * s.hidden);
        std::copy(layer.qkv_bias, layer.qkv_bias + width, qkv + t * width);
    }
    add_product(static_cast<const T*>(layer.qkv), s.hidden, width, n, input_of<T>(h, n, s.hidden, scratch), qkv);
    int64_t first = 0;
    for (const StepPart& part : parts) {
        const int64_t table = first * s.head_dim / 2;
        attend_part<C>(s, part, index, qkv + first * width, cos + table, sin + table, scratch, attended + first * q);
        first += part.n;
    }
    add_product(static_cast<const T*>(layer.output), q, s.hidden, n, input_of<T>(attended, n, q, scratch), x);
    float *gate = scratch.wide, *up = scratch.wide + n * s.mlp;
    std::fill(gate, gate + 2 * n * s.mlp, 0.f);
    for (int64_t t = 0; t < n; ++t) {
        normalise(x + t * s.hidden, layer.attention_norm, s.hidden, s.epsilon, h + t * s.hidden);
    }
    const auto input = input_of<T>(h, n, s.hidden, scratch);
    add_product(static_cast<const T*>(layer.gate), s.hidden, s.mlp, n, input, gate);
    add_product(static_cast<const T*>(layer.up), s.hidden, s.mlp, n, input, up);
    gate_with(gate, up, n * s.mlp);
    add_product(static_cast<const T*>(layer.down), s.mlp, s.hidden, n, input_of<T>(gate, n, s.mlp, scratch), x);
}

template <class T, class C>
MR_TARGET void step(const DecoderWeights& weights, const std::vector<StepPart>& parts, int64_t n, const float* cos,
                    const float* sin, const StepScratch& scratch, float* out) {
    const DecoderShape& s = weights.shape;
    for (size_t i = 0; i < weights.layers.size(); ++i) {
        step_layer<T, C>(s, weights.layers[i], i, parts, n, cos, sin, scratch);
    }
    for (int64_t t = 0; t < n; ++t) {
        normalise(scratch.residual + t * s.hidden, weights.final_norm, s.hidden, s.epsilon, out + t * s.hidden);
    }
}
