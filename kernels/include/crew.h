// Threads that share the work of one call in many short phases.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace medreasoner {

// The caller and n_threads - 1 others, who spin for a short while after a phase, and then sleep. One caller at a time:
// take the `turn` for a row of phases.
class Crew {
   public:
    explicit Crew(int n_threads);
    ~Crew();
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    int n_threads() const { return static_cast<int>(others_->size()) + 1; }
    std::mutex& turn() { return turn_; }

    // Calls work(item, who) for the items 0 .. count - 1, `who` below n_threads, and returns when all are done. Of few items
    // each thread takes the same ones every time, and those of the others only if they are late: what an item reads is
    // then still in the thread's own cache.
    template <class Work>
    void each(int64_t count, Work&& work) {
        if (count < 2 || others_->empty()) {
            for (int64_t i = 0; i < count; ++i) work(i, 0);
            return;
        }
        using Plain = std::remove_reference_t<Work>;
        share(count, [](void* context, int64_t item, int who) { (*static_cast<Plain*>(context))(item, who); }, &work);
    }

   private:
    using Call = void (*)(void* context, int64_t item, int who);

    void share(int64_t count, Call call, void* context);
    bool take(int who);
    uint32_t own_bits(int who) const;
    void serve(int who);
    void sleep(uint64_t phase);

    // A phase's number in the upper half, and in the lower one what is left to take: a bit for each of few items, the
    // number of many. What the phase is may be read by whoever saw it open, and holds if that is then still left: the
    // caller makes another phase only when nothing is.
    std::atomic<uint64_t> open_{0};
    std::atomic<uint32_t> count_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<uint32_t> done_{0};
    std::atomic<bool> over_{false};
    std::atomic<int> sleepers_{0};
    std::mutex door_, turn_;
    std::condition_variable bell_;
    std::unique_ptr<std::vector<std::thread>> others_;
    int64_t process_;
};

// A crew for any number of callers.
class SharedCrew {
   public:
    explicit SharedCrew(int n_threads) : crew_(n_threads) {}

    // Calls work(crew) with all threads, or with this one `alone`, as it is anyhow where the others work for another caller.
    template <class Work>
    void run(bool alone, const Work& work) {
        std::unique_lock<std::mutex> turn(crew_.turn(), std::defer_lock);
        if (!alone) (void)turn.try_lock();
        work(turn ? crew_ : alone_);
    }

   private:
    Crew crew_, alone_{1};
};

}  // namespace medreasoner
