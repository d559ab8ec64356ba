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
#include "tiles_target.h"

namespace medreasoner {
namespace on_tiles {

#include "tiles_amx.h"

#include "mask_decoder_amx.h"

}  // namespace on_tiles

namespace {

std::unique_ptr<MaskRoom> make_room(const MaskWeights& weights) { return std::make_unique<on_tiles::Studio>(weights); }

}  // namespace
}  // namespace medreasoner

#else

namespace medreasoner {
namespace {

std::unique_ptr<MaskRoom> make_room(const MaskWeights&) {
    throw std::invalid_argument("this build has no kernel for tiles");
}

}  // namespace
}  // namespace medreasoner

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
    if (!room) room = make_room(weights_);
    for (int64_t i = 0; i < n; ++i) room->run(prompts[i]);
    const std::lock_guard<std::mutex> lock(door_);
    idle_.push_back(std::move(room));
}

}  // namespace medreasoner
