// The body of vision_tower.cpp: MR_LANES is 16, and every function carries MR_TARGET.

using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t kPair = 2 * kTile;      // rows, and columns, of a block of four tiles
constexpr int64_t kMostTilesAtOnce = 6;   // of rows: with what is worked out between they must fit the second cache
constexpr int64_t kQueries = 12 * kTile;  // that share one packing of keys and values

MR_TARGET inline void configure() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // bytes
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
}

// GCC's tile loads do not say that they read memory.
MR_TARGET inline void all_is_written() { __asm__ volatile("" ::: "memory"); }

MR_TARGET inline void narrow_to(VecF v, Half* to) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &narrow, sizeof narrow);
}

// 16 columns of two rows of a matrix, next to each other; those that are not there are 0.
template <class T>
MR_TARGET inline __m512i side_by_side(const T* from, int64_t cols, bool has_other, __mmask16 there) {
    const auto read = [&](const T* row) MR_TARGET {
        alignas(64) T numbers[kTile] = {};
        if (there == 0xffff) return load_float(row);
        for (int64_t j = 0; there >> j & 1; ++j) numbers[j] = row[j];
        return load_float(numbers);
    };
    Half both[2 * kTile] = {};
    narrow_to(read(from), both);
    if (has_other) narrow_to(read(from + cols), both + kTile);
    const __m512i one = _mm512_cvtepu16_epi32(load<__m256i>(both)), other = _mm512_cvtepu16_epi32(load<__m256i>(both + kTile));
    return _mm512_or_si512(one, _mm512_slli_epi32(other, 16));
}

template <class T>
MR_TARGET void tile(const T* from, int64_t rows, int64_t cols, int64_t stride, Half* out) {
    const int64_t filled = up_to(rows, kTileDepth);
    for (int64_t first = 0; first < cols; first += kTile, out += stride * filled * kTile) {
        const auto there = static_cast<__mmask16>((1u << std::min(kTile, cols - first)) - 1);
        for (int64_t i = 0; i < filled; i += 2) {
            const bool is_there = i < rows;
            _mm512_storeu_si512(out + i * kTile, is_there ? side_by_side(from + i * cols + first, cols, i + 1 < rows, there)
                                                          : _mm512_setzero_si512());
        }
    }
}

// Where the sums of a block of rows and columns start, and where they go.
struct Sums {
    float* at;
    int64_t stride;  // floats
    bool goes_on;    // from what stands there, instead of 0
};

// (32 or 16 rows) a @ w for two panels of 16 columns.
template <bool is_pair>
MR_TARGET inline void multiply(const Half* a, int64_t lda, const Half* w, int64_t steps, const Sums& sums) {
    const int64_t bytes = sums.stride * 4, row_bytes = lda * 2;
    float* const below = sums.at + kTile * sums.stride;
    if (sums.goes_on) {
        _tile_loadd(0, sums.at, bytes);
        _tile_loadd(1, sums.at + kTile, bytes);
        if constexpr (is_pair) {
            _tile_loadd(2, below, bytes);
            _tile_loadd(3, below + kTile, bytes);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (is_pair) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    const Half* const other = w + steps * kTileNumbers;
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, a + k * kTileDepth, row_bytes);
        _tile_loadd(6, w + k * kTileNumbers, 64);
        _tile_loadd(7, other + k * kTileNumbers, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (is_pair) {
            _tile_loadd(5, a + kTile * lda + k * kTileDepth, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums.at, bytes);
    _tile_stored(1, sums.at + kTile, bytes);
    if constexpr (is_pair) {
        _tile_stored(2, below, bytes);
        _tile_stored(3, below + kTile, bytes);
    }
}

// Calls work(row, panel, is_pair) for blocks of 32 rows (the last may have 16) and two panels; a pair of panels stays in
// the first cache for all rows.
template <class Work>
MR_TARGET inline void each_block(int64_t n_tiles, int64_t columns, const Work& work) {
    for (int64_t panel = 0; panel * kTile < columns; panel += 2) {
        int64_t row = 0;
        for (; row + kPair <= n_tiles * kTile; row += kPair) work(row, panel, std::true_type{});
        if (row < n_tiles * kTile) work(row, panel, std::false_type{});
    }
}

// y (n_tiles * 16, columns) = a @ w, or added to y.
MR_TARGET inline void product(const Half* a, int64_t lda, int64_t n_tiles, const Half* w, int64_t depth, int64_t columns,
                              float* y, int64_t stride, bool goes_on) {
    const int64_t steps = up_to(depth, kTileDepth) / kTileDepth;
    all_is_written();
    each_block(n_tiles, columns, [&](int64_t row, int64_t panel, auto is_pair) MR_TARGET {
        multiply<is_pair()>(a + row * lda, lda, w + panel * steps * kTileNumbers, steps,
                            {y + row * stride + panel * kTile, stride, goes_on});
    });
}

// To 2^-14 of it: more than is kept.
MR_TARGET inline VecF sigmoid(VecF x) { return (VecF)_mm512_rcp14_ps((__m512)(1.f + exponential(-x))); }

// The error function to 2e-7 (Abramowitz and Stegun, 7.1.26).
MR_TARGET inline VecF error_function(VecF x) {
    const VecF size = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
    const VecF poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const VecF y = 1.f - poly * exponential(-size * size);
    return x < 0.f ? -y : y;
}

// Zeroed numbers, at the start of a cache line.
template <class T>
class Numbers {
   public:
    explicit Numbers(int64_t n) : numbers_(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), kLine))) {
        std::fill(get(), get() + n, T{});
    }
    T* get() const { return numbers_.get(); }

   private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(T* numbers) const { ::operator delete(numbers, kLine); }
    };
    std::unique_ptr<T, Free> numbers_;
};

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
    Scratch(const TowerShape& s, int64_t rows, int64_t most_keys)
        : normed(rows * std::max(up_to(s.patch_dim, kTileDepth), s.hidden)),
          turned(rows * 3 * s.hidden),
          gated(rows * up_to(s.mlp, kPair)),
          attention(most_keys, s.head_dim()) {}

    Numbers<Half> normed;
    Numbers<float> turned;
    Numbers<Half> gated;
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
          n_token_tiles_(up_to(n_patches / s_.merged, kTile) / kTile),
          residual_(n_tiles_ * kTile * s_.hidden),
          qkv_((n_tiles_ + 1) * kTile * 3 * s_.hidden),  // a tile that starts at the last row reads beyond it
          attended_(std::max(n_tiles_, n_token_tiles_ * s_.merged) * kTile * s_.hidden),
          tokens_(n_token_tiles_ * kTile * s_.wide()),
          sums_(n_token_tiles_ * kTile * std::max(s_.wide(), s_.out)) {
        n_parts_ = std::min<int64_t>(n_tiles_, std::max<int64_t>(2 * n_threads, up_to(n_tiles_, kMostTilesAtOnce) / kMostTilesAtOnce));
        const int64_t rows = (n_tiles_ + n_parts_ - 1) / n_parts_ * kTile;
        for (int i = 0; i < n_threads; ++i) scratch_.push_back(std::make_unique<Scratch>(s_, rows, n_patches));
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
            normalise_rows(first, n, w_.layers.back().down_bias, w_.last_norm, attended_.get() + first * kTile * s_.hidden);
        });
        merge(out);
    }

   private:
    // Calls work(first tile, tiles, scratch) for parts of the rows that are nearly equal.
    template <class Work>
    void each_part(const Work& work) {
        crew_->each(n_parts_, [&](int64_t part, int who) MR_TARGET {
            const int64_t first = part * n_tiles_ / n_parts_, end = (part + 1) * n_tiles_ / n_parts_;
            configure();
            work(first, end - first, *scratch_[static_cast<size_t>(who)]);
            _tile_release();
        });
    }

    float* row(int64_t tile) const { return residual_.get() + tile * kTile * s_.hidden; }

    MR_TARGET void read_patches(int64_t first, int64_t n, Scratch& own) {
        const int64_t width = up_to(s_.patch_dim, kTileDepth);
        for (int64_t i = 0; i < n * kTile; ++i) {
            Half* const to = own.normed.get() + i * width;
            const int64_t place = first * kTile + i;
            std::memset(to, 0, static_cast<size_t>(width) * sizeof(Half));
            if (place >= n_patches_) continue;
            const float* const from = image_->patches + image_->order[static_cast<size_t>(place)] * s_.patch_dim;
            int64_t j = 0;
            for (; j + MR_LANES <= s_.patch_dim; j += MR_LANES) narrow_to(load_float(from + j), to + j);
            for (; j < s_.patch_dim; ++j) to[j] = to_bfloat16(from[j]);
        }
        product(own.normed.get(), width, n, w_.patches, s_.patch_dim, s_.hidden, row(first), s_.hidden, false);
    }

    // Adds a bias to the residual, and gives its norm.
    MR_TARGET void normalise_rows(int64_t first, int64_t n, const float* bias, const float* scale, Half* to) {
        for (int64_t i = 0; i < n * kTile; ++i, to += s_.hidden) {
            float* const x = row(first) + i * s_.hidden;
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
            for (int64_t j = 0; j < s_.hidden; j += MR_LANES) {
                narrow_to(load_float(x + j) * factor * load_float(scale + j), to + j);
            }
        }
    }

    MR_TARGET void begin_layer(const TowerLayer& layer, const float* bias, int64_t first, int64_t n, Scratch& own) {
        normalise_rows(first, n, bias, layer.attention_norm, own.normed.get());
        const int64_t width = 3 * s_.hidden;
        float* const turned = own.turned.get();
        product(own.normed.get(), s_.hidden, n, layer.qkv, s_.hidden, width, turned, width, false);
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
        const int64_t mlp = up_to(s_.mlp, kPair), steps = s_.hidden / kTileDepth;
        Half *const h = own.normed.get(), *const gated = own.gated.get();
        product(attended_.get() + first * kTile * s_.hidden, s_.hidden, n, layer.output, s_.hidden, s_.hidden, row(first),
                s_.hidden, true);
        normalise_rows(first, n, layer.output_bias, layer.mlp_norm, h);
        all_is_written();
        // A panel of gates, and the same one of what they let through.
        each_block(n, 2 * mlp, [&](int64_t at, int64_t panel, auto is_pair) MR_TARGET {
            alignas(64) float sums[kPair * kPair];
            multiply<is_pair()>(h + at * s_.hidden, s_.hidden, layer.gate_and_up + panel * steps * kTileNumbers, steps,
                                {sums, kPair, false});
            const int64_t column = panel / 2 * kTile;
            const VecF gate_bias = load_float(layer.gate_bias + column), up_bias = load_float(layer.up_bias + column);
            for (int64_t i = 0; i < (is_pair() ? kPair : kTile); ++i) {
                const VecF gate = load_float(sums + i * kPair) + gate_bias, up = load_float(sums + i * kPair + kTile) + up_bias;
                narrow_to(gate * sigmoid(gate) * up, gated + (at + i) * mlp + column);
            }
        });
        product(gated, mlp, n, layer.down, s_.mlp, s_.hidden, row(first), s_.hidden, true);
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
            pack_keys(head, item.start, n, own.keys.get());
            pack_values(head, item.start, n, own.values.get());
            for (int64_t q = item.first; q < item.last; q += kTile) attend_tile(head, q, std::min(kTile, item.last - q), n, own);
            _tile_release();
        });
    }

    // Keys as columns: a panel of 16 keys after the other, up to a pair.
    MR_TARGET void pack_keys(int64_t head, int64_t start, int64_t n, Half* to) const {
        const int64_t dim = s_.head_dim(), row_bytes = 3 * s_.hidden * 2;
        const Half* const from = qkv_.get() + start * 3 * s_.hidden + s_.hidden + head * dim;
        const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                                  _mm512_set1_epi32(static_cast<int>(row_bytes)));
        for (int64_t key = 0; key < up_to(n, kPair); key += kTile) {
            const int64_t there = std::clamp<int64_t>(n - key, 0, kTile);
            const auto valid = static_cast<__mmask16>((1u << there) - 1);
            for (int64_t pair = 0; pair < up_to(dim, kTileDepth) / 2; ++pair, to += 2 * kTile) {
                const __mmask16 mask = 2 * pair < dim ? valid : __mmask16{0};
                const __m512i column =
                    _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places, from + key * 3 * s_.hidden + 2 * pair, 1);
                _mm512_storeu_si512(to, column);
            }
        }
    }

    // Values as they are: two rows side by side, a panel of 16 numbers after the other, up to a pair.
    MR_TARGET void pack_values(int64_t head, int64_t start, int64_t n, Half* to) const {
        const int64_t dim = s_.head_dim(), width = 3 * s_.hidden;
        const Half* const from = qkv_.get() + start * width + 2 * s_.hidden + head * dim;
        for (int64_t column = 0; column < up_to(dim, kPair); column += kTile) {
            const __mmask16 there = column < dim ? 0xffff : 0;
            for (int64_t key = 0; key < up_to(n, kTileDepth); key += 2, to += 2 * kTile) {
                const __mmask16 one = key < n ? there : 0, other = key + 1 < n ? there : 0;
                const __m256i a = _mm256_maskz_loadu_epi16(one, from + key * width + column);
                const __m256i b = _mm256_maskz_loadu_epi16(other, from + (key + 1) * width + column);
                _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
            }
        }
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

    // to = e^(scale * (score - the largest)), 0 behind the first n; gives one over their sum.
    MR_TARGET static float weigh(float* scores, int64_t n, int64_t whole, float scale, Half* to) {
        std::fill(scores + n, scores + whole, -std::numeric_limits<float>::infinity());
        VecF most = load_float(scores), total = VecF{};
        for (int64_t j = MR_LANES; j < whole; j += MR_LANES) {
            const VecF v = load_float(scores + j);
            most = v > most ? v : most;
        }
        const float largest = largest_of(most);
        for (int64_t j = 0; j < whole; j += MR_LANES) {
            const VecF v = load_float(scores + j), weight = v == -std::numeric_limits<float>::infinity() ? VecF{} : exponential((v - largest) * scale);
            total += weight;
            narrow_to(weight, to + j);
        }
        return 1.f / sum(total);
    }

    // Tokens of the patches that lie together, in the order of the image.
    void merge(float* out) {
        const int64_t n = n_patches_ / s_.merged, wide = s_.wide(), widest = std::max(wide, s_.out);
        const int64_t parts = std::min<int64_t>(n_token_tiles_, n_threads_);
        crew_->each(parts, [&](int64_t part, int) MR_TARGET {
            const int64_t first = part * n_token_tiles_ / parts, end = (part + 1) * n_token_tiles_ / parts;
            const int64_t row = first * kTile, tiles = end - first;
            Half* const hidden = tokens_.get() + row * wide;
            float* const y = sums_.get() + row * widest;
            configure();
            product(attended_.get() + row * wide, wide, tiles, w_.first, wide, wide, y, wide, false);
            for (int64_t i = 0; i < tiles * kTile; ++i) {
                for (int64_t j = 0; j < wide; j += MR_LANES) {
                    const VecF x = load_float(y + i * wide + j) + load_float(w_.first_bias + j);
                    narrow_to(0.5f * x * (1.f + error_function(x * 0.70710678f)), hidden + i * wide + j);
                }
            }
            product(hidden, wide, tiles, w_.second, wide, s_.out, y, s_.out, false);
            _tile_release();
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
    int64_t n_tiles_, n_token_tiles_, n_parts_ = 1;
    Numbers<float> residual_;
    Numbers<Half> qkv_, attended_, tokens_;  // the patches' last norms, too, are where they attended
    Numbers<float> sums_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
};
