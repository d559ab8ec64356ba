#include "preprocess.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "simd.h"

namespace medreasoner {

// (pixel / 255 - mean) / std as one multiplication and one addition.
struct Affine {
    float scale[3];
    float shift[3];
};

}  // namespace medreasoner

#define MR_BODY "preprocess_simd.h"
#include "for_each_level.h"

namespace medreasoner {
namespace {

class RowNormaliser {
public:
    RowNormaliser(int64_t channels, const Normalisation& norm)
        : normalise_(channels == 1 ? MR_DISPATCH(normalise_grey) : MR_DISPATCH(normalise_rgb)) {
        for (int c = 0; c < 3; ++c) {
            affine_.scale[c] = static_cast<float>(1.0 / (255.0 * norm.std[c]));
            affine_.shift[c] = static_cast<float>(-static_cast<double>(norm.mean[c]) / norm.std[c]);
        }
    }

    void operator()(const uint8_t* row, int64_t n, float* const* planes) const { normalise_(row, n, affine_, planes); }

    float black(int c) const { return affine_.shift[c]; }

private:
    void (*normalise_)(const uint8_t*, int64_t, const Affine&, float* const*);
    Affine affine_;
};

// Collects the rows of one row of patches, then writes its patches one after the other.
class PatchWriter {
public:
    PatchWriter(int64_t width, int64_t patch, int64_t merge, float* out)
        : width_(width), patch_(patch), merge_(merge), strip_(static_cast<size_t>(3 * patch * width)), out_(out) {}

    // Row y of channel c, to be filled before `finish(y)`.
    float* row(int64_t y, int c) { return strip_.data() + (c * patch_ + y % patch_) * width_; }

    void finish(int64_t y) {
        if (y % patch_ == patch_ - 1) write_patches(y / patch_);
    }

private:
    void write_patches(int64_t row) {
        const int64_t columns = width_ / patch_, size = 3 * patch_ * patch_;
        const int64_t band = row / merge_ * merge_ * columns + row % merge_ * merge_;
        for (int64_t column = 0; column < columns; ++column) {
            const int64_t index = band + column / merge_ * merge_ * merge_ + column % merge_;
            write_patch(strip_.data() + column * patch_, out_ + index * size);
        }
    }

    void write_patch(const float* from, float* to) const {
        for (int64_t line = 0; line < 3 * patch_; ++line, from += width_, to += patch_) {
            // A constant size lets the compiler write the copy out; 14 is Qwen2.5-VL's patch.
            std::memcpy(to, from, patch_ == 14 ? 14 * sizeof(float) : static_cast<size_t>(patch_) * sizeof(float));
        }
    }

    int64_t width_, patch_, merge_;
    std::vector<float> strip_;
    float* out_;
};

}  // namespace

void preprocess_patches(const ImageView& image, const Canvas& canvas, const Normalisation& norm, int64_t patch,
                        int64_t merge, float* out) {
    const RowNormaliser normalise(image.channels, norm);
    PatchWriter writer(canvas.width, patch, merge, out);
    const auto write = [&](int64_t y, const uint8_t* row, int64_t n) {
        float* planes[] = {writer.row(y, 0), writer.row(y, 1), writer.row(y, 2)};
        if (n > 0) normalise(row, n, planes);
        for (int c = 0; c < 3; ++c) std::fill(planes[c] + n, planes[c] + canvas.width, normalise.black(c));
        writer.finish(y);
    };
    resize_rows(image, canvas.content_height, canvas.content_width,
                [&](int64_t y, const uint8_t* row) { write(y, row, canvas.content_width); });
    for (int64_t y = canvas.content_height; y < canvas.height; ++y) write(y, nullptr, 0);
}

void preprocess_planes(const ImageView& image, const Canvas& canvas, const Normalisation& norm, float* out) {
    const RowNormaliser normalise(image.channels, norm);
    const int64_t area = canvas.height * canvas.width;
    resize_rows(image, canvas.content_height, canvas.content_width, [&](int64_t y, const uint8_t* row) {
        float* line = out + y * canvas.width;
        float* planes[] = {line, line + area, line + 2 * area};
        normalise(row, canvas.content_width, planes);
        for (float* plane : planes) std::fill(plane + canvas.content_width, plane + canvas.width, 0.0f);
    });
    for (int c = 0; c < 3; ++c) {
        std::fill(out + c * area + canvas.content_height * canvas.width, out + (c + 1) * area, 0.0f);
    }
}

}  // namespace medreasoner
