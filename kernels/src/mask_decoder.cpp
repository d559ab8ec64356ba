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

void MaskDecoder::run(const MaskPrompt* prompts, int64_t n) {
    std::unique_ptr<MaskRoom> room;
    {
        const std::lock_guard<std::mutex> lock(door_);
        if (!idle_.empty()) {
            room = std::move(idle_.back());
            idle_.pop_back();
        }
    }
#ifdef MR_HAS_TILES
    if (!room) room = MR_ON_ROAD(make_room(weights_));
#else
    if (!room) throw std::invalid_argument("this build has no kernel for tiles");
#endif
    for (int64_t i = 0; i < n; ++i) room->run(prompts[i]);
    const std::lock_guard<std::mutex> lock(door_);
    idle_.push_back(std::move(room));
}

}  // namespace medreasoner
