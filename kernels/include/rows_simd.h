// Dot products of rows with one vector (see for_each_level.h for MR_LANES and MR_TARGET).

#include "vectors_simd.h"

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
    for (; i + MR_LANES <= n; i += MR_LANES) save(load_float(from + i), out + i);
    for (; i < n; ++i) out[i] = to_float(from[i]);
}
