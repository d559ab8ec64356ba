// Products of bfloat16 by vectors, of matrices that lie as tiles; part of tiles_simd.h.

MR_TARGET inline void configure() {}

MR_TARGET inline void release() {}

MR_TARGET inline void all_is_written() {}

constexpr int kRowsAtOnce = 8;  // whose sums, for two panels, stay in registers

// sums += two neighbours of a row, everywhere the same, times those of 16 columns.
MR_TARGET inline __m512 add_product(__m512 sums, __m512i two, __m512i columns) {
#ifdef MR_ON_BF16
    return _mm512_dpbf16_ps(sums, (__m512bh)two, (__m512bh)columns);
#else
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    sums = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(two, 16), (__m512)_mm512_slli_epi32(columns, 16), sums);
    return _mm512_fmadd_ps((__m512)_mm512_and_si512(two, upper), (__m512)_mm512_and_si512(columns, upper), sums);
#endif
}

// (32 or 16 rows) a @ w for two panels of 16 columns.
template <bool is_pair>
MR_TARGET inline void multiply(const Half* a, int64_t lda, const Half* w, int64_t steps, const Sums& sums) {
    const Half* const other = w + steps * kTileNumbers;
    for (int64_t row = 0; row < (is_pair ? kPair : kTile); row += kRowsAtOnce) {
        const Half* const from = a + row * lda;
        float* const at = sums.at + row * sums.stride;
        __m512 one[kRowsAtOnce], two[kRowsAtOnce];
#pragma GCC unroll 8
        for (int i = 0; i < kRowsAtOnce; ++i) {
            one[i] = sums.goes_on ? _mm512_loadu_ps(at + i * sums.stride) : _mm512_setzero_ps();
            two[i] = sums.goes_on ? _mm512_loadu_ps(at + i * sums.stride + kTile) : _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < steps * kTileDepth; k += 2) {
            const __m512i left = _mm512_loadu_si512(w + k * kTile), right = _mm512_loadu_si512(other + k * kTile);
#pragma GCC unroll 8
            for (int i = 0; i < kRowsAtOnce; ++i) {
                const __m512i both = _mm512_set1_epi32(load<int32_t>(from + i * lda + k));
                one[i] = add_product(one[i], both, left);
                two[i] = add_product(two[i], both, right);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRowsAtOnce; ++i) {
            _mm512_storeu_ps(at + i * sums.stride, one[i]);
            _mm512_storeu_ps(at + i * sums.stride + kTile, two[i]);
        }
    }
}
