// Value of interest windowing of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, to 8 bits.
#pragma once

#include <cstdint>

namespace medreasoner {

enum class VoiFunction { linear, linear_exact, sigmoid };

struct Window {
    double slope;  // of the rescale, PS3.3 C.11.1.1.2
    double intercept;
    double center;
    double width;
    VoiFunction function;
    bool invert;  // MONOCHROME1
};

// Rounded to the nearest of 0 .. 255; NaN becomes 0, inverted or not. T: int16_t, uint16_t, int32_t, float.
template <class T>
void window_u8(const T* values, int64_t n, const Window& window, uint8_t* out);

}  // namespace medreasoner
