// Products with matrices in four bits (packed_matrix.h), for the bodies of for_each_level.h. As in packed_simd.h, but
// with blocks of 32, and the zero points are multiplied with the sum of a block's activations.

constexpr int64_t kNibbleAhead = 8 * kNibbleBytes;  // asked for in advance: with half of it 5 % of the speed are lost

// As dot4, with weights below 16.
MR_TARGET inline VecI dot4_small(VecI total, VecI weights, VecI levels) {
#if MR_LANES == 8
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, (__m256i)levels);
    return total + (VecI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return dot4(total, weights, levels);
#endif
}

// zeros * offset, which fit 16 bits.
MR_TARGET inline VecI times(VecI zeros, int32_t offset) {
#if MR_LANES == 16
    return (VecI)_mm512_madd_epi16((__m512i)zeros, _mm512_set1_epi32(offset & 0xffff));
#elif MR_LANES == 8
    return (VecI)_mm256_madd_epi16((__m256i)zeros, _mm256_set1_epi32(offset & 0xffff));
#elif defined(__SSE2__)
    return (VecI)_mm_madd_epi16((__m128i)zeros, _mm_set1_epi32(offset & 0xffff));
#else
    return zeros * offset;
#endif
}

// sums (N, C) += eight rows of a block, whose levels lie at `at`, times those of N tokens, `in` apart.
template <int N, int C>
MR_TARGET inline void add_eight(const uint8_t* at, const int8_t* levels, int64_t in, VecI (&sums)[N][C]) {
    for (int half = 0; half < 2; ++half) {
        VecI own[N];
        for (int t = 0; t < N; ++t) {
            int32_t four;
            std::memcpy(&four, levels + t * in + 4 * half, sizeof four);
            own[t] = VecI{} + four;
        }
        for (int c = 0; c < C; ++c) {
            const VecI both = load_int(at + 4 * c * MR_LANES);
            const VecI weights = (half ? (VecI)((VecU)both >> 4) : both) & 0x0f0f0f0f;
            for (int t = 0; t < N; ++t) sums[t][c] = dot4_small(sums[t][c], weights, own[t]);
        }
    }
}

// y (N, out) += levels (N, in) @ the panel, of which C vectors of columns at a time.
template <int N>
MR_TARGET inline void add_nibbles(const uint8_t* panel, int64_t in, int64_t out, const RoundedRows& rows, float* y) {
    constexpr int C = 4;
    const int64_t blocks = in / kNibbleRows;
    for (int64_t first = 0; first < kPanel; first += C * MR_LANES) {
        const uint8_t* block = panel;
        for (int64_t b = 0; b < blocks; ++b, block += kNibbleBytes) {
            if (first == 0) {
                for (int64_t line = 0; line < kNibbleBytes; line += 64) __builtin_prefetch(block + kNibbleAhead + line);
            }
            const Float16* scales = reinterpret_cast<const Float16*>(block + kNibbleLevels) + first;
            const uint16_t* zeros = reinterpret_cast<const uint16_t*>(block + kNibbleLevels + kNibbleScales);
            VecI sums[N][C];
            for (int c = 0; c < C; ++c) {
                const int64_t column = first + c * MR_LANES;
                const VecI zero = (VecI)(widen16(zeros + column % 16) >> static_cast<uint32_t>(column / 16 * 4) & 15);
                for (int t = 0; t < N; ++t) sums[t][c] = times(zero, rows.offsets[t * blocks + b]);
            }
            const int8_t* levels = rows.levels + b * kNibbleRows;
            for (int64_t k = 0; k < kNibbleRows; k += 8) {
                add_eight<N, C>(block + k * kPanel / 2 + 4 * first, levels + k, in, sums);
            }
            for (int c = 0; c < C; ++c) {
                const VecF scale = load_float(scales + c * MR_LANES);
                for (int t = 0; t < N; ++t) {
                    float* to = y + t * out + first + c * MR_LANES;
                    const VecF weighted = __builtin_convertvector(sums[t][c], VecF) * scale;
                    save(load_float(to) + weighted * rows.scales[t * blocks + b], to);
                }
            }
        }
    }
}

// y (n, 64) of the rows' `out` numbers += x (n, in) @ a panel of w (in, out), with x as levels.
MR_TARGET inline void add_panel(const Nibbles* w, int64_t j, int64_t in, int64_t out, int64_t n, const RoundedRows& x,
                                float* y) {
    constexpr int64_t most = MR_LANES == 16 ? 5 : 2;  // with six some sums lie in memory, and 7 % of the speed are lost
    const uint8_t* panel = reinterpret_cast<const uint8_t*>(w) + j * nibble_bytes(in, kPanel);
    y += j * kPanel;
    int64_t t = 0;
    for (; t + most <= n; t += most) add_nibbles<most>(panel, in, out, x.from<Nibbles>(t, in), y + t * out);
    switch (n - t) {
        case 4: add_nibbles<4>(panel, in, out, x.from<Nibbles>(t, in), y + t * out); break;
        case 3: add_nibbles<3>(panel, in, out, x.from<Nibbles>(t, in), y + t * out); break;
        case 2: add_nibbles<2>(panel, in, out, x.from<Nibbles>(t, in), y + t * out); break;
        case 1: add_nibbles<1>(panel, in, out, x.from<Nibbles>(t, in), y + t * out); break;
        default: break;
    }
}
