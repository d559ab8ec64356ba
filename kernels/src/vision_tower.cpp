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

constexpr size_t kMostIdle = 4;  // rooms: of the sizes of image that were asked for last

}  // namespace

void Tower::run(const TowerImage& image, bool alone, float* out) {
    std::unique_lock<std::mutex> turn(crew_.turn(), std::defer_lock);
    if (!alone) (void)turn.try_lock();
    Crew& crew = turn ? crew_ : alone_;
    std::unique_ptr<TowerRoom> own = room(image.n_patches, crew.n_threads());
    own->run(image, crew, out);
    keep(std::move(own));
}

std::unique_ptr<TowerRoom> Tower::room(int64_t n_patches, int n_threads) {
    {
        const std::lock_guard<std::mutex> lock(door_);
        for (auto each = idle_.begin(); each != idle_.end(); ++each) {
            if (!(*each)->fits(n_patches, n_threads)) continue;
            std::unique_ptr<TowerRoom> found = std::move(*each);
            idle_.erase(each);
            return found;
        }
    }
#ifdef MR_HAS_TILES
    return MR_ON_ROAD(make_room(weights_, n_patches, n_threads));
#else
    throw std::invalid_argument("this build has no kernel for tiles");
#endif
}

void Tower::keep(std::unique_ptr<TowerRoom> room) {
    const std::lock_guard<std::mutex> lock(door_);
    idle_.insert(idle_.begin(), std::move(room));
    if (idle_.size() > kMostIdle) idle_.pop_back();
}

}  // namespace medreasoner
