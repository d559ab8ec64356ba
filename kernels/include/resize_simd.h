// The inner loop of the resize (see for_each_level.h for MR_LANES and MR_TARGET).

typedef int32_t VecI __attribute__((vector_size(4 * MR_LANES)));

// Sixteen pixel sums.
constexpr int kVectors = 16 / MR_LANES;
struct Sums {
    VecI v[kVectors];
};

// Intrinsics, since the compilers widen and narrow bytes element by element otherwise.
MR_TARGET inline Sums widen16(const uint8_t* from) {
#if MR_LANES == 16
    return {{(VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from))}};
#elif MR_LANES == 8
    return {{(VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)),
             (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)))}};
#elif defined(__SSE2__)
    const __m128i zero = _mm_setzero_si128(), bytes = _mm_loadu_si128((const __m128i*)from);
    const __m128i low = _mm_unpacklo_epi8(bytes, zero), high = _mm_unpackhi_epi8(bytes, zero);
    return {{(VecI)_mm_unpacklo_epi16(low, zero), (VecI)_mm_unpackhi_epi16(low, zero),
             (VecI)_mm_unpacklo_epi16(high, zero), (VecI)_mm_unpackhi_epi16(high, zero)}};
#elif defined(__ARM_NEON)
    const uint8x16_t bytes = vld1q_u8(from);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return {{(VecI)vmovl_u16(vget_low_u16(low)), (VecI)vmovl_u16(vget_high_u16(low)),
             (VecI)vmovl_u16(vget_low_u16(high)), (VecI)vmovl_u16(vget_high_u16(high))}};
#else
    Sums sums;
    for (int i = 0; i < 16; ++i) sums.v[i / MR_LANES][i % MR_LANES] = from[i];
    return sums;
#endif
}

// Sixteen integers to bytes, clipped to 0 .. 255.
MR_TARGET inline void narrow16(const Sums& s, uint8_t* to) {
#if MR_LANES == 16
    const __m512i positive = _mm512_max_epi32((__m512i)s.v[0], _mm512_setzero_si512());
    _mm_storeu_si128((__m128i*)to, _mm512_cvtusepi32_epi8(positive));
#elif MR_LANES == 8
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)s.v[0], (__m256i)s.v[1]), 0xd8);
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#elif defined(__SSE2__)
    const __m128i low = _mm_packs_epi32((__m128i)s.v[0], (__m128i)s.v[1]);
    const __m128i high = _mm_packs_epi32((__m128i)s.v[2], (__m128i)s.v[3]);
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(low, high));
#elif defined(__ARM_NEON)
    const int16x8_t low = vcombine_s16(vqmovn_s32((int32x4_t)s.v[0]), vqmovn_s32((int32x4_t)s.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32((int32x4_t)s.v[2]), vqmovn_s32((int32x4_t)s.v[3]));
    vst1q_u8(to, vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
#else
    for (int i = 0; i < 16; ++i) to[i] = clip(s.v[i / MR_LANES][i % MR_LANES]);
#endif
}

template <int N>
MR_TARGET inline void combine_block(const uint8_t* lines, int64_t stride, const Taps& taps, uint8_t* out) {
    Sums totals[N];
    for (Sums& total : totals) {
        for (VecI& v : total.v) v = VecI{} + kHalf;
    }
    for (int k = 0; k < taps.count; ++k) {
        for (int j = 0; j < N; ++j) {
            const Sums pixels = widen16(lines + k * stride + 16 * j);
            for (int i = 0; i < kVectors; ++i) totals[j].v[i] += pixels.v[i] * taps.weights[k];
        }
    }
    for (int j = 0; j < N; ++j) {
        for (VecI& v : totals[j].v) v >>= kPrecision;
        narrow16(totals[j], out + 16 * j);
    }
}

// out[i] = clip(sum over k of weights[k] * lines[k * stride + i]), i < n.
MR_TARGET void combine(const uint8_t* lines, int64_t stride, const Taps& taps, int64_t n, uint8_t* out) {
    constexpr int kBlock = MR_LANES == 4 ? 1 : 3;  // what the registers hold; 48 bytes are 16 turned rows of RGB
    int64_t i = 0;
    for (; i + 16 * kBlock <= n; i += 16 * kBlock) combine_block<kBlock>(lines + i, stride, taps, out + i);
    for (; i + 16 <= n; i += 16) combine_block<1>(lines + i, stride, taps, out + i);
    for (; i < n; ++i) {
        int32_t total = kHalf;
        for (int k = 0; k < taps.count; ++k) total += lines[k * stride + i] * taps.weights[k];
        out[i] = clip(total >> kPrecision);
    }
}
