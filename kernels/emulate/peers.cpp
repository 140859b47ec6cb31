// What several devices have in common: a clock, and memory that all of them touch.
#include <chrono>
#include <thread>

#include "simt.h"

namespace simt {

uint64_t clock_ns() {
    using namespace std::chrono;
    const auto since = steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(duration_cast<nanoseconds>(since).count()) | 1;
}

void store_release(uint64_t* to, uint64_t value) { __atomic_store_n(to, value, __ATOMIC_RELEASE); }

uint64_t load_acquire(const uint64_t* from) {
    std::this_thread::yield();
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

}  // namespace simt
