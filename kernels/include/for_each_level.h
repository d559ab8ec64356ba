// Compiles the file named by MR_BODY once for each instruction set, in namespaces of their own (no include guard: meant
// to be included again). The bodies use the compilers' vector extension, so one text serves SSE2, AVX2, AVX-512 and NEON.
// In a body, MR_LANES is the number of 32-bit lanes and every function carries MR_TARGET.

#define MR_TARGET
#define MR_LANES 4
namespace medreasoner::baseline {
#include MR_BODY
}
#undef MR_TARGET
#undef MR_LANES

#ifdef __x86_64__

#define MR_TARGET __attribute__((target("avx2,fma,f16c")))
#define MR_LANES 8
namespace medreasoner::avx2 {
#include MR_BODY
}
#undef MR_TARGET
#undef MR_LANES

// GCC's own AVX-512 header starts from deliberately uninitialised registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define MR_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")))
#define MR_LANES 16
namespace medreasoner::avx512 {
#include MR_BODY
}
#undef MR_TARGET
#undef MR_LANES

#define MR_DISPATCH(...)                                          \
    (simd_level() == SimdLevel::avx512 ? &avx512::__VA_ARGS__     \
     : simd_level() == SimdLevel::avx2 ? &avx2::__VA_ARGS__       \
                                       : &baseline::__VA_ARGS__)
#else
#define MR_DISPATCH(...) (&baseline::__VA_ARGS__)
#endif

#undef MR_BODY
