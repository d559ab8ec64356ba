#include "window.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace medreasoner {
namespace {

// Fraction of the output range, in [0, 1], for a rescaled value.
double voi_fraction(double x, const Window& w) {
    switch (w.function) {
        case VoiFunction::linear: {  // PS3.3 C.11.2.1.2.1; the divisor is never 0 between the two bounds
            const double center = w.center - 0.5, range = w.width - 1.0;
            if (x <= center - range / 2) return 0.0;
            if (x > center + range / 2) return 1.0;
            return (x - center) / range + 0.5;
        }
        case VoiFunction::linear_exact:  // PS3.3 C.11.2.1.3.2
            if (x <= w.center - w.width / 2) return 0.0;
            if (x > w.center + w.width / 2) return 1.0;
            return (x - w.center) / w.width + 0.5;
        case VoiFunction::sigmoid:  // PS3.3 C.11.2.1.3.1
            return 1.0 / (1.0 + std::exp(-4.0 * (x - w.center) / w.width));
    }
    return 0.0;
}

template <class T>
uint8_t window_value(T value, const Window& w) {
    const double fraction = voi_fraction(static_cast<double>(value) * w.slope + w.intercept, w);
    if (std::isnan(fraction)) return 0;
    // Where the width is near the centre's last bit, the bounds are rounded and a fraction may lie outside of them.
    const auto level = static_cast<uint8_t>(std::clamp(fraction, 0.0, 1.0) * 255.0 + 0.5);
    return w.invert ? static_cast<uint8_t>(255 - level) : level;
}

// Computes each stored value that occurs between the extremes once; pays where there are more pixels than such values.
template <class T>
bool window_by_table(const T* values, int64_t n, const Window& window, uint8_t* out) {
    T low = values[0], high = values[0];  // a loop that the compiler vectorises, unlike std::minmax_element
    for (int64_t i = 1; i < n; ++i) {
        low = std::min(low, values[i]);
        high = std::max(high, values[i]);
    }
    const int64_t base = low, size = int64_t{high} - base + 1;
    if (size > n) return false;
    std::vector<uint8_t> table(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) table[static_cast<size_t>(i)] = window_value(base + i, window);
    for (int64_t i = 0; i < n; ++i) out[i] = table[static_cast<size_t>(values[i] - base)];
    return true;
}

}  // namespace

template <class T>
void window_u8(const T* values, int64_t n, const Window& window, uint8_t* out) {
    if constexpr (std::is_integral_v<T>) {
        if (n > 0 && window_by_table(values, n, window, out)) return;
    }
    for (int64_t i = 0; i < n; ++i) out[i] = window_value(values[i], window);
}

template void window_u8(const int16_t*, int64_t, const Window&, uint8_t*);
template void window_u8(const uint16_t*, int64_t, const Window&, uint8_t*);
template void window_u8(const int32_t*, int64_t, const Window&, uint8_t*);
template void window_u8(const float*, int64_t, const Window&, uint8_t*);

}  // namespace medreasoner
