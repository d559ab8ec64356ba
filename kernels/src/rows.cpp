#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "crew.h"
#include "floats.h"
#include "simd.h"

#define MR_BODY "rows_simd.h"
#include "for_each_level.h"

namespace medreasoner {

static void project_part(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n, float* out) {
    switch (matrix.dtype) {
        case Dtype::float32: return MR_DISPATCH(project<float>)(matrix, hidden, rows, n, out);
        case Dtype::float16: return MR_DISPATCH(project<Float16>)(matrix, hidden, rows, n, out);
        case Dtype::bfloat16: return MR_DISPATCH(project<Bfloat16>)(matrix, hidden, rows, n, out);
    }
}

void project_rows(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n, float* out, int n_threads) {
    constexpr int64_t least = 1 << 22;  // numbers that are worth a thread, which takes tens of microseconds to start
    const int64_t some = std::max<int64_t>(1, least / std::max<int64_t>(1, matrix.cols));
    if (n_threads < 2 || n < 2 * some) return project_part(matrix, hidden, rows, n, out);
    Crew crew(static_cast<int>(std::min<int64_t>(n_threads, n / some)));
    crew.each((n + some - 1) / some, [&](int64_t part, int) {
        const int64_t first = part * some, count = std::min(some, n - first);
        const Matrix own{static_cast<const char*>(matrix.data) + (rows ? 0 : first * matrix.cols * size_of(matrix.dtype)),
                         matrix.dtype, matrix.rows, matrix.cols};
        project_part(own, hidden, rows ? rows + first : nullptr, count, out + first);
    });
}

template <class T, class Widen>
static void gather(const Matrix& matrix, const int64_t* ids, int64_t n, float* out, Widen widen) {
    const T* data = static_cast<const T*>(matrix.data);
    for (int64_t k = 0; k < n; ++k) widen(data + ids[k] * matrix.cols, matrix.cols, out + k * matrix.cols);
}

void gather_rows(const Matrix& matrix, const int64_t* ids, int64_t n, float* out) {
    switch (matrix.dtype) {
        case Dtype::float32: return gather<float>(matrix, ids, n, out, MR_DISPATCH(widen<float>));
        case Dtype::float16: return gather<Float16>(matrix, ids, n, out, MR_DISPATCH(widen<Float16>));
        case Dtype::bfloat16: return gather<Bfloat16>(matrix, ids, n, out, MR_DISPATCH(widen<Bfloat16>));
    }
}

// Index of the largest of some logits.
static size_t largest(const std::vector<float>& logits) {
    size_t best = 0;
    for (size_t k = 0; k < logits.size(); ++k) {
        if (std::isnan(logits[k])) throw std::invalid_argument("a logit is not a number");
        if (logits[k] > logits[best]) best = k;
    }
    if (std::isinf(logits[best])) throw std::invalid_argument("the largest logit is infinite");
    return best;
}

int32_t likeliest_row(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n) {
    std::vector<float> logits(static_cast<size_t>(n));
    project_rows(matrix, hidden, rows, n, logits.data());
    return rows[largest(logits)];
}

Selected select_token(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n) {
    std::vector<float> logits(static_cast<size_t>(n));
    project_rows(matrix, hidden, rows, n, logits.data());
    const size_t best = largest(logits);
    double total = 0;
    for (const float logit : logits) total += std::exp(logit - logits[best]);
    return {rows[best], static_cast<float>(-std::log(total))};
}

}  // namespace medreasoner
