#include "mask_decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "floats.h"
#include "tiles.h"

#ifdef MR_HAS_TILES
#define MR_BODY "mask_decoder_simd.h"
#define MR_PART masks
#include "for_each_road.h"
#endif

namespace medreasoner {
namespace {

#ifdef MR_HAS_TILES
std::unique_ptr<MaskRoom> room_for(const MaskWeights& weights) { return MR_ON_ROAD(make_room(weights)); }
#else
std::unique_ptr<MaskRoom> room_for(const MaskWeights&) { throw std::invalid_argument("this build has no kernel for tiles"); }
#endif

}  // namespace

void MaskDecoder::run(const MaskPrompt* prompts, int64_t n) {
    rooms_.with([](const MaskRoom&) { return true; }, [&] { return room_for(weights_); },
                [&](MaskRoom& room) {
                    for (int64_t i = 0; i < n; ++i) room.run(prompts[i]);
                });
}

}  // namespace medreasoner
