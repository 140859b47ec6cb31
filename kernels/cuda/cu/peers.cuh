// Ranks on cards of one machine, each of which has mapped the others' regions: how they meet.
//
// Every call is one launch on every rank with the same shape, in the same order. A block of a
// call works on items (rows, or pieces of them); for each it writes what the others need into
// their regions, raises a flag there, and waits for theirs. Blocks wait for the blocks of the
// other ranks that have the same items, in the same order, and for nothing else.
//
// Calls are counted on the device, so that a launch is the same each time. Even and odd calls
// have areas and flags of their own: a rank that is in call n has seen a flag of call n - 1 of
// every other, which therefore has left call n - 2, and its area may be written again. For the
// same reason a flag holds the very number of its call until it was seen.
//
// A wait has a limit by the device's clock. Where it passes, the rank is marked as failed, this
// call and all later ones leave at once, and results are undefined: the host looks at the mark.
#pragma once

#include "common.cuh"

constexpr int PEERS_MAX = 8;
// Items of one call.
constexpr uint32_t PEER_ITEMS_MAX = 4096;

// The start of a region; written by its own rank alone.
struct alignas(256) PeerControl {
    uint64_t calls;
    uint32_t arrived;
    uint32_t failed;
};

// Flags [2 areas][2 phases][items][ranks], then the two areas.
constexpr uint64_t PEER_FLAGS = 2ull * 2 * PEER_ITEMS_MAX * PEERS_MAX;
constexpr uint64_t PEER_AREAS = sizeof(PeerControl) + PEER_FLAGS * sizeof(uint64_t);

struct PeerRegions {
    uint64_t starts[PEERS_MAX];  // by rank; addresses of this device
    uint64_t area_bytes;
    uint64_t limit_ns;
    uint32_t rank;
    uint32_t ranks;
};

// Nanoseconds by a clock of the whole device.
DEVICE uint64_t global_timer() {
#ifdef LOCKSTEP_EMULATE
    return simt::clock_ns();
#else
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
#endif
}

// Behind everything that this thread has seen written.
DEVICE void store_release_system(uint64_t* to, uint64_t value) {
#ifdef LOCKSTEP_EMULATE
    simt::store_release(to, value);
#else
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
#endif
}

DEVICE uint64_t load_acquire_system(const uint64_t* from) {
#ifdef LOCKSTEP_EMULATE
    return simt::load_acquire(from);
#else
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
#endif
}

// One call as a block of it sees it.
class PeerCall {
public:
    DEVICE explicit PeerCall(const PeerRegions& regions)
        : regions(regions), number(control()->calls + 1), failed(control()->failed != 0) {}

    // Whether this rank has failed: then there is nothing left to do.
    DEVICE bool has_failed() const { return failed; }

    // The area of `rank` that this call may write to and read from.
    template <typename T>
    DEVICE T* area(uint32_t rank) const {
        const uint64_t at = PEER_AREAS + number % 2 * regions.area_bytes;
        return reinterpret_cast<T*>(regions.starts[rank] + at);
    }

    // Tells the other ranks that what this block wrote for `item` is there, and waits until they
    // say so; false where one did not in time. `verdict` is a word of shared memory.
    DEVICE bool meet(uint32_t phase, uint32_t item, uint32_t* verdict) const {
        // Nobody needs the last verdict any more, and everybody has written.
        __syncthreads();
        if (threadIdx.x < WARP) {
            const uint32_t other = threadIdx.x;
            const bool waits = other < regions.ranks && other != regions.rank;
            if (waits) store_release_system(flag(other, phase, item, regions.rank), number);
            __syncwarp();
            const bool came = !waits || wait(flag(regions.rank, phase, item, other));
            const bool all = __all_sync(ALL_LANES, came);
            if (threadIdx.x == 0) {
                if (!all) control()->failed = 1;
                *verdict = all;
            }
        }
        __syncthreads();
        return *verdict != 0;
    }

    // The last thing a block does.
    DEVICE void end() const {
        __syncthreads();
        if (threadIdx.x != 0) return;
        PeerControl* mine = control();
        if (atomicAdd(&mine->arrived, 1u) == gridDim.x - 1) {
            mine->arrived = 0;
            mine->calls = number;
        }
    }

private:
    const PeerRegions& regions;
    const uint64_t number;
    const bool failed;

    DEVICE PeerControl* control() const {
        return reinterpret_cast<PeerControl*>(regions.starts[regions.rank]);
    }

    // In the region of `of`, raised by rank `by`.
    DEVICE uint64_t* flag(uint32_t of, uint32_t phase, uint32_t item, uint32_t by) const {
        const uint64_t set = number % 2 * 2 + phase;
        const uint64_t at = (set * PEER_ITEMS_MAX + item) * PEERS_MAX + by;
        return reinterpret_cast<uint64_t*>(regions.starts[of] + sizeof(PeerControl)) + at;
    }

    DEVICE bool wait(const uint64_t* flag) const {
        uint64_t since = 0;
        while (load_acquire_system(flag) != number) {
            const uint64_t now = global_timer();
            if (since == 0) since = now;
            if (now - since > regions.limit_ns) return false;
        }
        return true;
    }
};
