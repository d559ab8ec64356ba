#include "mask.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

enum class Cell : uint8_t { outside, inside, mixed };

// A stretch of output columns whose input cells are all of one kind.
struct Span {
    int64_t from, to;
    Cell kind;
};

}  // namespace

// Between four input samples that agree, bilinear interpolation cannot cross the threshold: only the cells that the
// outline crosses are interpolated, the rest is filled.
class BandOfRows {
public:
    BandOfRows(std::vector<Sample> columns, float threshold) : columns_(std::move(columns)), threshold_(threshold) {
        row_.resize(static_cast<size_t>(columns_.back().high) + 1);
    }

    void enter(const float* top, const float* bottom) {
        top_ = top;
        bottom_ = bottom;
        spans_.clear();
        for (size_t x = 0; x < columns_.size();) {
            const Sample& s = columns_[x];
            const size_t from = x;
            while (x < columns_.size() && columns_[x].low == s.low) ++x;
            const Cell kind = classify(s.low, s.high);
            if (!spans_.empty() && spans_.back().kind == kind) {
                spans_.back().to = static_cast<int64_t>(x);
            } else {
                spans_.push_back({static_cast<int64_t>(from), static_cast<int64_t>(x), kind});
            }
        }
    }

    void write(float weight, uint8_t* out) {
        for (const Span& span : spans_) {
            if (span.kind == Cell::mixed) {
                interpolate(span, weight, [out](int64_t x, bool is_set) { out[x] = is_set; });
            } else {
                std::memset(out + span.from, span.kind == Cell::inside, static_cast<size_t>(span.to - span.from));
            }
        }
    }

    void count(float weight, uint8_t* out) {
        for (const Span& span : spans_) {
            if (span.kind == Cell::mixed) {
                interpolate(span, weight, [out](int64_t x, bool is_set) { out[x] = static_cast<uint8_t>(out[x] + is_set); });
            } else if (span.kind == Cell::inside) {
                add_one(out + span.from, span.to - span.from);
            }
        }
    }

private:
    static void add_one(uint8_t* to, int64_t n) {  // a byte may lie anywhere, so the loop knows nothing but its own
        for (int64_t i = 0; i < n; ++i) ++to[i];
    }

    Cell classify(int64_t low, int64_t high) const {
        const int above = (top_[low] > threshold_) + (top_[high] > threshold_) + (bottom_[low] > threshold_) +
                          (bottom_[high] > threshold_);
        return above == 4 ? Cell::inside : above == 0 ? Cell::outside : Cell::mixed;
    }

    template <class Put>
    void interpolate(const Span& span, float weight, Put put) {
        const Sample* columns = columns_.data();
        for (int64_t i = columns[span.from].low; i <= columns[span.to - 1].high; ++i) {
            row_[static_cast<size_t>(i)] = top_[i] * (1 - weight) + bottom_[i] * weight;
        }
        const float* row = row_.data();
        for (int64_t x = span.from; x < span.to; ++x) {
            const Sample& s = columns[x];
            put(x, row[s.low] * (1 - s.weight) + row[s.high] * s.weight > threshold_);
        }
    }

    std::vector<Sample> columns_;
    float threshold_;
    const float* top_ = nullptr;
    const float* bottom_ = nullptr;
    std::vector<Span> spans_;
    std::vector<float> row_;
};

void mask_from_logits(const float* logits, int64_t logits_width, double crop_height, double crop_width, float threshold,
                      int64_t height, int64_t width, uint8_t* out) {
    const std::vector<Sample> rows = sample_axis(crop_height, height);
    BandOfRows band(sample_axis(crop_width, width), threshold);
    int64_t entered = -1;
    for (int64_t y = 0; y < height; ++y) {
        const Sample& row = rows[static_cast<size_t>(y)];
        if (row.low != entered) band.enter(logits + row.low * logits_width, logits + row.high * logits_width);
        entered = row.low;
        band.write(row.weight, out + y * width);
    }
}

void count_masks(const float* logits, int64_t n, int64_t logits_height, int64_t logits_width, double crop_height,
                 double crop_width, float threshold, int64_t height, int64_t width, uint8_t* out) {
    const std::vector<Sample> rows = sample_axis(crop_height, height);
    const std::vector<Sample> columns = sample_axis(crop_width, width);
    std::vector<BandOfRows> bands(static_cast<size_t>(n), BandOfRows(columns, threshold));
    int64_t entered = -1;
    for (int64_t y = 0; y < height; ++y, out += width) {
        const Sample& row = rows[static_cast<size_t>(y)];
        std::memset(out, 0, static_cast<size_t>(width));
        for (int64_t i = 0; i < n; ++i) {
            const float* own = logits + i * logits_height * logits_width;
            if (row.low != entered) bands[static_cast<size_t>(i)].enter(own + row.low * logits_width, own + row.high * logits_width);
            bands[static_cast<size_t>(i)].count(row.weight, out);
        }
        entered = row.low;
    }
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
