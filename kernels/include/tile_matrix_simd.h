// The body of tiles.cpp.

inline void tile_any(const Matrix& m, int64_t stride, uint16_t* out) {
    switch (m.dtype) {
        case Dtype::float32: return tile(static_cast<const float*>(m.data), m.rows, m.cols, stride, out);
        case Dtype::float16: return tile(static_cast<const Float16*>(m.data), m.rows, m.cols, stride, out);
        case Dtype::bfloat16: return tile(static_cast<const Bfloat16*>(m.data), m.rows, m.cols, stride, out);
    }
}
