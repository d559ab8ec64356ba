// Dot products of rows with one vector (see for_each_level.h for MR_LANES and MR_TARGET).

typedef float VecF __attribute__((vector_size(4 * MR_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * MR_LANES)));

template <class V>
MR_TARGET inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

MR_TARGET inline VecF load_float(const float* from) { return load<VecF>(from); }

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

typedef float Quad __attribute__((vector_size(16)));

MR_TARGET inline float sum(VecF v) {
#if MR_LANES == 16
    const __m512 whole = (__m512)v;
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    Quad four = (Quad)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif MR_LANES == 8
    Quad four = (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    Quad four = v;
#endif
    four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return four[0] + four[1];
}

// R rows at once share the loads of `hidden`. The order of additions in a row does not depend on R, so that equal rows
// have equal logits wherever they stand and ties stay ties.
template <int R, class T>
MR_TARGET inline void dot(const T* const* rows, const float* hidden, int64_t n, float* out) {
    VecF even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = VecF{};
    int64_t i = 0;
    for (; i + 2 * MR_LANES <= n; i += 2 * MR_LANES) {
        const VecF h0 = load_float(hidden + i), h1 = load_float(hidden + i + MR_LANES);
        for (int r = 0; r < R; ++r) {
            even[r] += load_float(rows[r] + i) * h0;
            odd[r] += load_float(rows[r] + i + MR_LANES) * h1;
        }
    }
    for (int r = 0; r < R; ++r) {
        float rest = 0;
        for (int64_t j = i; j < n; ++j) rest += to_float(rows[r][j]) * hidden[j];
        out[r] = sum(even[r] + odd[r]) + rest;
    }
}

template <class T>
MR_TARGET void project(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n, float* out) {
    const T* data = static_cast<const T*>(matrix.data);
    const auto row = [=](int64_t k) { return data + (rows ? rows[k] : k) * matrix.cols; };
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
        const T* four[] = {row(k), row(k + 1), row(k + 2), row(k + 3)};
        dot<4>(four, hidden, matrix.cols, out + k);
    }
    for (; k < n; ++k) {
        const T* one[] = {row(k)};
        dot<1>(one, hidden, matrix.cols, out + k);
    }
}

template <class T>
MR_TARGET void widen(const T* from, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + MR_LANES <= n; i += MR_LANES) {
        const VecF v = load_float(from + i);
        std::memcpy(out + i, &v, sizeof v);
    }
    for (; i < n; ++i) out[i] = to_float(from[i]);
}
