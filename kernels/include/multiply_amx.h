// Products of bfloat16 by the processor's tiles; part of tiles_simd.h.

MR_TARGET inline void configure() {
    struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // bytes
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Config config;  // GCC's load says that it reads but the first bytes
    _tile_loadconfig(&config);
}

// GCC's tile loads do not say that they read memory.
MR_TARGET inline void all_is_written() { __asm__ volatile("" ::: "memory"); }

MR_TARGET inline void release() { _tile_release(); }

// (32 or 16 rows) a @ w for two panels of 16 columns.
template <bool is_pair>
MR_TARGET inline void multiply(const Half* a, int64_t lda, const Half* w, int64_t steps, const Sums& sums) {
    const int64_t bytes = sums.stride * 4, row_bytes = lda * 2;
    float* const below = sums.at + kTile * sums.stride;
    if (sums.goes_on) {
        _tile_loadd(0, sums.at, bytes);
        _tile_loadd(1, sums.at + kTile, bytes);
        if constexpr (is_pair) {
            _tile_loadd(2, below, bytes);
            _tile_loadd(3, below + kTile, bytes);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (is_pair) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    const Half* const other = w + steps * kTileNumbers;
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, a + k * kTileDepth, row_bytes);
        _tile_loadd(6, w + k * kTileNumbers, 64);
        _tile_loadd(7, other + k * kTileNumbers, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (is_pair) {
            _tile_loadd(5, a + kTile * lda + k * kTileDepth, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums.at, bytes);
    _tile_stored(1, sums.at + kTile, bytes);
    if constexpr (is_pair) {
        _tile_stored(2, below, bytes);
        _tile_stored(3, below + kTile, bytes);
    }
}
