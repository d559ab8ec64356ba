#include "crew.h"

#include <chrono>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace medreasoner {
namespace {

constexpr uint32_t kFew = 32;  // items that have a bit each
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
    : others_(std::make_unique<std::vector<std::thread>>()), process_(process_id()) {
    try {
        for (int who = 1; who < n_threads; ++who) others_->emplace_back([this, who] { serve(who); });
    } catch (const std::system_error&) {  // the system gives no more: those that are there do the work
    }
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
    const uint64_t phase = (open_.load(std::memory_order_relaxed) >> 32) + 1;
    const uint64_t left = static_cast<uint64_t>(count) < kFew ? (uint64_t{1} << count) - 1 : static_cast<uint64_t>(count);
    open_.store(phase << 32 | left);  // in one order with `sleepers_`: whoever goes to sleep sees this, or is seen
    if (sleepers_.load() > 0) {
        { const std::lock_guard<std::mutex> lock(door_); }
        bell_.notify_all();
    }
    while (take(0)) {
    }
    const auto all_done = [&] { return done_.load(std::memory_order_acquire) == static_cast<uint32_t>(count); };
    while (!spun(all_done)) std::this_thread::yield();
}

// Every n-th of few items.
uint32_t Crew::own_bits(int who) const {
    uint32_t bits = 0;
    for (int i = who; i < static_cast<int>(kFew); i += n_threads()) bits |= uint32_t{1} << i;
    return bits;
}

bool Crew::take(int who) {
    uint64_t seen = open_.load(std::memory_order_acquire);
    while (true) {
        const auto left = static_cast<uint32_t>(seen);
        if (left == 0) return false;
        const uint32_t count = count_.load(std::memory_order_acquire);
        const Call call = call_.load(std::memory_order_acquire);
        void* context = context_.load(std::memory_order_acquire);
        uint32_t item = count - left, taken = 1;
        if (count < kFew) {
            const uint32_t own = left & own_bits(who);
            item = static_cast<uint32_t>(own ? __builtin_ctz(own) : 31 - __builtin_clz(left));
            taken = uint32_t{1} << item;
        }
        if (open_.compare_exchange_weak(seen, seen - taken, std::memory_order_acq_rel, std::memory_order_acquire)) {
            call(context, static_cast<int64_t>(item), who);
            done_.fetch_add(1, std::memory_order_acq_rel);
            return true;
        }
    }
}

void Crew::serve(int who) {
    while (!over_) {
        const uint64_t seen = open_.load(std::memory_order_acquire);
        if (take(who)) continue;
        const auto called = [&] { return open_.load(std::memory_order_relaxed) >> 32 != seen >> 32 || over_; };
        if (!spun(called)) sleep(seen >> 32);
    }
}

void Crew::sleep(uint64_t phase) {
    std::unique_lock<std::mutex> lock(door_);
    ++sleepers_;
    bell_.wait(lock, [&] { return open_.load() >> 32 != phase || over_; });
    --sleepers_;
}

}  // namespace medreasoner
