#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "floats.h"

#ifdef MR_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles_target.h"
#endif

namespace medreasoner {
namespace {

#ifdef MR_HAS_TILES

constexpr unsigned kTileBf16 = 1u << 22, kTileSave = 1u << 24;  // cpuid 7.0, edx
constexpr unsigned kBf16 = 1u << 5;                            // cpuid 7.1, eax: conversions
constexpr unsigned kTileState = 3u << 17;                      // of the extended state that the system keeps
constexpr long kAskForState = 0x1023, kTileData = 18;          // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)

bool ask_for_tiles() {
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTileBf16 | kTileSave)) != (kTileBf16 | kTileSave)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kBf16)) return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

#else

bool ask_for_tiles() { return false; }

#endif

}  // namespace

bool has_tiles() {
    static const bool has = ask_for_tiles();
    return has;
}

#ifdef MR_HAS_TILES

namespace on_tiles {

#include "tiles_amx.h"

}  // namespace on_tiles

void tile_matrix(const Matrix& m, int64_t stride, uint16_t* out) {
    switch (m.dtype) {
        case Dtype::float32: return on_tiles::tile(static_cast<const float*>(m.data), m.rows, m.cols, stride, out);
        case Dtype::float16: return on_tiles::tile(static_cast<const Float16*>(m.data), m.rows, m.cols, stride, out);
        case Dtype::bfloat16: return on_tiles::tile(static_cast<const Bfloat16*>(m.data), m.rows, m.cols, stride, out);
    }
}

#else

void tile_matrix(const Matrix&, int64_t, uint16_t*) {}

#endif

}  // namespace medreasoner
