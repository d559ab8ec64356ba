// Masks in the image's own grid: from the segmenter's logits, their bounding box, and COCO run lengths.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace medreasoner {

struct Box {
    int64_t x1, y1, x2, y2;  // half-open
};

// Bilinear interpolation (half-pixel centres, edges repeated) of the top left crop_height x crop_width of the logits to
// height x width, compared with the threshold: out is 1 where greater. NaN counts as not greater.
void mask_from_logits(const float* logits, int64_t logits_width, double crop_height, double crop_width, float threshold,
                      int64_t height, int64_t width, uint8_t* out);

// The same for n <= 255 masks (n, logits_height, logits_width): out counts in how many of them a pixel is set. Up to
// n_threads share the rows of large ones.
void count_masks(const float* logits, int64_t n, int64_t logits_height, int64_t logits_width, double crop_height,
                 double crop_width, float threshold, int64_t height, int64_t width, uint8_t* out, int n_threads = 1);

// False where the mask is empty.
bool mask_box(const uint8_t* mask, int64_t height, int64_t width, Box* box);

// Lengths of the runs of 0, 1, 0, ... in column-major order, the first may be 0.
std::vector<int64_t> run_lengths(const uint8_t* mask, int64_t height, int64_t width);
// `mask` must be zero at the call; the runs must sum to height * width.
void fill_runs(const std::vector<int64_t>& runs, int64_t height, int64_t width, uint8_t* mask);

// COCO's text form of run lengths. Decoding throws std::invalid_argument unless the text is well formed and its runs sum
// to `total`.
std::string encode_counts(const std::vector<int64_t>& runs);
std::vector<int64_t> decode_counts(std::string_view text, int64_t total);

}  // namespace medreasoner
