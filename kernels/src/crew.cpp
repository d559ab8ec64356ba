#include "crew.h"

#include <chrono>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace medreasoner {
namespace {

constexpr uint64_t kClosed = 0xffffffff;  // in the place of the next item
constexpr auto kSpin = std::chrono::microseconds(30);
constexpr int kPausesAClock = 16;

int64_t process_id() {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;
#endif
}

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Whether `is_so` became true while this thread was spinning.
template <class Condition>
bool spun(Condition is_so) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < kPausesAClock; ++i) {
            if (is_so()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    return false;
}

}  // namespace

Crew::Crew(int n_threads)
    : next_(kClosed), others_(std::make_unique<std::vector<std::thread>>()), process_(process_id()) {
    for (int who = 1; who < n_threads; ++who) others_->emplace_back([this, who] { serve(who); });
}

Crew::~Crew() {
    if (process_ != process_id()) {  // forked: the others are not here, and cannot be waited for
        others_.release();
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(door_);
        over_ = true;
    }
    bell_.notify_all();
    for (std::thread& each : *others_) each.join();
}

void Crew::share(int64_t count, Call call, void* context) {
    count_.store(static_cast<uint32_t>(count), std::memory_order_release);
    call_.store(call, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = (next_.load(std::memory_order_relaxed) >> 32) + 1;
    next_.store(phase << 32);  // in one order with `sleepers_`: whoever goes to sleep sees this, or is seen
    if (sleepers_.load() > 0) {
        { const std::lock_guard<std::mutex> lock(door_); }
        bell_.notify_all();
    }
    while (take(0)) {
    }
    const auto all_done = [&] { return done_.load(std::memory_order_acquire) == static_cast<uint32_t>(count); };
    while (!spun(all_done)) std::this_thread::yield();
    next_.store(phase << 32 | kClosed);
}

bool Crew::take(int who) {
    uint64_t seen = next_.load(std::memory_order_acquire);
    while (true) {
        const uint64_t item = seen & kClosed;
        if (item == kClosed) return false;
        const uint32_t count = count_.load(std::memory_order_acquire);
        const Call call = call_.load(std::memory_order_acquire);
        void* context = context_.load(std::memory_order_acquire);
        if (item >= count) return false;
        if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
            call(context, static_cast<int64_t>(item), who);
            done_.fetch_add(1, std::memory_order_acq_rel);
            return true;
        }
    }
}

void Crew::serve(int who) {
    while (!over_) {
        const uint64_t seen = next_.load(std::memory_order_acquire);
        if (take(who)) continue;
        const auto called = [&] { return next_.load(std::memory_order_relaxed) >> 32 != seen >> 32 || over_; };
        if (!spun(called)) sleep(seen >> 32);
    }
}

void Crew::sleep(uint64_t phase) {
    std::unique_lock<std::mutex> lock(door_);
    ++sleepers_;
    bell_.wait(lock, [&] { return next_.load() >> 32 != phase || over_; });
    --sleepers_;
}

}  // namespace medreasoner
