// Rounding of matrices to eight bits, for the bodies of for_each_level.h.

#include "vectors_simd.h"

typedef int32_t VecI __attribute__((vector_size(4 * MR_LANES)));

// The nearest integers, of two the even one.
MR_TARGET inline VecI nearest(VecF v) {
#if MR_LANES == 16
    return (VecI)_mm512_cvtps_epi32((__m512)v);
#elif MR_LANES == 8
    return (VecI)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
    return (VecI)_mm_cvtps_epi32((__m128)v);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (VecI)vcvtnq_s32_f32((float32x4_t)v);
#else
    VecI found;
    for (int i = 0; i < MR_LANES; ++i) found[i] = static_cast<int32_t>(std::nearbyint(v[i]));
    return found;
#endif
}

template <class T>
MR_TARGET inline void pack_block(const T* from, int64_t cols, uint8_t* out) {
    constexpr int C = kPanel / MR_LANES;
    VecF largest[C] = {}, poison[C] = {}, inverse[C];
    for (int64_t i = 0; i < kBlockRows; ++i) {
        for (int c = 0; c < C; ++c) {
            const VecF v = load_float(from + i * cols + c * MR_LANES), size = v < 0.f ? -v : v;
            largest[c] = size > largest[c] ? size : largest[c];
            poison[c] += v * 0.f;  // not a number or infinite: the whole column must become that
        }
    }
    for (int c = 0; c < C; ++c) inverse[c] = largest[c] > 0.f ? 127.f / largest[c] : VecF{};
    for (int64_t i = 0; i < kBlockRows; i += 4, out += 4 * kPanel) {
        for (int c = 0; c < C; ++c) {
            VecU four = VecU{};
            for (int k = 0; k < 4; ++k) {
                const VecI level = nearest(load_float(from + (i + k) * cols + c * MR_LANES) * inverse[c]);
                four |= (((VecU)level + 128) & 0xff) << 8 * k;
            }
            std::memcpy(out + 4 * c * MR_LANES, &four, sizeof four);
        }
    }
    for (int c = 0; c < C; ++c) {
        const VecF scale = largest[c] / 127.f + poison[c];
        std::memcpy(out + 4 * c * MR_LANES, &scale, sizeof scale);
    }
}

template <class T>
MR_TARGET void pack(const T* from, int64_t rows, int64_t cols, uint8_t* out) {
    for (int64_t j = 0; j < cols; j += kPanel) {
        for (int64_t i = 0; i < rows; i += kBlockRows, out += kBlockBytes) pack_block(from + i * cols + j, cols, out);
    }
}
