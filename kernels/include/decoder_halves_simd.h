// A step of a small decoder in eight bits in two halves, for the bodies of for_each_level.h: each has half of the heads and
// of the wide layer, and thereby half of every matrix. Nothing passes between them but two sums a layer: with a thread for
// each half its weights stay in that core's own cache from step to step, and so does nearly all that it works on.

// x (hidden,) += what both halves add to token t.
MR_TARGET inline void add_both(const float* one, const float* other, int64_t hidden, float* x) {
    for (int64_t i = 0; i < hidden; i += MR_LANES) save((load_float(x + i) + load_float(one + i)) + load_float(other + i), x + i);
}

// sum (n, hidden) = rounded x (n, in) @ w (in, hidden), of the rows in a half's part only.
MR_TARGET inline void multiply_part(const void* w, int64_t in, const Range& part, int64_t hidden, int64_t n,
                                    const RoundedRows& x, float* sum) {
    std::fill_n(sum, n * hidden, 0.f);
    const Range blocks{part.first / kBlockRows, part.end / kBlockRows};
    for (int64_t j = 0; j < hidden / kPanel; ++j) add_blocks(w, j, in, hidden, n, x, blocks, sum);
}

// Each new token's keys and values go to its cache, and its queries look at all that is there. Returns the tokens that go
// on: in the last layer those alone whose hidden states are asked for.
template <class C>
MR_TARGET std::vector<NewToken> attend_half(const DecoderShape& s, const DecoderLayer& layer, size_t index, bool is_last,
                                            std::vector<NewToken> tokens, const float* cos, const float* sin, const Half& own) {
    auto n = static_cast<int64_t>(tokens.size());
    const int64_t q = s.q_dim(), kv = s.kv_dim(), width = q + 2 * kv, group = s.heads / s.kv_heads;
    float *h = own.scratch.normed, *qkv = own.scratch.wide;
    for (int64_t t = 0; t < n; ++t) {
        normalise(own.scratch.residual + t * s.hidden, layer.input_norm, s.hidden, s.epsilon, h + t * s.hidden);
        round_row<Packed>(h + t * s.hidden, s.hidden, own.rounded(t * s.hidden));
        std::copy(layer.qkv_bias, layer.qkv_bias + width, qkv + t * width);
    }
    const int64_t keys = q + own.kv_heads.first * s.head_dim, size = kv / 2;
    for (const Range& columns : {own.queries, Range{keys, keys + size}, Range{keys + kv, keys + kv + size}}) {
        for (int64_t j = columns.first / kPanel; j < columns.end / kPanel; ++j) {
            add_blocks(layer.qkv, j, s.hidden, width, n, own.scratch.rounded, {0, s.hidden / kBlockRows}, qkv);
        }
    }
    for (int64_t t = 0, half = s.head_dim / 2; t < n; ++t) {
        keep_token<C>(s, tokens[static_cast<size_t>(t)], index, own.kv_heads, qkv + t * width, cos + t * half, sin + t * half);
    }
    if (is_last) tokens = asked_for(s, tokens, own.scratch);
    n = static_cast<int64_t>(tokens.size());
    for (const Together& some : look_together(tokens, group, kTogether)) {
        for (int64_t head = own.kv_heads.first; head < own.kv_heads.end; ++head) {
            attend_together<C>(s, index, tokens, some, head, own.scratch, own.scratch.scores);
        }
    }
    for (int64_t t = 0; t < n; ++t) {
        const int64_t at = t * q + own.queries.first;
        round_row<Packed>(own.scratch.attended + at, own.queries.end - own.queries.first, own.rounded(at));
    }
    multiply_part(layer.output, q, own.queries, s.hidden, n, own.scratch.rounded, own.attention);
    return tokens;
}

// A half of the wide layer.
MR_TARGET void widen_half(const DecoderShape& s, const DecoderLayer& layer, int64_t n, const Half& own) {
    for (int64_t t = 0; t < n; ++t) {
        float* h = own.scratch.normed + t * s.hidden;
        normalise(own.scratch.residual + t * s.hidden, layer.attention_norm, s.hidden, s.epsilon, h);
        round_row<Packed>(h, s.hidden, own.rounded(t * s.hidden));
    }
    for (int64_t j = own.wide.first / kPanel; j < own.wide.end / kPanel; ++j) gated_panel<Packed>(s, layer, j, n, own.scratch);
    for (int64_t t = 0; t < n; ++t) {
        const int64_t at = t * s.mlp + own.wide.first;
        round_row<Packed>(own.scratch.wide + at, own.wide.end - own.wide.first, own.rounded(at));
    }
    multiply_part(layer.down, s.mlp, own.wide, s.hidden, n, own.scratch.rounded, own.wider);
}

template <class C>
MR_TARGET void step_in_halves(const DecoderWeights& weights, std::vector<NewToken> tokens, const float* embeds, const float* cos,
                              const float* sin, const Half (&halves)[2], float* out, Crew& crew) {
    const DecoderShape& s = weights.shape;
    auto n = static_cast<int64_t>(tokens.size());
    // Each has to bring its own copy up to date, and reads for that what both have added.
    const auto update = [&](float* Half::*sum, int64_t item) MR_TARGET {
        for (int64_t t = 0; t < n; ++t) {
            const float *one = halves[0].*sum + t * s.hidden, *other = halves[1].*sum + t * s.hidden;
            add_both(one, other, s.hidden, halves[item].scratch.residual + t * s.hidden);
        }
    };
    for (size_t i = 0; i < weights.layers.size(); ++i) {
        std::vector<NewToken> left[2];
        crew.each(2, [&](int64_t item, int) MR_TARGET {
            if (i == 0) std::copy(embeds, embeds + n * s.hidden, halves[item].scratch.residual);
            if (i > 0) update(&Half::wider, item);
            left[item] = attend_half<C>(s, weights.layers[i], i, i + 1 == weights.layers.size(), tokens, cos, sin, halves[item]);
        });
        tokens.swap(left[0]);
        n = static_cast<int64_t>(tokens.size());
        if (n == 0) return;
        crew.each(2, [&](int64_t item, int) MR_TARGET {
            update(&Half::attention, item);
            widen_half(s, weights.layers[i], n, halves[item]);
        });
    }
    update(&Half::wider, 0);
    for (int64_t t = 0; t < n; ++t) {
        normalise(halves[0].scratch.residual + t * s.hidden, weights.final_norm, s.hidden, s.epsilon, out + t * s.hidden);
    }
}
