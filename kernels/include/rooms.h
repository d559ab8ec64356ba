// Memory that calls work in, kept for the next ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace medreasoner {

// Rooms for one caller each, of which at most so many are kept: those that were used last.
template <class Room>
class Rooms {
   public:
    explicit Rooms(size_t most) : most_(most) {}

    // Calls use(room) with one that fits(room), or that make() gives.
    template <class Fits, class Make, class Use>
    void with(const Fits& fits, const Make& make, const Use& use) {
        std::unique_ptr<Room> own = taken(fits);
        if (!own) own = make();
        use(*own);
        const std::lock_guard<std::mutex> lock(door_);
        idle_.insert(idle_.begin(), std::move(own));
        if (idle_.size() > most_) idle_.pop_back();
    }

   private:
    template <class Fits>
    std::unique_ptr<Room> taken(const Fits& fits) {
        const std::lock_guard<std::mutex> lock(door_);
        const auto found = std::find_if(idle_.begin(), idle_.end(), [&](const std::unique_ptr<Room>& each) { return fits(*each); });
        if (found == idle_.end()) return nullptr;
        std::unique_ptr<Room> own = std::move(*found);
        idle_.erase(found);
        return own;
    }

    size_t most_;
    std::mutex door_;
    std::vector<std::unique_ptr<Room>> idle_;
};

}  // namespace medreasoner
