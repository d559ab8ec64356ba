// Antialiased bicubic resize of 8-bit images, bit for bit as Pillow's Image.resize(BICUBIC).
#pragma once

#include <cstdint>
#include <functional>

namespace medreasoner {

struct ImageView {
    const uint8_t* data;  // row-major (height, width, channels)
    int64_t height;
    int64_t width;
    int64_t channels;  // 1 or 3
};

// Receives the finished rows (width * channels bytes) in order; the pointer is valid during the call.
using RowSink = std::function<void(int64_t y, const uint8_t* row)>;

// Separable convolution with Keys' cubic (a = -0.5), stretched by the scale when shrinking; weights in fixed point with
// 22 bits, each pass rounded to 8 bits. The horizontal pass comes first unless the height shrinks by more than twice what
// the width does, in pixels: the order of Pillow 13 (older versions always go horizontally first).
void resize_rows(const ImageView& image, int64_t height, int64_t width, const RowSink& sink);

}  // namespace medreasoner
