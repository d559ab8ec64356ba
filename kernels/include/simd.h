// Which instruction set the kernels run on; chosen once, at the first call, from what the processor offers.
#pragma once

#include <string>
#include <vector>

namespace medreasoner {

// `baseline` is what the compiler may assume everywhere: SSE2 on x86-64, NEON on aarch64.
enum class SimdLevel { baseline, avx2, avx512 };

SimdLevel simd_level() noexcept;
std::string simd_level_name();
std::vector<std::string> simd_level_names();  // those that this machine can run, slowest first
void set_simd_level(const std::string& name);  // for tests; throws std::invalid_argument
std::vector<std::string> cpu_features();

}  // namespace medreasoner
