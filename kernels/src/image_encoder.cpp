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
    crew_.run(alone, [&](Crew& crew) {
        rooms_.with([&](const EncoderRoom& room) { return room.n_threads() == crew.n_threads(); },
                    [&] { return room_for(weights_, crew.n_threads()); },
                    [&](EncoderRoom& room) { room.run(pixels, crew, out); });
    });
}

}  // namespace medreasoner
