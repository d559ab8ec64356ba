// For files with kernels on tiles, where MR_HAS_TILES is defined: what they are compiled for.
#pragma once

#include <immintrin.h>

// GCC's own AVX-512 header starts from deliberately uninitialised registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define MR_TARGET                                                                                                       \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")))
#define MR_LANES 16
