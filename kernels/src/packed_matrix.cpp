#include "packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "floats.h"
#include "simd.h"

#define MR_BODY "packed_matrix_simd.h"
#include "for_each_level.h"

namespace medreasoner {
namespace {

// The four nibbles of the lower half, each with a nibble of zeros behind it.
uint32_t spread(uint32_t x) {
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
}

}  // namespace

bool pack_nibbles(const BlockMatrix& m, int64_t panel, uint8_t* out) {
    const int64_t blocks = m.rows / kNibbleRows;
    bool fits = true;
    for (int64_t b = 0; b < blocks; ++b, out += kNibbleBytes) {
        uint16_t scales[kPanel], zeros[kPanel / 4] = {};
        for (int64_t j = 0; j < kPanel; ++j) {
            const int64_t column = panel * kPanel + j, at = column * blocks + b;
            for (int64_t g = 0; g < kNibbleRows / 8; ++g) {
                uint32_t eight;
                std::memcpy(&eight, m.levels + at * kNibbleRows / 2 + 4 * g, sizeof eight);
                const uint32_t halves = spread(eight & 0xffff) | spread(eight >> 16) << 4;
                std::memcpy(out + (g * kPanel + j) * 4, &halves, sizeof halves);
            }
            Float16 scale;
            narrow(m.scales[at], &scale);
            scales[j] = scale.bits;
            fits = fits && (scale.bits & 0x7c00) != 0x7c00;
            const int zero = m.zeros[column * ((blocks + 1) / 2) + b / 2] >> 4 * (b % 2) & 15;
            zeros[j % 16] = static_cast<uint16_t>(zeros[j % 16] | zero << 4 * (j / 16));
        }
        std::memcpy(out + kNibbleLevels, scales, sizeof scales);
        std::memcpy(out + kNibbleLevels + kNibbleScales, zeros, sizeof zeros);
    }
    return fits;
}

void pack_matrix(const Matrix& m, uint8_t* out) {
    switch (m.dtype) {
        case Dtype::float32: return MR_DISPATCH(pack<float>)(static_cast<const float*>(m.data), m.rows, m.cols, out);
        case Dtype::float16: return MR_DISPATCH(pack<Float16>)(static_cast<const Float16*>(m.data), m.rows, m.cols, out);
        case Dtype::bfloat16: return MR_DISPATCH(pack<Bfloat16>)(static_cast<const Bfloat16*>(m.data), m.rows, m.cols, out);
    }
}

}  // namespace medreasoner
