// Compiles the file named by MR_BODY once for each road on which products of bfloat16 go (tiles.h), behind tiles_simd.h and
// in namespaces of their own, in each that of MR_PART: bodies may give different things one name. For x86-64 where MR_HAS_TILES is
// defined. In a body MR_LANES is 16, and every function carries MR_TARGET.

#include <immintrin.h>

// GCC's own AVX-512 header starts from deliberately uninitialised registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define MR_LANES 16
#define MR_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512"

#define MR_ON_AMX
#define MR_TARGET __attribute__((target(MR_AVX512 ",avx512bf16,amx-tile,amx-bf16")))
namespace medreasoner::on_amx {
#include "tiles_simd.h"
namespace MR_PART {
#include MR_BODY
}
}
#undef MR_ON_AMX
#undef MR_TARGET

#define MR_ON_BF16
#define MR_TARGET __attribute__((target(MR_AVX512 ",avx512bf16")))
namespace medreasoner::on_bf16 {
#include "tiles_simd.h"
namespace MR_PART {
#include MR_BODY
}
}
#undef MR_ON_BF16
#undef MR_TARGET

#define MR_TARGET __attribute__((target(MR_AVX512)))
namespace medreasoner::on_floats {
#include "tiles_simd.h"
namespace MR_PART {
#include MR_BODY
}
}
#undef MR_TARGET

#undef MR_AVX512
#undef MR_LANES

// What stands under this name on the road that is taken.
#define MR_ON_ROAD(...)                                                      \
    (tile_road() == TileRoad::amx           ? on_amx::MR_PART::__VA_ARGS__   \
     : tile_road() == TileRoad::avx512_bf16 ? on_bf16::MR_PART::__VA_ARGS__ \
                                            : on_floats::MR_PART::__VA_ARGS__)

#undef MR_BODY
