#include "image_encoder.h"

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
#include "rounded_rows.h"
#include "tiles.h"

#ifdef MR_HAS_TILES
#define MR_BODY "image_encoder_simd.h"
#define MR_PART image
#include "for_each_road.h"
#endif

namespace medreasoner {
namespace {

constexpr size_t kMostIdle = 4;  // rooms

#ifdef MR_HAS_TILES
std::unique_ptr<EncoderRoom> room_for(const EncoderWeights& weights, int n_threads) {
    return MR_ON_ROAD(make_room(weights, n_threads));
}
#else
std::unique_ptr<EncoderRoom> room_for(const EncoderWeights&, int) {
    throw std::invalid_argument("this build has no kernel for tiles");
}
#endif

}  // namespace

void ImageEncoder::run(const float* pixels, bool alone, float* out) {
    std::unique_lock<std::mutex> turn(crew_.turn(), std::defer_lock);
    if (!alone) (void)turn.try_lock();
    Crew& crew = turn ? crew_ : alone_;
    std::unique_ptr<EncoderRoom> own;
    {
        const std::lock_guard<std::mutex> lock(door_);
        const auto fits = [&](const std::unique_ptr<EncoderRoom>& each) { return each->n_threads() == crew.n_threads(); };
        const auto found = std::find_if(idle_.begin(), idle_.end(), fits);
        if (found != idle_.end()) {
            own = std::move(*found);
            idle_.erase(found);
        }
    }
    if (!own) own = room_for(weights_, crew.n_threads());
    own->run(pixels, crew, out);
    const std::lock_guard<std::mutex> lock(door_);
    idle_.insert(idle_.begin(), std::move(own));
    if (idle_.size() > kMostIdle) idle_.pop_back();
}

}  // namespace medreasoner
