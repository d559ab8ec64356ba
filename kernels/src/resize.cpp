#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "simd.h"

namespace medreasoner {

// 8 bits for the pixel and 2 for overshoot leave 22 of 32 for the weight.
constexpr int kPrecision = 22;
constexpr int32_t kHalf = 1 << (kPrecision - 1);

// Weights of the input positions first .. first + count - 1 for one output position.
struct Taps {
    int64_t first;
    int count;
    const int32_t* weights;
};

static inline uint8_t clip(int32_t value) { return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value); }

}  // namespace medreasoner

#define MR_BODY "resize_simd.h"
#include "for_each_level.h"

namespace medreasoner {
namespace {

// Keys 1981, equation 8 with a = -0.5.
double cubic(double x) {
    x = std::abs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return 0.0;
}

class Filter {
public:
    Filter(int64_t in_size, int64_t out_size) {
        const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
        const double stretch = std::max(scale, 1.0);  // shrinking widens the kernel, which is the antialiasing
        const double support = 2.0 * stretch;
        std::vector<double> weights;
        for (int64_t i = 0; i < out_size; ++i) {
            const double center = (static_cast<double>(i) + 0.5) * scale;
            const auto first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
            const auto last = std::min(static_cast<int64_t>(center + support + 0.5), in_size);
            weights.clear();
            double total = 0.0;
            for (int64_t x = first; x < last; ++x) {
                weights.push_back(cubic((static_cast<double>(x) - center + 0.5) * (1.0 / stretch)));
                total += weights.back();
            }
            starts_.push_back(weights_.size());
            firsts_.push_back(first);
            for (const double weight : weights) {
                const double fixed = weight / total * (1 << kPrecision);
                weights_.push_back(static_cast<int32_t>(fixed + (fixed < 0 ? -0.5 : 0.5)));
            }
        }
        starts_.push_back(weights_.size());
    }

    Taps at(int64_t i) const {
        const auto k = static_cast<size_t>(i);
        return {firsts_[k], static_cast<int>(starts_[k + 1] - starts_[k]), weights_.data() + starts_[k]};
    }

private:
    std::vector<size_t> starts_;
    std::vector<int64_t> firsts_;
    std::vector<int32_t> weights_;
};

constexpr int64_t kBand = 16;  // rows that the horizontal pass turns on their side at once

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// 16 x 16 bytes: out[x * out_stride + y] = in[y * in_stride + x]. Four rounds of interleaving with the row 8 further on.
void transpose16(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
    Bytes16 a[16], b[16];
    for (int y = 0; y < 16; ++y) std::memcpy(&a[y], in + y * in_stride, 16);
    for (int round = 0; round < 4; ++round) {
        for (int y = 0; y < 8; ++y) {
            b[2 * y] = __builtin_shufflevector(a[y], a[y + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * y + 1] =
                __builtin_shufflevector(a[y], a[y + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        std::copy(b, b + 16, a);
    }
    for (int x = 0; x < 16; ++x) std::memcpy(out + x * out_stride, &a[x], 16);
}

// (rows <= 16, n) -> (n, 16)
void turn_in(const uint8_t* in, int64_t rows, int64_t n, uint8_t* out) {
    int64_t x = 0;
    if (rows == kBand) {
        for (; x + 16 <= n; x += 16) transpose16(in + x, n, out + x * kBand, kBand);
    }
    for (; x < n; ++x) {
        for (int64_t y = 0; y < rows; ++y) out[x * kBand + y] = in[y * n + x];
    }
}

// (n, 16) -> (rows <= 16, n)
void turn_out(const uint8_t* in, int64_t rows, int64_t n, uint8_t* out) {
    int64_t x = 0;
    if (rows == kBand) {
        for (; x + 16 <= n; x += 16) transpose16(in + x * kBand, kBand, out + x, n);
    }
    for (; x < n; ++x) {
        for (int64_t y = 0; y < rows; ++y) out[y * n + x] = in[x * kBand + y];
    }
}

// A band of 16 rows is laid on its side, so that a pixel is a line of 16 * channels bytes and the horizontal pass is
// the same weighted sum of lines as the vertical one, whatever the number of taps.
void resize_width(const ImageView& image, int64_t width, const RowSink& sink) {
    const Filter filter(image.width, width);
    const auto combine = MR_DISPATCH(combine);
    const int64_t line = kBand * image.channels;
    const int64_t in_row = image.width * image.channels, out_row = width * image.channels;
    std::vector<uint8_t> turned(static_cast<size_t>(in_row * kBand)), sums(static_cast<size_t>(out_row * kBand));
    std::vector<uint8_t> band(sums.size());
    for (int64_t y = 0; y < image.height; y += kBand) {
        const int64_t rows = std::min(kBand, image.height - y);
        turn_in(image.data + y * in_row, rows, in_row, turned.data());
        for (int64_t x = 0; x < width; ++x) {
            const Taps taps = filter.at(x);
            combine(turned.data() + taps.first * line, line, taps, line, sums.data() + x * line);
        }
        turn_out(sums.data(), rows, out_row, band.data());
        for (int64_t i = 0; i < rows; ++i) sink(y + i, band.data() + i * out_row);
    }
}

void resize_height(const ImageView& image, int64_t height, const RowSink& sink) {
    const Filter filter(image.height, height);
    const auto combine = MR_DISPATCH(combine);
    const int64_t stride = image.width * image.channels;
    std::vector<uint8_t> row(static_cast<size_t>(stride));
    for (int64_t y = 0; y < height; ++y) {
        const Taps taps = filter.at(y);
        combine(image.data + taps.first * stride, stride, taps, stride, row.data());
        sink(y, row.data());
    }
}

// Keeps the rows of the first of two passes.
class Between {
public:
    Between(int64_t height, int64_t width, int64_t channels)
        : bytes_(static_cast<size_t>(height * width * channels)), view_{bytes_.data(), height, width, channels} {}

    RowSink sink() {
        const int64_t stride = view_.width * view_.channels;
        return [this, stride](int64_t y, const uint8_t* row) { std::copy(row, row + stride, bytes_.data() + y * stride); };
    }

    const ImageView& view() const { return view_; }

private:
    std::vector<uint8_t> bytes_;
    ImageView view_;
};

}  // namespace

void resize_rows(const ImageView& image, int64_t height, int64_t width, const RowSink& sink) {
    const int64_t fewer_rows = image.height - height, fewer_columns = image.width - width;
    if (fewer_columns == 0 && fewer_rows == 0) {
        for (int64_t y = 0; y < height; ++y) sink(y, image.data + y * width * image.channels);
    } else if (fewer_columns == 0) {
        resize_height(image, height, sink);
    } else if (fewer_rows == 0) {
        resize_width(image, width, sink);
    } else if (fewer_rows > 0 && fewer_rows > 2 * fewer_columns) {
        Between between(height, image.width, image.channels);
        resize_height(image, height, between.sink());
        resize_width(between.view(), width, sink);
    } else {
        Between between(image.height, width, image.channels);
        resize_width(image, width, between.sink());
        resize_height(between.view(), height, sink);
    }
}

}  // namespace medreasoner
