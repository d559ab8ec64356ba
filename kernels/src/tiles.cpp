#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "floats.h"

#ifdef MR_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace medreasoner {
namespace {

constexpr unsigned kTileBf16 = 1u << 22, kTileSave = 1u << 24;  // cpuid 7.0, edx
constexpr unsigned kBf16 = 1u << 5;                            // cpuid 7.1, eax
constexpr unsigned kTileState = 3u << 17;                      // of the extended state that the system keeps
constexpr long kAskForState = 0x1023, kTileData = 18;          // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)

bool may_use_tiles() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

TileRoad best_road() {
    unsigned a, b, c, d;
    for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
                           __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512vnni"), __builtin_cpu_supports("fma"),
                           __builtin_cpu_supports("f16c")}) {
        if (!has) return TileRoad::none;
    }
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kBf16)) return TileRoad::avx512;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTileBf16 | kTileSave)) != (kTileBf16 | kTileSave)) return TileRoad::avx512_bf16;
    return may_use_tiles() ? TileRoad::amx : TileRoad::avx512_bf16;
}

}  // namespace
}  // namespace medreasoner

#define MR_BODY "tile_matrix_simd.h"
#define MR_PART matrices
#include "for_each_road.h"

#else

namespace medreasoner {
namespace {

TileRoad best_road() { return TileRoad::none; }

}  // namespace
}  // namespace medreasoner

#endif

namespace medreasoner {
namespace {

constexpr const char* kNames[] = {"none", "avx512", "avx512-bf16", "amx-bf16"};

TileRoad best() {
    static const TileRoad road = best_road();
    return road;
}

std::atomic<TileRoad>& current() {
    static std::atomic<TileRoad> road{best()};
    return road;
}

}  // namespace

TileRoad tile_road() { return current().load(std::memory_order_relaxed); }

std::string tile_road_name() { return kNames[static_cast<int>(tile_road())]; }

std::vector<std::string> tile_road_names() { return {kNames, kNames + static_cast<int>(best()) + 1}; }

void set_tile_road(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best()); ++i) {
        if (name == kNames[i]) return current().store(static_cast<TileRoad>(i), std::memory_order_relaxed);
    }
    throw std::invalid_argument("this machine does not multiply bfloat16 by '" + name + "'");
}

void tile_matrix([[maybe_unused]] const Matrix& m, [[maybe_unused]] int64_t stride, [[maybe_unused]] uint16_t* out) {
#ifdef MR_HAS_TILES
    MR_ON_ROAD(tile_any(m, stride, out));
#endif
}

}  // namespace medreasoner
