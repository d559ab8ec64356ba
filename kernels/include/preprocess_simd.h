// One row of pixels to three rows of floats (see for_each_level.h for MR_LANES and MR_TARGET).

MR_TARGET void normalise_grey(const uint8_t* row, int64_t n, const Affine& affine, float* const* out) {
    for (int c = 0; c < 3; ++c) {
        const float scale = affine.scale[c], shift = affine.shift[c];
        float* plane = out[c];
        for (int64_t x = 0; x < n; ++x) plane[x] = static_cast<float>(row[x]) * scale + shift;
    }
}

MR_TARGET void normalise_rgb(const uint8_t* row, int64_t n, const Affine& affine, float* const* out) {
    float *red = out[0], *green = out[1], *blue = out[2];
    const Affine a = affine;  // a local copy cannot alias the output
    for (int64_t x = 0; x < n; ++x) {
        red[x] = static_cast<float>(row[3 * x]) * a.scale[0] + a.shift[0];
        green[x] = static_cast<float>(row[3 * x + 1]) * a.scale[1] + a.shift[1];
        blue[x] = static_cast<float>(row[3 * x + 2]) * a.scale[2] + a.shift[2];
    }
}
