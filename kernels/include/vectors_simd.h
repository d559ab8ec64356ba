// Vectors of floats, and how numbers are loaded into them; for the bodies of for_each_level.h.

typedef float VecF __attribute__((vector_size(4 * MR_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * MR_LANES)));
typedef float Quad __attribute__((vector_size(16)));

template <class V>
MR_TARGET inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MR_TARGET inline VecF load_float(const float* from) { return load<VecF>(from); }

MR_TARGET inline void save(VecF v, float* to) { std::memcpy(to, &v, sizeof v); }

// 16-bit patterns to 32 bits. Intrinsics, since the compilers do this element by element otherwise.
MR_TARGET inline VecU widen16(const uint16_t* from) {
#if MR_LANES == 16
    return (VecU)_mm512_cvtepu16_epi32(load<__m256i>(from));
#elif MR_LANES == 8
    return (VecU)_mm256_cvtepu16_epi32(load<__m128i>(from));
#elif defined(__SSE2__)
    return (VecU)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)from), _mm_setzero_si128());
#elif defined(__ARM_NEON)
    return (VecU)vmovl_u16(vld1_u16(from));
#else
    return VecU{from[0], from[1], from[2], from[3]};
#endif
}

MR_TARGET inline VecF load_float(const Bfloat16* from) { return (VecF)(widen16(&from->bits) << 16); }

MR_TARGET inline VecF load_float(const Float16* from) {
#if MR_LANES == 16
    return (VecF)_mm512_cvtph_ps(load<__m256i>(from));
#elif MR_LANES == 8
    return (VecF)_mm256_cvtph_ps(load<__m128i>(from));
#else
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact for subnormal numbers too.
    const VecU bits = widen16(&from->bits);
    const VecF scaled = (VecF)((bits & 0x7fff) << 13) * 0x1p112f;
    const VecU special = (VecU)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (VecF)((VecU)scaled | special | ((bits & 0x8000) << 16));
#endif
}

MR_TARGET inline Quad quarters(VecF v) {
#if MR_LANES == 16
    const __m512 whole = (__m512)v;
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif MR_LANES == 8
    return (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    return v;
#endif
}

MR_TARGET inline float sum(VecF v) {
    Quad four = quarters(v);
    four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return four[0] + four[1];
}

// The largest of a vector; none may be NaN.
MR_TARGET inline float largest_of(VecF v) {
    float lanes[MR_LANES];
    save(v, lanes);
    Quad most = load<Quad>(lanes);
    for (int i = 4; i < MR_LANES; i += 4) {
        const Quad other = load<Quad>(lanes + i);
        most = other > most ? other : most;
    }
    return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

// The sums of four vectors, each as `sum` has it to the last bit.
MR_TARGET inline Quad sums(VecF v, VecF w, VecF x, VecF y) {
    const Quad a = quarters(v), b = quarters(w), c = quarters(x), d = quarters(y);
    const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// e^x to about 1e-7 of it; below -87 and above 88 as there.
MR_TARGET inline VecF exponential(VecF x) {
    const VecF low = VecF{} - 87.f, high = VecF{} + 88.f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const VecF shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the last bits
    const VecF whole = shifted - 12582912.f;
    const VecF r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    const VecF poly = ((((1.f / 720 * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6) * r + 0.5f) * r * r + r + 1.f;
    return poly * (VecF)(((VecU)shifted + 127) << 23);
}

MR_TARGET inline void normalise(const float* x, const float* scale, int64_t n, float epsilon, float* out) {
    VecF squares = VecF{};
    for (int64_t i = 0; i < n; i += MR_LANES) {
        const VecF v = load_float(x + i);
        squares += v * v;
    }
    const float factor = 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + epsilon);
    for (int64_t i = 0; i < n; i += MR_LANES) save(load_float(x + i) * factor * load_float(scale + i), out + i);
}
