#include "mask.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace medreasoner {
namespace {

// Where the samples of one output axis lie in the input: between `low` and `high`, `weight` of the way.
struct Sample {
    int64_t low, high;
    float weight;
};

std::vector<Sample> sample_axis(double crop, int64_t size) {
    const auto last = static_cast<int64_t>(std::ceil(crop)) - 1;
    std::vector<Sample> samples(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
        const double at = std::max((static_cast<double>(i) + 0.5) * crop / static_cast<double>(size) - 0.5, 0.0);
        const int64_t low = std::min(static_cast<int64_t>(at), last);
        samples[static_cast<size_t>(i)] = {low, std::min(low + 1, last), static_cast<float>(at - static_cast<double>(low))};
    }
    return samples;
}

enum class Kind : uint8_t { outside, inside, mixed };

// Output columns between the same two input samples.
struct Cell {
    int64_t from, to, low, high;
};

// Neighbouring cells of one kind.
struct Span {
    size_t first, end;
    Kind kind;
};

// How output columns lie between input samples.
struct Columns {
    std::vector<Cell> cells;
    std::vector<float> weights;

    explicit Columns(const std::vector<Sample>& samples) {
        for (size_t x = 0; x < samples.size(); ++x) {
            const auto at = static_cast<int64_t>(x);
            if (x == 0 || samples[x].low != samples[x - 1].low) cells.push_back({at, at, samples[x].low, samples[x].high});
            cells.back().to = at + 1;
            weights.push_back(samples[x].weight);
        }
    }
};

}  // namespace

// Between four input samples that agree, bilinear interpolation cannot cross the threshold: only the cells that the
// outline crosses are interpolated, the rest is filled.
class BandOfRows {
public:
    BandOfRows(const Columns& columns, float threshold) : columns_(&columns), threshold_(threshold) {
#if defined(__x86_64__)
        if (simd_level() != SimdLevel::baseline) cross_ = cross_avx2;
#endif
    }

    void enter(const float* top, const float* bottom) {
        top_ = top;
        bottom_ = bottom;
        spans_.clear();
        for (size_t i = 0; i < columns_->cells.size(); ++i) {
            const Kind kind = classify(columns_->cells[i]);
            if (!spans_.empty() && spans_.back().kind == kind) {
                spans_.back().end = i + 1;
            } else {
                spans_.push_back({i, i + 1, kind});
            }
        }
    }

    void write(float weight, uint8_t* out) const {
        for (const Span& span : spans_) {
            if (span.kind == Kind::mixed) {
                cross_(*this, span, weight, out);
            } else {
                std::memset(out + from(span), span.kind == Kind::inside, static_cast<size_t>(to(span) - from(span)));
            }
        }
    }

    // Adds what is the same in all rows of the band.
    void count_whole(uint8_t* out) const {
        for (const Span& span : spans_) {
            if (span.kind == Kind::inside) add_one(out + from(span), to(span) - from(span));
        }
    }

    void count_mixed(float weight, uint8_t* out) const {
        for (const Span& span : spans_) {
            if (span.kind == Kind::mixed) interpolate<add>(span, weight, out);
        }
    }

private:
    static void add_one(uint8_t* to, int64_t n) {  // a byte may lie anywhere, so the loop knows nothing but its own
        for (int64_t i = 0; i < n; ++i) ++to[i];
    }

    int64_t from(const Span& span) const { return columns_->cells[span.first].from; }
    int64_t to(const Span& span) const { return columns_->cells[span.end - 1].to; }

    Kind classify(const Cell& cell) const {
        const int above = (top_[cell.low] > threshold_) + (top_[cell.high] > threshold_) +
                          (bottom_[cell.low] > threshold_) + (bottom_[cell.high] > threshold_);
        return above == 4 ? Kind::inside : above == 0 ? Kind::outside : Kind::mixed;
    }

    using Cross = void (*)(float left, float right, const float* weights, int64_t n, float threshold, uint8_t* out);

    // Loops of their own, with nothing that a byte could lie in: so that the compiler makes vectors of them.
    static void put(float left, float right, const float* __restrict weights, int64_t n, float threshold,
                    uint8_t* __restrict out) {
        for (int64_t i = 0; i < n; ++i) out[i] = left * (1 - weights[i]) + right * weights[i] > threshold;
    }
    static void add(float left, float right, const float* __restrict weights, int64_t n, float threshold,
                    uint8_t* __restrict out) {
        for (int64_t i = 0; i < n; ++i) {
            out[i] = static_cast<uint8_t>(out[i] + (left * (1 - weights[i]) + right * weights[i] > threshold));
        }
    }

    template <Cross cross>
    void interpolate(const Span& span, float weight, uint8_t* out) const {
        for (size_t i = span.first; i < span.end; ++i) {
            const Cell& cell = columns_->cells[i];
            const float left = top_[cell.low] * (1 - weight) + bottom_[cell.low] * weight;
            const float right = top_[cell.high] * (1 - weight) + bottom_[cell.high] * weight;
            cross(left, right, columns_->weights.data() + cell.from, cell.to - cell.from, threshold_, out + cell.from);
        }
    }

    static void cross(const BandOfRows& band, const Span& span, float weight, uint8_t* out) {
        band.interpolate<put>(span, weight, out);
    }

#if defined(__x86_64__)
    // Eight columns at a time, the last ones once more if need be. Without fused products, which would move the outline.
    __attribute__((target("avx2"))) static void cross_avx2(const BandOfRows& band, const Span& span, float weight,
                                                           uint8_t* out) {
        const __m256 one = _mm256_set1_ps(1.f), threshold = _mm256_set1_ps(band.threshold_);
        for (size_t i = span.first; i < span.end; ++i) {
            const Cell& cell = band.columns_->cells[i];
            const float left = band.top_[cell.low] * (1 - weight) + band.bottom_[cell.low] * weight;
            const float right = band.top_[cell.high] * (1 - weight) + band.bottom_[cell.high] * weight;
            const float* weights = band.columns_->weights.data() + cell.from;
            const int64_t n = cell.to - cell.from;
            if (n < 8) {
                put(left, right, weights, n, band.threshold_, out + cell.from);
                continue;
            }
            const __m256 from = _mm256_set1_ps(left), to = _mm256_set1_ps(right);
            for (int64_t x = 0; x < n; x += 8) {
                const int64_t at = std::min(x, n - 8);
                const __m256 share = _mm256_loadu_ps(weights + at);
                const __m256 value = _mm256_add_ps(_mm256_mul_ps(from, _mm256_sub_ps(one, share)), _mm256_mul_ps(to, share));
                const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_GT_OQ));
                const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(above), _mm256_extracti128_si256(above, 1));
                const __m128i bytes = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
                _mm_storel_epi64(reinterpret_cast<__m128i*>(out + cell.from + at), bytes);
            }
        }
    }
#endif

    const Columns* columns_;
    float threshold_;
    void (*cross_)(const BandOfRows&, const Span&, float, uint8_t*) = cross;
    const float* top_ = nullptr;
    const float* bottom_ = nullptr;
    std::vector<Span> spans_;
};

void mask_from_logits(const float* logits, int64_t logits_width, double crop_height, double crop_width, float threshold,
                      int64_t height, int64_t width, uint8_t* out) {
    const std::vector<Sample> rows = sample_axis(crop_height, height);
    const Columns columns(sample_axis(crop_width, width));
    BandOfRows band(columns, threshold);
    int64_t entered = -1;
    for (int64_t y = 0; y < height; ++y) {
        const Sample& row = rows[static_cast<size_t>(y)];
        if (row.low != entered) band.enter(logits + row.low * logits_width, logits + row.high * logits_width);
        entered = row.low;
        band.write(row.weight, out + y * width);
    }
}

namespace {

constexpr int64_t kPixelsOfAThread = 1 << 20;  // at least: fewer are filled sooner than a thread wakes

// Calls work(first, end) for parts of the rows, in up to n_threads.
template <class Work>
void share_rows(int64_t height, int64_t width, int n_threads, Work work) {
    const int64_t n = std::max<int64_t>(1, std::min<int64_t>(n_threads, height * width / kPixelsOfAThread));
    std::vector<std::future<void>> others;
    for (int64_t i = 1; i < n; ++i) {
        others.push_back(std::async(std::launch::async, work, height * i / n, height * (i + 1) / n));
    }
    work(int64_t{0}, height / n);
    for (auto& other : others) other.get();
}

}  // namespace

void count_masks(const float* logits, int64_t n, int64_t logits_height, int64_t logits_width, double crop_height,
                 double crop_width, float threshold, int64_t height, int64_t width, uint8_t* out, int n_threads) {
    const std::vector<Sample> rows = sample_axis(crop_height, height);
    const Columns columns(sample_axis(crop_width, width));
    share_rows(height, width, n_threads, [&](int64_t first, int64_t end) {
        std::vector<BandOfRows> bands(static_cast<size_t>(n), BandOfRows(columns, threshold));
        std::vector<uint8_t> whole(static_cast<size_t>(width));
        int64_t entered = -1;
        for (int64_t y = first; y < end; ++y) {
            const Sample& row = rows[static_cast<size_t>(y)];
            if (row.low != entered) {
                std::fill(whole.begin(), whole.end(), uint8_t{0});
                const float* own = logits;
                for (BandOfRows& band : bands) {
                    band.enter(own + row.low * logits_width, own + row.high * logits_width);
                    band.count_whole(whole.data());
                    own += logits_height * logits_width;
                }
            }
            entered = row.low;
            std::copy(whole.begin(), whole.end(), out + y * width);
            for (const BandOfRows& band : bands) band.count_mixed(row.weight, out + y * width);
        }
    });
}

namespace {

constexpr int64_t kStep = 32;  // bytes that are looked at together

bool any_of_step(const uint8_t* bytes) {
    uint64_t words[kStep / 8];
    std::memcpy(words, bytes, kStep);
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// Index of the first set byte, n if there is none.
int64_t first_set(const uint8_t* bytes, int64_t n) {
    int64_t i = 0;
    while (i + kStep <= n && !any_of_step(bytes + i)) i += kStep;
    while (i < n && bytes[i] == 0) ++i;
    return i;
}

// Index behind the last set byte, 0 if there is none.
int64_t end_of_set(const uint8_t* bytes, int64_t n) {
    while (n >= kStep && !any_of_step(bytes + n - kStep)) n -= kStep;
    while (n > 0 && bytes[n - 1] == 0) --n;
    return n;
}

}  // namespace

bool mask_box(const uint8_t* mask, int64_t height, int64_t width, Box* box) {
    const int64_t first = first_set(mask, height * width);
    if (first == height * width) return false;
    *box = {width, first / width, 0, (end_of_set(mask, height * width) - 1) / width + 1};
    for (int64_t y = box->y1; y < box->y2; ++y) {  // only what lies outside the box so far can widen it
        const uint8_t* row = mask + y * width;
        box->x1 = first_set(row, box->x1);
        box->x2 += end_of_set(row + box->x2, width - box->x2);
    }
    return true;
}

}  // namespace medreasoner
