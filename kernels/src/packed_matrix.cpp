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

}  // namespace

void pack_matrix(const Matrix& m, uint8_t* out) {
    switch (m.dtype) {
        case Dtype::float32: return pack(static_cast<const float*>(m.data), m.rows, m.cols, out);
        case Dtype::float16: return pack(static_cast<const Float16*>(m.data), m.rows, m.cols, out);
        case Dtype::bfloat16: return pack(static_cast<const Bfloat16*>(m.data), m.rows, m.cols, out);
    }
}

}  // namespace medreasoner
