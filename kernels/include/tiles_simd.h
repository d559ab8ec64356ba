// What kernels on tiles share. Included by for_each_road.h, once for each road.

#include "vectors_simd.h"

using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t kPair = 2 * kTile;  // rows, and columns, of a block of four tiles

MR_TARGET inline void narrow_to(VecF v, Half* to) {
#if defined(MR_ON_AMX) || defined(MR_ON_BF16)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
#else
    // To the nearest, of two to the even one.
    const VecU bits = (VecU)v;
    const __m512i nearest = (__m512i)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(nearest, is_nan, _mm512_set1_epi32(0x7fc0)));
#endif
    std::memcpy(to, &narrow, sizeof narrow);
}

// 16 numbers and 16 others, in turns.
MR_TARGET inline __m512i in_turns(__m256i one, __m256i other) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(other), 16));
}

// 0 to 15 times a step.
MR_TARGET inline __m512i steps_of(int64_t step) {
    return _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                              _mm512_set1_epi32(static_cast<int>(step)));
}

// 16 columns of two rows of a matrix, next to each other; those that are not there are 0.
template <class T>
MR_TARGET inline __m512i side_by_side(const T* from, int64_t cols, bool has_other, __mmask16 there) {
    const auto read = [&](const T* row) MR_TARGET {
        alignas(64) T numbers[kTile] = {};
        if (there == 0xffff) return load_float(row);
        for (int64_t j = 0; there >> j & 1; ++j) numbers[j] = row[j];
        return load_float(numbers);
    };
    Half both[2 * kTile] = {};
    narrow_to(read(from), both);
    if (has_other) narrow_to(read(from + cols), both + kTile);
    return in_turns(load<__m256i>(both), load<__m256i>(both + kTile));
}

template <class T>
MR_TARGET void tile(const T* from, int64_t rows, int64_t cols, int64_t stride, Half* out) {
    const int64_t filled = up_to(rows, kTileDepth);
    for (int64_t first = 0; first < cols; first += kTile, out += stride * filled * kTile) {
        const auto there = static_cast<__mmask16>((1u << std::min(kTile, cols - first)) - 1);
        for (int64_t i = 0; i < filled; i += 2) {
            const bool is_there = i < rows;
            _mm512_storeu_si512(out + i * kTile, is_there ? side_by_side(from + i * cols + first, cols, i + 1 < rows, there)
                                                          : _mm512_setzero_si512());
        }
    }
}

// Where the sums of a block of rows and columns start, and where they go.
struct Sums {
    float* at;
    int64_t stride;  // floats
    bool goes_on;    // from what stands there, instead of 0
};

#ifdef MR_ON_AMX
#include "multiply_amx.h"
#else
#include "multiply_vectors.h"
#endif

// Calls work(row, panel, is_pair) for blocks of 32 rows (the last may have 16) and two panels; a pair of panels stays in
// the first cache for all rows.
template <class Work>
MR_TARGET inline void each_block(int64_t n_tiles, int64_t columns, const Work& work) {
    for (int64_t panel = 0; panel * kTile < columns; panel += 2) {
        int64_t row = 0;
        for (; row + kPair <= n_tiles * kTile; row += kPair) work(row, panel, std::true_type{});
        if (row < n_tiles * kTile) work(row, panel, std::false_type{});
    }
}

// y (n_tiles * 16, columns) = a @ w, or added to y.
MR_TARGET inline void product(const Half* a, int64_t lda, int64_t n_tiles, const Half* w, int64_t depth, int64_t columns,
                              float* y, int64_t stride, bool goes_on) {
    const int64_t steps = up_to(depth, kTileDepth) / kTileDepth;
    all_is_written();
    each_block(n_tiles, columns, [&](int64_t row, int64_t panel, auto is_pair) MR_TARGET {
        multiply<is_pair()>(a + row * lda, lda, w + panel * steps * kTileNumbers, steps,
                            {y + row * stride + panel * kTile, stride, goes_on});
    });
}

// 1 / x to 2^-14 of it: more than bfloat16 keeps.
MR_TARGET inline VecF inverse(VecF x) { return (VecF)_mm512_rcp14_ps((__m512)x); }

// e^x to 3e-6 of it; 0 below -104.
MR_TARGET inline VecF power_of_e(VecF x) {
    const __m512 bounded = _mm512_max_ps((__m512)x, _mm512_set1_ps(-150.f));
    const __m512 power = _mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const VecF r = (VecF)power - (VecF)whole;
    const VecF poly = ((((1.33335581e-3f * r + 9.61812911e-3f) * r + 5.55041087e-2f) * r + 0.240226507f) * r + 0.693147181f) * r + 1.f;
    return (VecF)_mm512_scalef_ps((__m512)poly, whole);
}

MR_TARGET inline VecF sigmoid(VecF x) { return inverse(1.f + power_of_e(-x)); }

// The error function to 1e-4 (Abramowitz and Stegun, 7.1.26).
MR_TARGET inline VecF error_function(VecF x) {
    const VecF size = x < 0.f ? -x : x, t = inverse(1.f + 0.3275911f * size);
    const VecF poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const VecF y = 1.f - poly * power_of_e(-size * size);
    return x < 0.f ? -y : y;
}

// Zeroed numbers, at the start of a cache line.
template <class T>
class Numbers {
   public:
    explicit Numbers(int64_t n) : numbers_(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), kLine))) {
        std::fill(get(), get() + n, T{});
    }
    T* get() const { return numbers_.get(); }

   private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(T* numbers) const { ::operator delete(numbers, kLine); }
    };
    std::unique_ptr<T, Free> numbers_;
};

// Of n numbers, a multiple of 16: what a LayerNormalization takes away, and then multiplies by.
MR_TARGET inline std::pair<float, float> mean_and_factor(const float* x, int64_t n, float epsilon) {
    VecF total = VecF{}, squares = VecF{};
    for (int64_t j = 0; j < n; j += MR_LANES) total += load_float(x + j);
    const float mean = sum(total) / static_cast<float>(n);
    for (int64_t j = 0; j < n; j += MR_LANES) {
        const VecF v = load_float(x + j) - mean;
        squares += v * v;
    }
    return {mean, 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + epsilon)};
}

MR_TARGET inline VecF gelu(VecF x) { return 0.5f * x * (1.f + error_function(x * 0.70710678f)); }

// n rows (of dim numbers) as columns: a panel of 16 of them after the other, up to a pair.
MR_TARGET inline void pack_columns(const Half* from, int64_t stride, int64_t n, int64_t dim, Half* to) {
    const __m512i places = steps_of(2 * stride);
    for (int64_t row = 0; row < up_to(n, kPair); row += kTile) {
        const int64_t there = std::clamp<int64_t>(n - row, 0, kTile);
        const auto valid = static_cast<__mmask16>((1u << there) - 1);
        for (int64_t pair = 0; pair < up_to(dim, kTileDepth) / 2; ++pair, to += 2 * kTile) {
            const __mmask16 mask = 2 * pair < dim ? valid : __mmask16{0};
            const Half* const first = from + row * stride + 2 * pair;
            _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places, first, 1));
        }
    }
}

// n rows as they are: two side by side, a panel of 16 of their numbers after the other, up to a pair.
MR_TARGET inline void pack_rows(const Half* from, int64_t stride, int64_t n, int64_t dim, Half* to) {
    for (int64_t column = 0; column < up_to(dim, kPair); column += kTile) {
        const __mmask16 there = column < dim ? 0xffff : 0;
        for (int64_t row = 0; row < up_to(n, kTileDepth); row += 2, to += 2 * kTile) {
            const __mmask16 one = row < n ? there : 0, other = row + 1 < n ? there : 0;
            const __m256i a = _mm256_maskz_loadu_epi16(one, from + row * stride + column);
            const __m256i b = _mm256_maskz_loadu_epi16(other, from + (row + 1) * stride + column);
            _mm512_storeu_si512(to, in_turns(a, b));
        }
    }
}

constexpr float kNowhere = -std::numeric_limits<float>::infinity();

// to = e^(scale * (score - the largest)), 0 behind the first n; gives one over their sum.
MR_TARGET inline float weigh(float* scores, int64_t n, int64_t whole, float scale, Half* to) {
    std::fill(scores + n, scores + whole, kNowhere);
    VecF most = load_float(scores), total = VecF{};
    for (int64_t j = MR_LANES; j < whole; j += MR_LANES) most = (VecF)_mm512_max_ps((__m512)load_float(scores + j), (__m512)most);
    const float largest = largest_of(most);
    for (int64_t j = 0; j < whole; j += MR_LANES) {
        const VecF v = load_float(scores + j);
        const VecF weight = power_of_e((v - largest) * scale);  // of nowhere 0
        total += weight;
        narrow_to(weight, to + j);
    }
    return 1.f / sum(total);
}
