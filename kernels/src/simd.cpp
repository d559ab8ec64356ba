#include "simd.h"

#include <atomic>
#include <stdexcept>

#include "tiles.h"

namespace medreasoner {
namespace {

#if defined(__x86_64__)
constexpr const char* kBaselineName = "sse2";
#elif defined(__aarch64__)
constexpr const char* kBaselineName = "neon";
#else
constexpr const char* kBaselineName = "portable";
#endif

SimdLevel best_level() {
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx2) return avx512 ? SimdLevel::avx512 : SimdLevel::avx2;
#endif
    return SimdLevel::baseline;
}

std::atomic<SimdLevel>& current() {
    static std::atomic<SimdLevel> level{best_level()};
    return level;
}

const char* name_of(SimdLevel level) {
    if (level == SimdLevel::avx512) return "avx512";
    return level == SimdLevel::avx2 ? "avx2" : kBaselineName;
}

}  // namespace

SimdLevel simd_level() noexcept { return current().load(std::memory_order_relaxed); }

std::string simd_level_name() { return name_of(simd_level()); }

std::vector<std::string> simd_level_names() {
    std::vector<std::string> names;
    for (int level = 0; level <= static_cast<int>(best_level()); ++level) {
        names.emplace_back(name_of(static_cast<SimdLevel>(level)));
    }
    return names;
}

void set_simd_level(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_level()); ++i) {
        const auto level = static_cast<SimdLevel>(i);
        if (name == name_of(level)) return current().store(level, std::memory_order_relaxed);
    }
    throw std::invalid_argument("this machine does not run the SIMD level '" + name + "'");
}

std::vector<std::string> cpu_features() {
#if defined(__x86_64__)
    std::vector<std::string> found{"sse2"};
#define MR_ADD_IF_SUPPORTED(feature) \
    if (__builtin_cpu_supports(feature)) found.emplace_back(feature)
    MR_ADD_IF_SUPPORTED("avx2");
    MR_ADD_IF_SUPPORTED("fma");
    MR_ADD_IF_SUPPORTED("f16c");
    MR_ADD_IF_SUPPORTED("avx512f");
    MR_ADD_IF_SUPPORTED("avx512bw");
    MR_ADD_IF_SUPPORTED("avx512dq");
    MR_ADD_IF_SUPPORTED("avx512vl");
    MR_ADD_IF_SUPPORTED("avx512vnni");
#undef MR_ADD_IF_SUPPORTED
    for (const std::string& road : tile_road_names()) {
        if (road != "none" && road != "avx512") found.emplace_back(road);
    }
    return found;
#elif defined(__aarch64__)
    return {"neon"};
#else
    return {};
#endif
}

}  // namespace medreasoner
