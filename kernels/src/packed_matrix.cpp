#include "packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"

namespace medreasoner {
namespace {

template <class T>
void pack_block(const T* from, int64_t cols, uint8_t* out) {
    float block[kBlockRows][kPanel], largest[kPanel] = {}, inverse[kPanel];
    for (int64_t i = 0; i < kBlockRows; ++i) {
        for (int64_t j = 0; j < kPanel; ++j) {
            block[i][j] = to_float(from[i * cols + j]);
            largest[j] = std::max(largest[j], std::fabs(block[i][j]));
        }
    }
    for (int64_t j = 0; j < kPanel; ++j) inverse[j] = largest[j] > 0 ? 127.f / largest[j] : 0.f;
    for (int64_t i = 0; i < kBlockRows; i += 4, out += 4 * kPanel) {
        for (int64_t j = 0; j < kPanel; ++j) {
            uint32_t four = 0;
            for (int64_t k = 0; k < 4; ++k) {
                // Added to 1.5 * 2^23, the nearest integer is in the last bits: 128 more of it in the last byte.
                const float shifted = block[i + k][j] * inverse[j] + (12582912.f + 128.f);
                uint32_t bits;
                std::memcpy(&bits, &shifted, sizeof bits);
                four |= (bits & 0xff) << 8 * k;
            }
            std::memcpy(out + 4 * j, &four, sizeof four);
        }
    }
    for (float& each : largest) each /= 127.f;
    std::memcpy(out, largest, sizeof largest);
}

template <class T>
void pack(const T* from, int64_t rows, int64_t cols, uint8_t* out) {
    for (int64_t j = 0; j < cols; j += kPanel) {
        for (int64_t i = 0; i < rows; i += kBlockRows, out += kBlockBytes) pack_block(from + i * cols + j, cols, out);
    }
}

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
        case Dtype::float32: return pack(static_cast<const float*>(m.data), m.rows, m.cols, out);
        case Dtype::float16: return pack(static_cast<const Float16*>(m.data), m.rows, m.cols, out);
        case Dtype::bfloat16: return pack(static_cast<const Bfloat16*>(m.data), m.rows, m.cols, out);
    }
}

}  // namespace medreasoner
