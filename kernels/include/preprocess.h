// From 8-bit pixels to the float input of a vision tower: resize, pad, normalise and, for the reasoner, cut into patches.
#pragma once

#include <cstdint>

#include "resize.h"

namespace medreasoner {

struct Normalisation {
    float mean[3];
    float std[3];
};

// The image is resized to content_height x content_width and stands at the top left of height x width.
struct Canvas {
    int64_t height;
    int64_t width;
    int64_t content_height;
    int64_t content_width;
};

// out (n_patches, 3, patch, patch), patches in the order (block row, block column, row in block, column in block) with
// blocks of merge x merge patches. Padding is black before normalising. height and width: multiples of patch * merge.
void preprocess_patches(const ImageView& image, const Canvas& canvas, const Normalisation& norm, int64_t patch,
                        int64_t merge, float* out);

// out (3, height, width); padding is 0 after normalising.
void preprocess_planes(const ImageView& image, const Canvas& canvas, const Normalisation& norm, float* out);

}  // namespace medreasoner
