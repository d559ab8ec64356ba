// Rows of a large weight matrix (vocabulary, hidden): token embeddings and the few logits that a grammar asks for.
#pragma once

#include <cstdint>

namespace medreasoner {

// Element type of a weight matrix; both 16-bit forms are stored as their bit patterns.
enum class Dtype { float32, float16, bfloat16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Matrix {
    const void* data;  // row-major (rows, cols)
    Dtype dtype;
    int64_t rows;
    int64_t cols;
};

// out[k] = matrix[rows[k]] . hidden; `rows` null means the rows 0 .. n - 1. Indices are the caller's to check.
// Many are shared out among up to n_threads, which changes no bit.
void project_rows(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n, float* out, int n_threads = 1);

// out (n, cols) = the rows `ids`, as float32.
void gather_rows(const Matrix& matrix, const int64_t* ids, int64_t n, float* out);

// The row with the largest logit among `rows` (n >= 1); ties go to the earliest. Throws std::invalid_argument where no
// largest finite logit exists.
int32_t likeliest_row(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n);

struct Selected {
    int32_t row;
    float logprob;
};

// The same row, and its log-probability among `rows`.
Selected select_token(const Matrix& matrix, const float* hidden, const int32_t* rows, int64_t n);

}  // namespace medreasoner
