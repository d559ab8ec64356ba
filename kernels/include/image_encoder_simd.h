// The body of image_encoder.cpp, behind tiles_simd.h.

#include "inputs_simd.h"
#include "parts_simd.h"

constexpr float kNeckEpsilon = 1e-6f;  // in SAM's code, not in a configuration

// What a thread needs.
struct Scratch {
    Scratch(const EncoderShape& s, bool is_packed, int64_t rows, int64_t most_keys, int64_t widest_window)
        : halves(rows * up_to(std::max(s.patch_dim(), s.hidden), kTileDepth)),
          normed(is_packed, rows, s.hidden),
          wide(is_packed, rows, s.mlp),
          floats(std::max(rows, up_to(s.grid, kTile)) * s.out),
          copied((up_to(most_keys, kTile) + 1) * 3 * s.head_dim()),
          keys(up_to(most_keys, kPair) * up_to(s.head_dim(), kTileDepth)),
          values(up_to(most_keys, kTileDepth) * up_to(s.head_dim(), kPair)),
          scores(kTile * up_to(most_keys, kPair)),
          weights(kTile * up_to(most_keys, kPair)),
          sums(kTile * up_to(s.head_dim(), kPair)),
          offsets(kTile * 2 * distances(widest_window) + kTile) {}

    Numbers<Half> halves;
    Inputs normed, wide;
    Numbers<float> floats;
    Numbers<Half> copied, keys, values;  // of one head and window
    Numbers<float> scores;
    Numbers<Half> weights;
    Numbers<float> sums, offsets;
};

// The room for one image, and what is done in it.
class Reader final : public EncoderRoom {
   public:
    Reader(const EncoderWeights& weights, int n_threads)
        : w_(weights),
          s_(weights.shape),
          n_threads_(n_threads),
          parts_(s_.places() / kTile, n_threads),
          residual_(s_.places() * s_.hidden),
          qkv_((s_.places() + 1) * 3 * s_.hidden),  // a head's last tile reads beyond it
          attended_(s_.places() * s_.hidden),
          framed_((s_.grid + 2) * (s_.grid + 2) * s_.out) {
        int64_t most_keys = 0, widest = 0;
        for (const EncoderLayer& layer : w_.layers) {
            widest = std::max(widest, layer.window);
            most_keys = std::max(most_keys, layer.window * layer.window);
        }
        for (int i = 0; i < n_threads; ++i) scratch_.push_back(std::make_unique<Scratch>(s_, w_.is_packed, parts_.most_rows(), most_keys, widest));
    }

    int n_threads() const override { return n_threads_; }

    void run(const float* pixels, Crew& crew, float* out) override {
        crew_ = &crew;
        for (size_t i = 0; i < w_.layers.size(); ++i) {
            each_part([&](int64_t first, int64_t n, Scratch& own) MR_TARGET {
                if (i == 0) read_patches(pixels, first, n, own);
                if (i > 0) finish_layer(w_.layers[i - 1], first, n, own);
                begin_layer(w_.layers[i], i > 0 ? w_.layers[i - 1].down_bias : nullptr, first, n, own);
            });
            attend(w_.layers[i]);
        }
        each_part([&](int64_t first, int64_t n, Scratch& own) MR_TARGET {
            finish_layer(w_.layers.back(), first, n, own);
            narrow_places(w_.layers.back().down_bias, first, n, own);
        });
        look_around(out);
    }

   private:
    Scratch& scratch(int who) const { return *scratch_[static_cast<size_t>(who)]; }

    // Calls work(first tile, tiles, scratch) for parts of the places.
    template <class Work>
    void each_part(const Work& work) {
        parts_.each(*crew_, [&](int64_t first, int64_t n, int who) MR_TARGET { work(first, n, scratch(who)); });
    }

    float* row(int64_t tile) const { return residual_.get() + tile * kTile * s_.hidden; }

    MR_TARGET void read_patches(const float* pixels, int64_t first, int64_t n, Scratch& own) {
        const int64_t width = up_to(s_.patch_dim(), kTileDepth), side = s_.side();
        for (int64_t i = 0; i < n * kTile; ++i) {
            const int64_t place = first * kTile + i;
            const float* const from = pixels + place / s_.grid * s_.patch * side + place % s_.grid * s_.patch;
            Half* to = own.halves.get() + i * width;
            std::fill(to + s_.patch_dim(), to + width, Half{0});
            for (int64_t line = 0; line < kColours * s_.patch; ++line, to += s_.patch) {
                const float* const pixel = from + (line / s_.patch * side + line % s_.patch) * side;
                int64_t j = 0;
                for (; j + MR_LANES <= s_.patch; j += MR_LANES) narrow_to(load_float(pixel + j), to + j);
                for (; j < s_.patch; ++j) to[j] = to_bfloat16(pixel[j]);
            }
        }
        float* const x = row(first);
        product(own.halves.get(), width, n, w_.patches, s_.patch_dim(), s_.hidden, x, s_.hidden, false);
        const float* const places = w_.places + first * kTile * s_.hidden;
        for (int64_t i = 0; i < n * kTile * s_.hidden; i += MR_LANES) {
            save(load_float(x + i) + load_float(w_.patches_bias + i % s_.hidden) + load_float(places + i), x + i);
        }
    }

    // What norms make of n numbers, a multiple of 16.
    MR_TARGET static VecF normed(const float* x, const ScaleAndBias& norm, int64_t j, float mean, float factor) {
        return (load_float(x + j) - mean) * factor * load_float(norm.scale + j) + load_float(norm.bias + j);
    }

    MR_TARGET void add_bias(float* x, const float* bias) const {
        for (int64_t j = 0; j < s_.hidden; j += MR_LANES) save(load_float(x + j) + load_float(bias + j), x + j);
    }

    // Adds a bias to the residual, if there is one, and puts its norm.
    MR_TARGET void normalise_rows(int64_t first, int64_t n, const float* bias, const ScaleAndBias& norm, const Inputs& to) {
        for (int64_t i = 0; i < n * kTile; ++i) {
            float* const x = row(first) + i * s_.hidden;
            if (bias) add_bias(x, bias);
            const auto [mean, factor] = mean_and_factor(x, s_.hidden, s_.epsilon);
            for (int64_t j = 0; j < s_.hidden; j += MR_LANES) save(normed(x, norm, j, mean, factor), to.line() + j);
            to.put(i, s_.hidden);
        }
    }

    // to (n * 16, width) = (n * 16, hidden) h @ w + bias, or gelu of that.
    template <bool bends>
    MR_TARGET void widen(const Half* h, int64_t n, const uint16_t* w, const float* bias, int64_t width, Half* to) {
        const int64_t steps = s_.hidden / kTileDepth;
        all_is_written();
        each_block(n, width, [&](int64_t at, int64_t panel, auto is_pair) MR_TARGET {
            alignas(64) float sums[kPair * kPair];
            multiply<is_pair()>(h + at * s_.hidden, s_.hidden, w + panel * steps * kTileNumbers, steps, {sums, kPair, false});
            for (int64_t half = 0; half < kPair; half += kTile) {
                const int64_t column = panel * kTile + half;
                const VecF own = load_float(bias + column);
                for (int64_t i = 0; i < (is_pair() ? kPair : kTile); ++i) {
                    const VecF v = load_float(sums + i * kPair + half) + own;
                    narrow_to(bends ? gelu(v) : v, to + (at + i) * width + column);
                }
            }
        });
    }

    MR_TARGET void begin_layer(const EncoderLayer& layer, const float* bias, int64_t first, int64_t n, Scratch& own) {
        normalise_rows(first, n, bias, layer.attention_norm, own.normed);
        const int64_t width = 3 * s_.hidden;
        Half* const to = qkv_.get() + first * kTile * width;
        if (!w_.is_packed) return widen<false>(own.normed.halves(), n, layer.qkv.tiles, layer.qkv_bias, width, to);
        each_panel<false>(layer.qkv.packed, layer.qkv_bias, width, n, own, [&](int64_t i, int64_t b, const float* from) MR_TARGET {
            for (int64_t j = 0; j < kPanel; j += MR_LANES) narrow_to(load_float(from + j), to + i * width + b * kPanel + j);
        });
    }

    MR_TARGET void finish_layer(const EncoderLayer& layer, int64_t first, int64_t n, Scratch& own) {
        own.normed.times_of(attended_.get() + first * kTile * s_.hidden, layer.output, n, s_.hidden, s_.hidden, row(first), true);
        normalise_rows(first, n, layer.output_bias, layer.mlp_norm, own.normed);
        if (w_.is_packed) {
            each_panel<true>(layer.up.packed, layer.up_bias, s_.mlp, n, own, [&](int64_t i, int64_t b, const float* from) MR_TARGET {
                own.wide.put_block(i, b, s_.mlp, from);
            });
        } else {
            widen<true>(own.normed.halves(), n, layer.up.tiles, layer.up_bias, s_.mlp, own.wide.halves());
        }
        own.wide.times(layer.down, n, s_.mlp, s_.hidden, row(first), true);
    }

    // Calls put(row, panel, 64 numbers) for what a packed matrix makes of the norms, with its bias, or gelu of that.
    template <bool bends, class Put>
    MR_TARGET void each_panel(const uint8_t* packed, const float* bias, int64_t width, int64_t n, Scratch& own, const Put& put) {
        for (int64_t b = 0; b * kPanel < width; ++b) {
            float* from = own.wide.sums_from(own.normed, packed, b, n, s_.hidden, 0);
            for (int64_t i = 0; i < n * kTile; ++i, from += kPanel) {
                for (int64_t j = 0; j < kPanel; j += MR_LANES) {
                    const VecF v = load_float(from + j) + load_float(bias + b * kPanel + j);
                    save(bends ? gelu(v) : v, from + j);
                }
                put(i, b, from);
            }
        }
    }

    // Queries, keys and values of one head, n rows; and where in the grid its first row and column are.
    struct Group {
        const Half* rows;
        int64_t stride, n, window, top, left;
    };

    void attend(const EncoderLayer& layer) {
        const int64_t window = layer.window, across = (s_.grid + window - 1) / window;
        const bool is_whole = window == s_.grid;
        const int64_t chunks = is_whole ? (s_.places() + kQueries - 1) / kQueries : across * across;
        crew_->each(chunks * s_.heads, [&](int64_t index, int who) MR_TARGET {
            const int64_t chunk = index / s_.heads, head = index % s_.heads;
            Scratch& own = scratch(who);
            Group group{qkv_.get() + head * s_.head_dim(), 3 * s_.hidden, window * window, window, 0, 0};
            int64_t key = s_.hidden, first = chunk * kQueries, end = std::min(first + kQueries, s_.places());
            if (!is_whole) {
                group.top = chunk / across * window;
                group.left = chunk % across * window;
                copy_window(layer, head, group, own.copied.get());
                group.rows = own.copied.get();
                group.stride = 3 * s_.head_dim();
                key = s_.head_dim();
                first = 0;
                end = group.n;
            }
            configure();
            pack_columns(group.rows + key, group.stride, group.n, s_.head_dim(), own.keys.get());
            pack_rows(group.rows + 2 * key, group.stride, group.n, s_.head_dim(), own.values.get());
            for (int64_t q = first; q < end; q += kTile) attend_tile(layer, head, group, q, std::min(kTile, end - q), own);
            release();
        });
    }

    // Beyond the grid there is what a place of zeros would become: SAM pads behind the norm, and masks nothing.
    MR_TARGET void copy_window(const EncoderLayer& layer, int64_t head, const Group& group, Half* to) const {
        const int64_t dim = s_.head_dim();
        for (int64_t i = 0; i < group.n; ++i) {
            const int64_t down = group.top + i / group.window, right = group.left + i % group.window;
            const bool is_there = down < s_.grid && right < s_.grid;
            for (int64_t part = 0; part < 3; ++part, to += dim) {
                const int64_t column = part * s_.hidden + head * dim;
                if (is_there) {
                    std::memcpy(to, qkv_.get() + (down * s_.grid + right) * 3 * s_.hidden + column, static_cast<size_t>(dim) * sizeof(Half));
                    continue;
                }
                for (int64_t j = 0; j < dim; j += MR_LANES) narrow_to(load_float(layer.qkv_bias + column + j), to + j);
            }
        }
    }

    // Some queries of one head, at most a tile of them, from row `first` of the group on.
    MR_TARGET void attend_tile(const EncoderLayer& layer, int64_t head, const Group& group, int64_t first, int64_t count, Scratch& own) {
        const int64_t dim = s_.head_dim(), keys = up_to(group.n, kPair), columns = up_to(dim, kPair), wide = 2 * distances(group.window);
        float *const scores = own.scores.get(), *const sums = own.sums.get(), *const offsets = own.offsets.get();
        Half* const weights = own.weights.get();
        const Half* const queries = group.rows + first * group.stride;
        product(queries, group.stride, 1, own.keys.get(), dim, keys, scores, keys, false);
        product(queries, group.stride, 1, layer.offsets, dim, wide, offsets, wide, false);
        VecF shares = VecF{};
        for (int64_t i = 0; i < count; ++i) {
            add_offsets(offsets + i * wide, group.window, first + i, scores + i * keys);
            shares[i] = weigh(scores + i * keys, group.n, keys, 1.f, weights + i * keys);
        }
        product(weights, keys, 1, own.values.get(), group.n, columns, sums, columns, false);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t down = group.top + (first + i) / group.window, right = group.left + (first + i) % group.window;
            if (down >= s_.grid || right >= s_.grid) continue;
            Half* const to = attended_.get() + (down * s_.grid + right) * s_.hidden + head * dim;
            for (int64_t j = 0; j < dim; j += MR_LANES) narrow_to(load_float(sums + i * columns + j) * shares[i], to + j);
        }
    }

    // A query's scores, scaled, and what the keys' rows and columns add.
    MR_TARGET void add_offsets(const float* offsets, int64_t window, int64_t query, float* scores) const {
        const float scale = 1.f / std::sqrt(static_cast<float>(s_.head_dim()));
        const float* const by_row = offsets + window - 1 - query / window;
        const float* const by_column = offsets + distances(window) + window - 1 - query % window;
        for (int64_t down = 0; down < window; ++down, scores += window) {
            for (int64_t right = 0; right < window; right += MR_LANES) {
                const auto there = static_cast<__mmask16>((1u << std::min<int64_t>(MR_LANES, window - right)) - 1);
                const __m512 more = _mm512_add_ps(_mm512_maskz_loadu_ps(there, by_column + right), _mm512_set1_ps(by_row[down]));
                const __m512 score = _mm512_maskz_loadu_ps(there, scores + right);
                _mm512_mask_storeu_ps(scores + right, there, _mm512_fmadd_ps(score, _mm512_set1_ps(scale), more));
            }
        }
    }

    // Places as deep as the embedding, in a frame of zeros.
    MR_TARGET void narrow_places(const float* bias, int64_t first, int64_t n, Scratch& own) {
        Half* const h = own.halves.get();
        float* const y = own.floats.get();
        for (int64_t i = 0; i < n * kTile; ++i) {
            float* const x = row(first) + i * s_.hidden;
            add_bias(x, bias);
            for (int64_t j = 0; j < s_.hidden; j += MR_LANES) narrow_to(load_float(x + j), h + i * s_.hidden + j);
        }
        product(h, s_.hidden, n, w_.narrow, s_.hidden, s_.out, y, s_.out, false);
        for (int64_t i = 0; i < n * kTile; ++i) {
            const int64_t place = first * kTile + i;
            Half* const to = framed_.get() + ((place / s_.grid + 1) * (s_.grid + 2) + place % s_.grid + 1) * s_.out;
            const auto [mean, factor] = mean_and_factor(y + i * s_.out, s_.out, kNeckEpsilon);
            for (int64_t j = 0; j < s_.out; j += MR_LANES) narrow_to(normed(y + i * s_.out, w_.narrow_norm, j, mean, factor), to + j);
        }
    }

    // The 3 x 3 neighbours of each place, row by row of the grid.
    void look_around(float* out) {
        crew_->each(s_.grid, [&](int64_t down, int who) MR_TARGET {
            float* const y = scratch(who).floats.get();
            configure();
            for (int64_t i = 0; i < 9; ++i) {
                const Half* const from = framed_.get() + ((down + i / 3) * (s_.grid + 2) + i % 3) * s_.out;
                product(from, s_.out, s_.grid / kTile, w_.neighbours[i], s_.out, s_.out, y, s_.out, i > 0);
            }
            release();
            for (int64_t right = 0; right < s_.grid; ++right) {
                float* const x = y + right * s_.out;
                const auto [mean, factor] = mean_and_factor(x, s_.out, kNeckEpsilon);
                for (int64_t j = 0; j < s_.out; j += MR_LANES) save(normed(x, w_.last_norm, j, mean, factor), x + j);
            }
            for (int64_t j = 0; j < s_.out; ++j) {
                for (int64_t right = 0; right < s_.grid; ++right) out[(j * s_.grid + down) * s_.grid + right] = y[right * s_.out + j];
            }
        });
    }

    const EncoderWeights& w_;
    const EncoderShape& s_;
    Crew* crew_ = nullptr;
    int n_threads_;
    Parts parts_;
    Numbers<float> residual_;
    Numbers<Half> qkv_, attended_, framed_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
};

inline std::unique_ptr<EncoderRoom> make_room(const EncoderWeights& weights, int n_threads) {
    return std::make_unique<Reader>(weights, n_threads);
}
