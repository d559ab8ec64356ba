// The body of vision_tower.cpp, behind tiles_simd.h.

#include "inputs_simd.h"
#include "parts_simd.h"

// Keys and values of one head and group of patches as tiles, and what is made of some queries with them.
struct Attention {
    Attention(int64_t most_keys, int64_t head_dim)
        : keys(up_to(most_keys, kPair) * up_to(head_dim, kTileDepth)),
          values(up_to(most_keys, kTileDepth) * up_to(head_dim, kPair)),
          scores(kTile * up_to(most_keys, kPair)),
          weights(kTile * up_to(most_keys, kPair)),
          sums(kTile * up_to(head_dim, kPair)) {}

    Numbers<Half> keys, values;
    Numbers<float> scores;
    Numbers<Half> weights;
    Numbers<float> sums;
};

// What a thread needs for some rows.
struct Scratch {
    Scratch(const TowerWeights& w, int64_t rows, int64_t most_keys)
        : patches(rows * up_to(w.shape.patch_dim, kTileDepth)),
          turned(rows * 3 * w.shape.hidden),
          normed(w.is_packed, rows, w.shape.hidden),
          gated(w.is_packed, rows, w.shape.mlp),
          attention(most_keys, w.shape.head_dim()) {}

    Numbers<Half> patches;
    Numbers<float> turned;
    Inputs normed, gated;
    Attention attention;
};

// The room that images of one size need, and what is done in it.
class Workshop final : public TowerRoom {
   public:
    Workshop(const TowerWeights& weights, int64_t n_patches, int n_threads)
        : w_(weights),
          s_(weights.shape),
          n_patches_(n_patches),
          n_threads_(n_threads),
          n_tiles_(up_to(n_patches, kTile) / kTile),
          parts_(n_tiles_, n_threads),
          n_token_tiles_(up_to(n_patches / s_.merged, kTile) / kTile),
          residual_(n_tiles_ * kTile * s_.hidden),
          qkv_((n_tiles_ + 1) * kTile * 3 * s_.hidden),  // a tile that starts at the last row reads beyond it
          attended_(std::max(n_tiles_, n_token_tiles_ * s_.merged) * kTile * s_.hidden),
          sums_(n_token_tiles_ * kTile * std::max(s_.wide(), s_.out)) {
        const int64_t most_tokens = (n_token_tiles_ + n_threads - 1) / n_threads * kTile;
        for (int i = 0; i < n_threads; ++i) {
            scratch_.push_back(std::make_unique<Scratch>(w_, parts_.most_rows(), n_patches));
            tokens_.push_back(std::make_unique<Inputs>(w_.is_packed, most_tokens, s_.wide()));
        }
    }

    bool fits(int64_t n_patches, int n_threads) const override { return n_patches == n_patches_ && n_threads == n_threads_; }

    void run(const TowerImage& image, Crew& crew, float* out) override {
        image_ = &image;
        crew_ = &crew;
        for (size_t i = 0; i < w_.layers.size(); ++i) {
            each_part([&](int64_t first, int64_t n, Scratch& own) MR_TARGET {
                if (i == 0) read_patches(first, n, own);
                if (i > 0) finish_layer(w_.layers[i - 1], first, n, own);
                begin_layer(w_.layers[i], i > 0 ? w_.layers[i - 1].down_bias : nullptr, first, n, own);
            });
            attend(w_.layers[i]);
        }
        each_part([&](int64_t first, int64_t n, Scratch& own) MR_TARGET {
            finish_layer(w_.layers.back(), first, n, own);
            float* const line = own.normed.line();
            for (int64_t i = first * kTile; i < (first + n) * kTile; ++i) {
                normalise_row(i, w_.layers.back().down_bias, w_.last_norm, line);
                for (int64_t j = 0; j < s_.hidden; j += MR_LANES) narrow_to(load_float(line + j), attended_.get() + i * s_.hidden + j);
            }
        });
        merge(out);
    }

   private:
    // Calls work(first tile, tiles, scratch) for parts of the rows.
    template <class Work>
    void each_part(const Work& work) {
        parts_.each(*crew_, [&](int64_t first, int64_t n, int who) MR_TARGET { work(first, n, *scratch_[static_cast<size_t>(who)]); });
    }

    float* row(int64_t tile) const { return residual_.get() + tile * kTile * s_.hidden; }

    MR_TARGET void read_patches(int64_t first, int64_t n, Scratch& own) {
        const int64_t width = up_to(s_.patch_dim, kTileDepth);
        for (int64_t i = 0; i < n * kTile; ++i) {
            Half* const to = own.patches.get() + i * width;
            const int64_t place = first * kTile + i;
            std::memset(to, 0, static_cast<size_t>(width) * sizeof(Half));
            if (place >= n_patches_) continue;
            const float* const from = image_->patches + image_->order[static_cast<size_t>(place)] * s_.patch_dim;
            int64_t j = 0;
            for (; j + MR_LANES <= s_.patch_dim; j += MR_LANES) narrow_to(load_float(from + j), to + j);
            for (; j < s_.patch_dim; ++j) to[j] = to_bfloat16(from[j]);
        }
        product(own.patches.get(), width, n, w_.patches, s_.patch_dim, s_.hidden, row(first), s_.hidden, false);
    }

    // Adds a bias to a row of the residual, if there is one, and gives its norm.
    MR_TARGET void normalise_row(int64_t i, const float* bias, const float* scale, float* to) {
        float* const x = residual_.get() + i * s_.hidden;
        VecF squares = VecF{};
        for (int64_t j = 0; j < s_.hidden; j += MR_LANES) {
            VecF v = load_float(x + j);
            if (bias) {
                v += load_float(bias + j);
                save(v, x + j);
            }
            squares += v * v;
        }
        const float factor = 1.f / std::sqrt(sum(squares) / static_cast<float>(s_.hidden) + s_.epsilon);
        for (int64_t j = 0; j < s_.hidden; j += MR_LANES) save(load_float(x + j) * factor * load_float(scale + j), to + j);
    }

    MR_TARGET void normalise_into(const Inputs& to, int64_t first, int64_t n, const float* bias, const float* scale) {
        for (int64_t i = 0; i < n * kTile; ++i) {
            normalise_row(first * kTile + i, bias, scale, to.line());
            to.put(i, s_.hidden);
        }
    }

    MR_TARGET void begin_layer(const TowerLayer& layer, const float* bias, int64_t first, int64_t n, Scratch& own) {
        normalise_into(own.normed, first, n, bias, layer.attention_norm);
        const int64_t width = 3 * s_.hidden;
        float* const turned = own.turned.get();
        own.normed.times(layer.qkv, n, s_.hidden, width, turned, false);
        for (int64_t i = 0; i < n * kTile; ++i) {
            const int64_t place = first * kTile + i;
            if (place < n_patches_) turn(turned + i * width, layer.qkv_bias, place);
        }
    }

    // Queries and keys of a row get their bias and are turned by the place of the patch, values their bias.
    MR_TARGET void turn(const float* from, const float* bias, int64_t place) {
        const int64_t dim = s_.head_dim(), half = dim / 2, patch = image_->order[static_cast<size_t>(place)];
        const float *const cos = image_->cos + patch * dim, *const sin = image_->sin + patch * dim;
        Half* to = qkv_.get() + place * 3 * s_.hidden;
        for (int64_t head = 0; head < 2 * s_.heads; ++head, from += dim, bias += dim, to += dim) {
            int64_t j = 0;
            for (; j + MR_LANES <= half; j += MR_LANES) {
                const VecF a = load_float(from + j) + load_float(bias + j);
                const VecF b = load_float(from + half + j) + load_float(bias + half + j);
                const VecF c = load_float(cos + j), s = load_float(sin + j);
                narrow_to(a * c - b * s, to + j);
                narrow_to(b * c + a * s, to + half + j);
            }
            for (; j < half; ++j) {
                const float a = from[j] + bias[j], b = from[half + j] + bias[half + j];
                to[j] = to_bfloat16(a * cos[j] - b * sin[j]);
                to[half + j] = to_bfloat16(b * cos[j] + a * sin[j]);
            }
        }
        for (int64_t j = 0; j < s_.hidden; j += MR_LANES) narrow_to(load_float(from + j) + load_float(bias + j), to + j);
    }

    MR_TARGET void finish_layer(const TowerLayer& layer, int64_t first, int64_t n, Scratch& own) {
        const int64_t mlp = up_to(s_.mlp, kPair);
        own.normed.times_of(attended_.get() + first * kTile * s_.hidden, layer.output, n, s_.hidden, s_.hidden, row(first), true);
        normalise_into(own.normed, first, n, layer.output_bias, layer.mlp_norm);
        if (w_.is_packed) {
            gate_packed(layer, n, own);
        } else {
            gate_tiles(layer, n, own);
        }
        own.gated.times(layer.down, n, mlp, s_.hidden, row(first), true);
    }

    MR_TARGET static VecF gate_with(VecF gate, VecF up) { return gate * sigmoid(gate) * up; }

    // A panel of gates, and the same one of what they let through.
    MR_TARGET void gate_tiles(const TowerLayer& layer, int64_t n, Scratch& own) {
        const int64_t mlp = up_to(s_.mlp, kPair), steps = s_.hidden / kTileDepth;
        Half *const h = own.normed.halves(), *const gated = own.gated.halves();
        all_is_written();
        each_block(n, 2 * mlp, [&](int64_t at, int64_t panel, auto is_pair) MR_TARGET {
            alignas(64) float sums[kPair * kPair];
            multiply<is_pair()>(h + at * s_.hidden, s_.hidden, layer.gate_and_up.tiles + panel * steps * kTileNumbers, steps,
                                {sums, kPair, false});
            const int64_t column = panel / 2 * kTile;
            const VecF gate_bias = load_float(layer.gate_bias + column), up_bias = load_float(layer.up_bias + column);
            for (int64_t i = 0; i < (is_pair() ? kPair : kTile); ++i) {
                const VecF gate = load_float(sums + i * kPair) + gate_bias, up = load_float(sums + i * kPair + kTile) + up_bias;
                narrow_to(gate_with(gate, up), gated + (at + i) * mlp + column);
            }
        });
    }

    MR_TARGET void gate_packed(const TowerLayer& layer, int64_t n, Scratch& own) {
        const int64_t mlp = blocks(s_.mlp);
        const uint8_t *const gates = layer.gate_and_up.packed, *const ups = gates + packed_bytes(s_.hidden, mlp);
        for (int64_t b = 0; b * kPanel < mlp; ++b) {
            float* const gate = own.gated.sums_from(own.normed, gates, b, n, s_.hidden, 0);
            const float* const up = own.gated.sums_from(own.normed, ups, b, n, s_.hidden, 1);
            for (int64_t i = 0; i < n * kTile; ++i) {
                for (int64_t j = i * kPanel, column = b * kPanel; j < (i + 1) * kPanel; j += MR_LANES, column += MR_LANES) {
                    save(gate_with(load_float(gate + j) + load_float(layer.gate_bias + column), load_float(up + j) + load_float(layer.up_bias + column)),
                         gate + j);
                }
                own.gated.put_block(i, b, s_.mlp, gate + i * kPanel);
            }
        }
    }

    void attend(const TowerLayer& layer) {
        struct Item {
            int64_t start, end, first, last;  // keys, and queries
        };
        std::vector<Item> items;
        const auto& starts = image_->window_starts;
        if (layer.is_full) {
            for (int64_t q = 0; q < n_patches_; q += kQueries) {
                items.push_back({0, n_patches_, q, std::min(q + kQueries, n_patches_)});
            }
        } else {
            for (size_t i = 0; i + 1 < starts.size(); ++i) items.push_back({starts[i], starts[i + 1], starts[i], starts[i + 1]});
        }
        crew_->each(static_cast<int64_t>(items.size()) * s_.heads, [&](int64_t index, int who) MR_TARGET {
            const Item& item = items[static_cast<size_t>(index / s_.heads)];
            Attention& own = scratch_[static_cast<size_t>(who)]->attention;
            const int64_t head = index % s_.heads, n = item.end - item.start;
            configure();
            const Half* const rows = qkv_.get() + item.start * 3 * s_.hidden + head * s_.head_dim();
            pack_columns(rows + s_.hidden, 3 * s_.hidden, n, s_.head_dim(), own.keys.get());
            pack_rows(rows + 2 * s_.hidden, 3 * s_.hidden, n, s_.head_dim(), own.values.get());
            for (int64_t q = item.first; q < item.last; q += kTile) attend_tile(head, q, std::min(kTile, item.last - q), n, own);
            release();
        });
    }

    // Some queries of one head, at most a tile of them, from row `first` on, among n keys.
    MR_TARGET void attend_tile(int64_t head, int64_t first, int64_t count, int64_t n, Attention& own) {
        const int64_t dim = s_.head_dim(), width = 3 * s_.hidden, keys = up_to(n, kPair), columns = up_to(dim, kPair);
        const float scale = 1.f / std::sqrt(static_cast<float>(dim));
        float *const scores = own.scores.get(), *const sums = own.sums.get();
        Half* const weights = own.weights.get();
        product(qkv_.get() + first * width + head * dim, width, 1, own.keys.get(), dim, keys, scores, keys, false);
        VecF shares = VecF{};
        for (int64_t i = 0; i < count; ++i) shares[i] = weigh(scores + i * keys, n, keys, scale, weights + i * keys);
        product(weights, keys, 1, own.values.get(), n, columns, sums, columns, false);
        for (int64_t i = 0; i < count; ++i) {
            Half* const to = attended_.get() + (first + i) * s_.hidden + head * dim;
            for (int64_t j = 0; j < dim; j += MR_LANES) narrow_to(load_float(sums + i * columns + j) * shares[i], to + j);
        }
    }

    // Tokens of the patches that lie together, in the order of the image.
    void merge(float* out) {
        const int64_t n = n_patches_ / s_.merged, wide = s_.wide(), widest = std::max(wide, s_.out);
        const int64_t parts = std::min<int64_t>(n_token_tiles_, n_threads_);
        crew_->each(parts, [&](int64_t part, int) MR_TARGET {
            const int64_t first = part * n_token_tiles_ / parts, end = (part + 1) * n_token_tiles_ / parts;
            const int64_t row = first * kTile, tiles = end - first;
            const Inputs& tokens = *tokens_[static_cast<size_t>(part)];
            float* const y = sums_.get() + row * widest;
            configure();
            tokens.times_of(attended_.get() + row * wide, w_.first, tiles, wide, wide, y, false);
            for (int64_t i = 0; i < tiles * kTile; ++i) {
                for (int64_t j = 0; j < wide; j += MR_LANES) save(gelu(load_float(y + i * wide + j) + load_float(w_.first_bias + j)), tokens.line() + j);
                tokens.put(i, wide);
            }
            tokens.times(w_.second, tiles, wide, s_.out, y, false);
            release();
            for (int64_t i = row; i < std::min(n, end * kTile); ++i) {
                float* const to = out + image_->order[static_cast<size_t>(i * s_.merged)] / s_.merged * s_.out;
                const float* const from = y + (i - row) * s_.out;
                for (int64_t j = 0; j < s_.out; j += MR_LANES) save(load_float(from + j) + load_float(w_.second_bias + j), to + j);
            }
        });
    }

    const TowerWeights& w_;
    const TowerShape& s_;
    const TowerImage* image_ = nullptr;
    Crew* crew_ = nullptr;
    int64_t n_patches_;
    int n_threads_;
    int64_t n_tiles_;
    Parts parts_;
    int64_t n_token_tiles_;
    Numbers<float> residual_;
    Numbers<Half> qkv_, attended_;  // the patches' last norms, too, are where they attended
    std::vector<std::unique_ptr<Inputs>> tokens_;
    Numbers<float> sums_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
};

inline std::unique_ptr<TowerRoom> make_room(const TowerWeights& weights, int64_t n_patches, int n_threads) {
    return std::make_unique<Workshop>(weights, n_patches, n_threads);
}
