// Products with matrices in eight bits (packed_matrix.h), for the bodies of for_each_level.h. The activations are rounded
// too, a block of a token at a time, so that few large ones do not blur the others.

typedef int32_t VecI __attribute__((vector_size(4 * MR_LANES)));
typedef int8_t Bytes __attribute__((vector_size(MR_LANES)));

MR_TARGET inline VecI load_int(const uint8_t* from) { return load<VecI>(from); }

// total + the products of four bytes of each lane: `weights` are unsigned, `levels` signed.
MR_TARGET inline VecI dot4(VecI total, VecI weights, VecI levels) {
#if MR_LANES == 16
    return (VecI)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weights, (__m512i)levels);
#elif MR_LANES == 8
    const __m256i w = (__m256i)weights, a = (__m256i)levels, low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, low), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
    return total + (VecI)even + (VecI)odd;
#elif defined(__SSE2__)
    const __m128i w = (__m128i)weights, a = (__m128i)levels, low = _mm_set1_epi16(0xff);
    const __m128i even = _mm_madd_epi16(_mm_and_si128(w, low), _mm_srai_epi16(_mm_slli_epi16(a, 8), 8));
    const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(w, 8), _mm_srai_epi16(a, 8));
    return total + (VecI)even + (VecI)odd;
#else
    for (int byte = 0; byte < 4; ++byte) total += (weights >> 8 * byte & 0xff) * (levels << (24 - 8 * byte) >> 24);
    return total;
#endif
}

MR_TARGET inline int32_t total_of(VecI v) {
    int32_t lanes[MR_LANES];
    std::memcpy(lanes, &v, sizeof v);
    typedef int32_t QuadI __attribute__((vector_size(16)));
    QuadI four = load<QuadI>(lanes);
    for (int i = 4; i < MR_LANES; i += 4) four += load<QuadI>(lanes + i);
    return four[0] + four[1] + (four[2] + four[3]);
}

// x (in,) as levels, blocks of T::kRows; of each block the scale, and what makes up for the zero point of the weights.
template <class T>
MR_TARGET inline void round_row(const float* x, int64_t in, const RoundedRows& rows) {
    constexpr int64_t size = T::kRows;
    for (int64_t b = 0; b < in / size; ++b, x += size) {
        VecF largest = VecF{}, poison = VecF{};
        for (int64_t i = 0; i < size; i += MR_LANES) {
            const VecF v = load_float(x + i), magnitude = v < 0.f ? -v : v;
            largest = magnitude > largest ? magnitude : largest;
            poison += v * 0.f;  // not a number or infinite: the whole block must become that
        }
        const float top = largest_of(largest);
        const float inverse = top > 0.f ? 127.f / top : 0.f;
        VecI total = VecI{};
        for (int64_t i = 0; i < size; i += MR_LANES) {
            const VecF shifted = load_float(x + i) * inverse + 12582912.f;  // 1.5 * 2^23: the nearest integer
            const VecI level = (VecI)shifted - 0x4b400000;
            const Bytes narrow = __builtin_convertvector(level, Bytes);
            std::memcpy(rows.levels + b * size + i, &narrow, sizeof narrow);
            total += level;
        }
        const int32_t all = total_of(total);
        rows.scales[b] = top / 127.f + sum(poison);
        rows.offsets[b] = -T::kZero * all;
    }
}

// y (N, out) += levels (N, in) @ one panel, of which C vectors of columns at a time; of the rows only some blocks.
template <int N>
MR_TARGET inline void add_tokens(const uint8_t* panel, int64_t in, int64_t out, const RoundedRows& rows, const Range& some,
                                 float* y) {
    constexpr int C = 4;
    constexpr int64_t width = C * MR_LANES;
    const int64_t blocks = in / kBlockRows;
    for (int64_t first = 0; first < kPanel; first += width) {
        const uint8_t* block = panel + some.first * kBlockBytes;
        for (int64_t b = some.first; b < some.end; ++b, block += kBlockBytes) {
            VecI sums[N][C];
            for (int t = 0; t < N; ++t)
                for (int c = 0; c < C; ++c) sums[t][c] = VecI{} + rows.offsets[t * blocks + b];
            const int8_t* levels = rows.levels + b * kBlockRows;
            for (int64_t k = 0; k < kBlockRows; k += 4) {
                const uint8_t* at = block + k * kPanel + 4 * first;
                VecI weights[C];
                for (int c = 0; c < C; ++c) weights[c] = load_int(at + 4 * c * MR_LANES);
                for (int t = 0; t < N; ++t) {
                    int32_t four;
                    std::memcpy(&four, levels + t * in + k, sizeof four);
                    const VecI own = VecI{} + four;
                    for (int c = 0; c < C; ++c) sums[t][c] = dot4(sums[t][c], weights[c], own);
                }
            }
            const float* scales = reinterpret_cast<const float*>(block + kBlockRows * kPanel) + first;
            for (int t = 0; t < N; ++t) {
                const float scale = rows.scales[t * blocks + b];
                for (int c = 0; c < C; ++c) {
                    float* to = y + t * out + first + c * MR_LANES;
                    const VecF weighted = __builtin_convertvector(sums[t][c], VecF) * load_float(scales + c * MR_LANES);
                    save(load_float(to) + weighted * scale, to);
                }
            }
        }
    }
}

// y (n, 64), rows `out` numbers apart, += x (n, in) @ a panel (in, 64), with x as levels; of `in` only some blocks.
MR_TARGET inline void add_one_panel(const uint8_t* panel, int64_t in, int64_t out, int64_t n, const RoundedRows& x, const Range& some,
                                    float* y) {
    constexpr int64_t most = MR_LANES == 16 ? 6 : 2;  // as many sums as there are registers for
    int64_t t = 0;
    for (; t + most <= n; t += most) add_tokens<most>(panel, in, out, x.from<Packed>(t, in), some, y + t * out);
    const RoundedRows rest = x.from<Packed>(t, in);
    switch (n - t) {
        case 5: add_tokens<5>(panel, in, out, rest, some, y + t * out); break;
        case 4: add_tokens<4>(panel, in, out, rest, some, y + t * out); break;
        case 3: add_tokens<3>(panel, in, out, rest, some, y + t * out); break;
        case 2: add_tokens<2>(panel, in, out, rest, some, y + t * out); break;
        case 1: add_tokens<1>(panel, in, out, rest, some, y + t * out); break;
        default: break;
    }
}

// The same with panel j of w (in, out).
MR_TARGET inline void add_blocks(const void* w, int64_t j, int64_t in, int64_t out, int64_t n, const RoundedRows& x,
                                 const Range& some, float* y) {
    add_one_panel(static_cast<const uint8_t*>(w) + j * packed_bytes(in, kPanel), in, out, n, x, some, y + j * kPanel);
}

// The same with all of them.
MR_TARGET inline void add_panel(const Packed* w, int64_t j, int64_t in, int64_t out, int64_t n, const RoundedRows& x,
                                float* y) {
    add_blocks(w, j, in, out, n, x, {0, in / kBlockRows}, y);
}
