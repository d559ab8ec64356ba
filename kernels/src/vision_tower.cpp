#include "vision_tower.h"

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
#define MR_BODY "vision_tower_simd.h"
#define MR_PART vision
#include "for_each_road.h"
#endif

namespace medreasoner {
namespace {

#ifdef MR_HAS_TILES
std::unique_ptr<TowerRoom> room_for(const TowerWeights& weights, int64_t n_patches, int n_threads) {
    return MR_ON_ROAD(make_room(weights, n_patches, n_threads));
}
#else
std::unique_ptr<TowerRoom> room_for(const TowerWeights&, int64_t, int) {
    throw std::invalid_argument("this build has no kernel for tiles");
}
#endif

}  // namespace

void Tower::run(const TowerImage& image, bool alone, float* out) {
    crew_.run(alone, [&](Crew& crew) {
        rooms_.with([&](const TowerRoom& room) { return room.fits(image.n_patches, crew.n_threads()); },
                    [&] { return room_for(weights_, image.n_patches, crew.n_threads()); },
                    [&](TowerRoom& room) { room.run(image, crew, out); });
    });
}

}  // namespace medreasoner
