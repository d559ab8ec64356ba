// The body of mask_decoder.cpp, behind tiles_simd.h. Tokens are 16 rows, of which the last may be empty; of a head, too.

constexpr float kTwoPi = 6.28318531f;
constexpr float kFinalEpsilon = 1e-5f, kDoublingEpsilon = 1e-6f;
constexpr int64_t kPlacesAtOnce = 32;

// n numbers, a multiple of 16.
MR_TARGET inline void layer_norm(float* x, const Norm& norm, int64_t n, float epsilon) {
    const auto [mean, factor] = mean_and_factor(x, n, epsilon);
    for (int64_t i = 0; i < n; i += MR_LANES) {
        save((load_float(x + i) - mean) * factor * load_float(norm.scale + i) + load_float(norm.bias + i), x + i);
    }
}

// The same for any n.
MR_TARGET inline void small_norm(float* x, const Norm& norm, int64_t n, float epsilon) {
    float mean = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= static_cast<float>(n);
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.f / std::sqrt(squares / static_cast<float>(n) + epsilon);
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * factor * norm.scale[i] + norm.bias[i];
}

MR_TARGET inline void narrow_all(const float* from, int64_t n, Half* to) {
    for (int64_t i = 0; i < n; i += MR_LANES) narrow_to(load_float(from + i), to + i);
}

// to = a + b, or a alone.
MR_TARGET inline void narrow_sum(const float* a, const float* b, int64_t n, Half* to) {
    for (int64_t i = 0; i < n; i += MR_LANES) narrow_to(b ? load_float(a + i) + load_float(b + i) : load_float(a + i), to + i);
}

// The room that a prompt needs, and what is done in it.
class Studio final : public MaskRoom {
   public:
    explicit Studio(const MaskWeights& weights)
        : w_(weights),
          s_(weights.shape),
          c_(s_.channels),
          p_(s_.places()),
          rows_(s_.heads * kTile),
          wide_(widest(weights)),
          x_(kTile * c_),
          codes_(kTile * c_),
          y_(kTile * wide_),
          deep_(rows_ * c_),
          keys_(p_ * c_),
          scores_(p_ * rows_),
          shares_(rows_),
          pixels_(std::max(2 * p_ * weights.box.channels, 2 * kPlacesAtOnce * c_)),
          h_((2 * kTile) * wide_ + kPair),
          deep_half_(rows_ * c_),
          placed_(p_ * c_),
          plain_(p_ * c_),
          placed_columns_(p_ * c_),
          plain_rows_(p_ * c_),
          weights_half_(std::max(p_ * rows_, kPlacesAtOnce * c_)),
          packed_(up_to(rows_, kPair) * c_) {}

    MR_TARGET void run(const MaskPrompt& prompt) override {
        std::vector<float> hyper;
        hyper.reserve(w_.hyper.size() * static_cast<size_t>(c_ / 8));
        std::fill(h_.get() + kTile * s_.inner, h_.get() + kTile * s_.inner + kPair, Half{0});  // a head's tile reads beyond
        configure();
        n_tokens_ = w_.n_learned + prompt.n_points;
        make_tokens(prompt);
        make_places(prompt);
        for (size_t i = 0; i < w_.layers.size(); ++i) {
            const MaskLayer& layer = w_.layers[i];
            attend_each_other(layer, i == 0);
            layer_norms(layer.norms[0], s_.epsilon);
            look_at_places(layer.from_tokens);
            layer_norms(layer.norms[1], s_.epsilon);
            think(layer);
            layer_norms(layer.norms[2], s_.epsilon);
            let_places_look(layer.from_places, layer.norms[3]);
        }
        look_at_places(w_.last);
        layer_norms(w_.last_norm, kFinalEpsilon);
        for (size_t i = 0; i < w_.hyper.size(); ++i) {
            const float* const own = perceive(w_.hyper[i], 1 + s_.first_mask + static_cast<int64_t>(i));
            hyper.insert(hyper.end(), own, own + c_ / 8);
        }
        draw(hyper, prompt.logits);
        const float* const scores = perceive(w_.scores, 0);
        std::copy(scores + s_.first_mask, scores + s_.first_mask + s_.n_masks, prompt.scores);
        release();
    }

   private:
    static int64_t widest(const MaskWeights& w) {
        int64_t wide = std::max({3 * w.shape.channels, w.shape.mlp, w.shape.inner});
        for (const auto& hyper : w.hyper) {
            for (const Linear& each : hyper) wide = std::max(wide, each.out);
        }
        for (const Linear& each : w.scores) wide = std::max(wide, each.out);
        return up_to(wide, kPair) + kPair;
    }

    // y (16, width) = h @ matrix + bias; returns the stride of both, filled up.
    MR_TARGET int64_t apply(const Linear& linear, const Half* h, int64_t lda, float* y) {
        const int64_t width = up_to(linear.out, kPair);
        product(h, lda, 1, linear.matrix, linear.in, width, y, width, false);
        if (!linear.bias) return width;
        for (int64_t t = 0; t < kTile; ++t) {
            for (int64_t j = 0; j < width; j += MR_LANES) {
                save(load_float(y + t * width + j) + load_float(linear.bias + j), y + t * width + j);
            }
        }
        return width;
    }

    MR_TARGET void make_tokens(const MaskPrompt& prompt) {
        std::fill(x_.get(), x_.get() + kTile * c_, 0.f);
        std::copy(w_.learned, w_.learned + w_.n_learned * c_, x_.get());
        const float scale = 2 * kTwoPi / s_.image_size, shift = kTwoPi / s_.image_size - kTwoPi;
        for (int64_t i = 0; i < prompt.n_points; ++i) {
            float* const to = x_.get() + (w_.n_learned + i) * c_;
            std::copy(w_.kinds + (prompt.labels[i] + 1) * c_, w_.kinds + (prompt.labels[i] + 2) * c_, to);
            if (prompt.labels[i] < 0) continue;
            const float across = prompt.points[2 * i] * scale + shift, down = prompt.points[2 * i + 1] * scale + shift;
            for (int64_t j = 0; j < c_ / 2; ++j) {
                const float angle = across * w_.frequencies[j] + down * w_.frequencies[c_ / 2 + j];
                to[j] += std::sin(angle);
                to[c_ / 2 + j] += std::cos(angle);
            }
        }
        std::copy(x_.get(), x_.get() + kTile * c_, codes_.get());
    }

    // The image's embedding, place by place, with the mask prompt or what stands for none.
    MR_TARGET void make_places(const MaskPrompt& prompt) {
        const __m512i planes = steps_of(p_);
        for (int64_t j = 0; j < c_; j += MR_LANES) {
            for (int64_t p = 0; p < p_; ++p) {
                save((VecF)_mm512_i32gather_ps(planes, prompt.embedding + j * p_ + p, 4), keys_.get() + p * c_ + j);
            }
        }
        const bool drawn = s_.draws_box && draw_box(prompt);
        for (int64_t p = 0; p < p_ && !drawn; ++p) add(keys_.get() + p * c_, w_.no_mask);
        round_places();
    }

    MR_TARGET void add(float* to, const float* from) const {
        for (int64_t j = 0; j < c_; j += MR_LANES) save(load_float(to + j) + load_float(from + j), to + j);
    }

    // Adds the mask prompt of the box, if there is one.
    MR_TARGET bool draw_box(const MaskPrompt& prompt) {
        float corners[2][2] = {};
        bool is_there = false;
        for (int64_t i = 0; i < prompt.n_points; ++i) {
            if (prompt.labels[i] < 2) continue;
            for (int axis = 0; axis < 2; ++axis) corners[prompt.labels[i] - 2][axis] += prompt.points[2 * i + axis];
            is_there = is_there || prompt.labels[i] == 3;
        }
        if (!is_there) return false;
        const float scale = 0.5f * static_cast<float>(s_.mask_size()) / s_.image_size;
        const auto inside = [&](int64_t pixel, int axis) {
            const float centre = 0.5f * (static_cast<float>(pixel) + 0.5f);
            return std::clamp(std::min(centre - corners[0][axis] * scale, corners[1][axis] * scale - centre), -2.f, 2.f);
        };
        const BoxPrompt& box = w_.box;
        const int64_t d = box.channels, quarter = d / 4;
        float* const first = pixels_.get();
        for (int64_t p = 0; p < p_; ++p) {
            float* const to = first + p * d;
            float values[16];
            for (int64_t i = 0; i < 16; ++i) {
                values[i] = std::min(inside(p % s_.grid * 4 + i % 4, 0), inside(p / s_.grid * 4 + i / 4, 1));
            }
            spread(values, 16, box.first, box.first_bias, d, to);
            for (int64_t i = 0; i < 4; ++i) small_norm(to + i * quarter, box.first_norm, quarter, s_.prompt_epsilon);
        }
        for (int64_t i = 0; i < p_ * d; i += MR_LANES) save(gelu(load_float(first + i)), first + i);
        float* const second = first + p_ * d;
        for (int64_t p = 0; p < p_; ++p) {
            float* const to = second + p * d;
            spread(first + p * d, d, box.second, box.second_bias, d, to);
            small_norm(to, box.second_norm, d, s_.prompt_epsilon);
        }
        for (int64_t i = 0; i < p_ * d; i += MR_LANES) save(gelu(load_float(second + i)), second + i);
        for (int64_t p = 0; p < p_; ++p) {
            for (int64_t j = 0; j < c_; j += MR_LANES) {
                VecF total = load_float(keys_.get() + p * c_ + j) + load_float(box.last_bias + j);
                for (int64_t i = 0; i < d; ++i) total += load_float(box.last + i * c_ + j) * second[p * d + i];
                save(total, keys_.get() + p * c_ + j);
            }
        }
        return true;
    }

    // to (out,) = x (in,) @ w + bias; out is a multiple of 16.
    MR_TARGET static void spread(const float* x, int64_t in, const float* w, const float* bias, int64_t out, float* to) {
        for (int64_t j = 0; j < out; j += MR_LANES) {
            VecF total = load_float(bias + j);
            for (int64_t i = 0; i < in; ++i) total += load_float(w + i * out + j) * x[i];
            save(total, to + j);
        }
    }

    // The places as products take them: with their codes, as columns too, and without, as rows.
    MR_TARGET void round_places() {
        narrow_all(keys_.get(), p_ * c_, plain_.get());
        for (int64_t i = 0; i < p_ * c_; i += MR_LANES) {
            narrow_to(load_float(keys_.get() + i) + load_float(w_.image_places.data() + i), placed_.get() + i);
        }
        pack_columns(placed_.get(), c_, p_, c_, placed_columns_.get());
        pack_rows(plain_.get(), c_, p_, c_, plain_rows_.get());
    }

    MR_TARGET void layer_norms(const Norm& norm, float epsilon) {
        for (int64_t t = 0; t < n_tokens_; ++t) layer_norm(x_.get() + t * c_, norm, c_, epsilon);
    }

    // Adds to the tokens, or takes their place.
    MR_TARGET void take(const float* y, int64_t stride, bool replaces) {
        for (int64_t t = 0; t < n_tokens_; ++t) {
            float* const to = x_.get() + t * c_;
            if (replaces) std::copy(y + t * stride, y + t * stride + c_, to);
            if (!replaces) add(to, y + t * stride);
        }
    }

    MR_TARGET void attend_each_other(const MaskLayer& layer, bool is_first) {
        Half* const h = h_.get();
        const int64_t dim = c_ / s_.heads, width = 3 * c_;
        float* const qkv = y_.get();
        narrow_sum(x_.get(), is_first ? nullptr : codes_.get(), kTile * c_, h);
        all_is_written();
        product(h, c_, 1, layer.q.matrix, c_, c_, qkv, width, false);
        product(h, c_, 1, layer.k.matrix, c_, c_, qkv + c_, width, false);
        narrow_all(x_.get(), kTile * c_, h);
        product(h, c_, 1, layer.v.matrix, c_, c_, qkv + 2 * c_, width, false);
        for (int64_t t = 0; t < n_tokens_; ++t) {
            for (int64_t j = 0; j < width; j += MR_LANES) {
                save(load_float(qkv + t * width + j) + load_float(layer.qkv_bias + j), qkv + t * width + j);
            }
        }
        const float scale = 1.f / std::sqrt(static_cast<float>(dim));
        for (int64_t head = 0; head < s_.heads; ++head) {
            for (int64_t t = 0; t < n_tokens_; ++t) {
                alignas(64) float scores[kTile];
                const float* const q = qkv + t * width + head * dim;
                for (int64_t k = 0; k < n_tokens_; ++k) {
                    VecF total = VecF{};
                    const float* const key = qkv + k * width + c_ + head * dim;
                    for (int64_t j = 0; j < dim; j += MR_LANES) total += load_float(q + j) * load_float(key + j);
                    scores[k] = sum(total) * scale;
                }
                soften(scores, n_tokens_);
                for (int64_t j = 0; j < dim; j += MR_LANES) {
                    VecF total = VecF{};
                    for (int64_t k = 0; k < n_tokens_; ++k) total += load_float(qkv + k * width + 2 * c_ + head * dim + j) * scores[k];
                    narrow_to(total, h + t * c_ + head * dim + j);
                }
            }
        }
        const int64_t stride = apply(layer.out, h, c_, y_.get());
        take(y_.get(), stride, is_first);
    }

    // Softmax of the first n of 16 numbers; the others become 0.
    MR_TARGET static void soften(float* scores, int64_t n) {
        const auto there = static_cast<__mmask16>((1u << n) - 1);
        const __m512 v = _mm512_load_ps(scores);
        const VecF weight = power_of_e((VecF)v - _mm512_mask_reduce_max_ps(there, v));
        const __m512 kept = _mm512_maskz_mov_ps(there, (__m512)weight);
        save((VecF)kept * (1.f / _mm512_reduce_add_ps(kept)), scores);
    }

    // Rows (16, size) of each head, times its matrix (size, C), to rows (heads, 16, C) of `deep_`.
    MR_TARGET void deepen(const Half* h, int64_t lda, const Half* matrices) {
        for (int64_t head = 0; head < s_.heads; ++head) {
            product(h + head * s_.size(), lda, 1, matrices + head * tiled_numbers(s_.size(), c_), s_.size(), c_,
                    deep_.get() + head * kTile * c_, c_, false);
        }
    }

    // Tokens look at places.
    MR_TARGET void look_at_places(const FromTokens& w) {
        Half *const h = h_.get(), *const deep = deep_half_.get();
        narrow_sum(x_.get(), codes_.get(), kTile * c_, h);
        int64_t stride = apply(w.q, h, c_, y_.get());
        narrow_all(y_.get(), kTile * stride, h);
        deepen(h, stride, w.k);
        narrow_all(deep_.get(), rows_ * c_, deep);
        product(deep, c_, s_.heads, placed_columns_.get(), c_, p_, scores_.get(), p_, false);
        const float scale = 1.f / std::sqrt(static_cast<float>(s_.size()));
        for (int64_t row = 0; row < rows_; ++row) {
            if (row % kTile < n_tokens_) shares_.get()[row] = weigh(scores_.get() + row * p_, p_, p_, scale, weights_half_.get() + row * p_);
            if (row % kTile >= n_tokens_) std::fill(weights_half_.get() + row * p_, weights_half_.get() + (row + 1) * p_, Half{0});
        }
        product(weights_half_.get(), p_, s_.heads, plain_rows_.get(), p_, c_, deep_.get(), c_, false);
        for (int64_t row = 0; row < rows_; ++row) {
            const float share = row % kTile < n_tokens_ ? shares_.get()[row] : 0.f;
            for (int64_t j = 0; j < c_; j += MR_LANES) narrow_to(load_float(deep_.get() + row * c_ + j) * share, deep + row * c_ + j);
        }
        stride = s_.inner + kPair;  // a head's product is 32 wide: the next one writes over what is too much
        for (int64_t head = 0; head < s_.heads; ++head) {
            product(deep + head * kTile * c_, c_, 1, w.v + head * tiled_numbers(c_, kPair), c_, kPair,
                    y_.get() + head * s_.size(), stride, false);
        }
        narrow_all(y_.get(), kTile * stride, h);
        const int64_t width = apply(w.out, h, stride, y_.get());
        take(y_.get(), width, false);
    }

    MR_TARGET void think(const MaskLayer& layer) {
        Half* const h = h_.get();
        narrow_all(x_.get(), kTile * c_, h);
        int64_t stride = apply(layer.up, h, c_, y_.get());
        for (int64_t i = 0; i < kTile * stride; i += MR_LANES) {
            const VecF v = load_float(y_.get() + i);
            narrow_to(v > 0.f ? v : VecF{}, h + i);
        }
        stride = apply(layer.down, h, stride, y_.get());
        take(y_.get(), stride, false);
    }

    // Places look at tokens.
    MR_TARGET void let_places_look(const FromPlaces& w, const Norm& norm) {
        Half *const h = h_.get(), *const deep = deep_half_.get();
        narrow_sum(x_.get(), codes_.get(), kTile * c_, h);
        int64_t stride = apply(w.k, h, c_, y_.get());
        alignas(64) float own[kMostHeads * kTile] = {};
        for (int64_t head = 0; head < s_.heads; ++head) {
            for (int64_t t = 0; t < n_tokens_; ++t) {
                VecF total = VecF{};
                for (int64_t j = head * s_.size(); j < (head + 1) * s_.size(); j += MR_LANES) {
                    total += load_float(y_.get() + t * stride + j) * load_float(w.q_scores + j);
                }
                own[head * kTile + t] = sum(total);
            }
        }
        narrow_all(y_.get(), kTile * stride, h);
        deepen(h, stride, w.q);
        narrow_all(deep_.get(), rows_ * c_, deep);
        pack_columns(deep, c_, rows_, c_, packed_.get());
        product(placed_.get(), c_, p_ / kTile, packed_.get(), c_, rows_, scores_.get(), rows_, false);
        const float scale = 1.f / std::sqrt(static_cast<float>(s_.size()));
        for (int64_t p = 0; p < p_; ++p) {
            for (int64_t i = 0; i < rows_; i += kTile) {
                alignas(64) float scores[kTile];
                save(load_float(scores_.get() + p * rows_ + i) * scale + load_float(own + i), scores);
                soften(scores, n_tokens_);
                narrow_to(load_float(scores), weights_half_.get() + p * rows_ + i);
            }
        }
        narrow_all(x_.get(), kTile * c_, h);
        stride = apply(w.v, h, c_, y_.get());
        narrow_all(y_.get(), kTile * stride, h);
        deepen(h, stride, w.out);
        for (int64_t row = 0; row < rows_; ++row) {
            narrow_sum(deep_.get() + row * c_, w.out_biases + row / kTile * c_, c_, deep + row * c_);
        }
        pack_rows(deep, c_, rows_, c_, packed_.get());
        product(weights_half_.get(), rows_, p_ / kTile, packed_.get(), rows_, c_, keys_.get(), c_, true);
        for (int64_t p = 0; p < p_; ++p) layer_norm(keys_.get() + p * c_, norm, c_, s_.epsilon);
        round_places();
    }

    // What a small network makes of one token; stands in `y_`.
    MR_TARGET const float* perceive(const std::vector<Linear>& layers, int64_t token) {
        Half* const h = h_.get();
        narrow_all(x_.get() + token * c_, c_, h);
        int64_t stride = c_;
        for (size_t i = 0; i < layers.size(); ++i) {
            if (i > 0) {
                for (int64_t j = 0; j < stride; j += MR_LANES) {
                    const VecF v = load_float(y_.get() + j);
                    narrow_to(v > 0.f ? v : VecF{}, h + j);
                }
            }
            stride = apply(layers[i], h, stride, y_.get());  // of 16 rows the first is meant
        }
        return y_.get();
    }

    // Doubles the places twice, and weighs what they are then by each mask's own numbers.
    MR_TARGET void draw(const std::vector<float>& hyper, float* logits) {
        const int64_t quarter = c_ / 4, eighth = c_ / 8, side = s_.mask_size();
        float* const y = pixels_.get();
        Half* const h = weights_half_.get();
        for (int64_t first = 0; first < p_; first += kPlacesAtOnce) {
            const int64_t n = std::min(kPlacesAtOnce, p_ - first);
            product(plain_.get() + first * c_, c_, n / kTile, w_.first_doubling.matrix, c_, c_, y, c_, false);
            for (int64_t i = 0; i < 4 * n; ++i) {
                float* const own = y + i * quarter;
                for (int64_t j = 0; j < quarter; j += MR_LANES) save(load_float(own + j) + load_float(w_.first_doubling.bias + j), own + j);
                layer_norm(own, w_.doubling_norm, quarter, kDoublingEpsilon);
                for (int64_t j = 0; j < quarter; j += MR_LANES) narrow_to(gelu(load_float(own + j)), h + i * quarter + j);
            }
            product(h, quarter, 4 * n / kTile, w_.second_doubling.matrix, quarter, 4 * eighth, y, 4 * eighth, false);
            for (int64_t i = 0; i < 16 * n; ++i) {
                float* const own = y + i * eighth;
                for (int64_t j = 0; j < eighth; j += MR_LANES) save(gelu(load_float(own + j) + load_float(w_.second_doubling.bias + j)), own + j);
                const int64_t p = first + i / 16, down = (i >> 3 & 1) * 2 + (i >> 1 & 1), right = (i >> 2 & 1) * 2 + (i & 1);
                for (int64_t m = 0; m < s_.n_masks; ++m) {
                    VecF total = VecF{};
                    for (int64_t j = 0; j < eighth; j += MR_LANES) total += load_float(own + j) * load_float(hyper.data() + m * eighth + j);
                    logits[(m * side + p / s_.grid * 4 + down) * side + p % s_.grid * 4 + right] = sum(total);
                }
            }
        }
    }

    static constexpr int64_t kMostHeads = 64;

    const MaskWeights& w_;
    const MaskShape& s_;
    int64_t c_, p_;
    int64_t rows_, wide_;  // 16 for each head; of what tokens become, at most
    int64_t n_tokens_ = 0;
    Numbers<float> x_, codes_, y_, deep_, keys_, scores_, shares_, pixels_;
    Numbers<Half> h_, deep_half_, placed_, plain_, placed_columns_, plain_rows_, weights_half_, packed_;
};

inline std::unique_ptr<MaskRoom> make_room(const MaskWeights& weights) { return std::make_unique<Studio>(weights); }
